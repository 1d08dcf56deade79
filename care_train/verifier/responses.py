"""A response with its row, and a row's columns as the verifier reads them."""

from dataclasses import dataclass, field

from care_train.data import Sample
from care_train.verifier.types import Item


@dataclass(frozen=True)
class Response:
    """A decoded response, which is untrusted, and the row it answers."""

    text: str
    """Without EOS, a forced prefix included."""
    sample: Sample
    finished: bool = True
    """False when the length limit cut it."""
    token_ids: tuple[int, ...] = field(default=(), repr=False)
    """Sampled tokens."""

    @property
    def num_tokens(self) -> int:
        """Sampled tokens."""
        return len(self.token_ids)


def item_of(predicted: str, sample: Sample, tolerance: float | None = None) -> Item:
    """An answer with its row's key, type, options and tolerance; `tolerance` where it has none."""
    own = sample.tolerance
    return Item(
        predicted,
        sample.answer,
        sample.answer_type,
        sample.options,
        tolerance if own is None else own,
    )
