"""A response with its row, and a row's columns as the verifier reads them."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import overload

from PIL import Image

from care_train.data import Sample, load_image
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


class RowImages(Sequence[Image.Image]):
    """A row's images as RGB, each decoded when it is asked for."""

    def __init__(self, sample: Sample) -> None:
        self._sample = sample

    def __len__(self) -> int:
        return len(self._sample.images)

    @overload
    def __getitem__(self, index: int) -> Image.Image: ...
    @overload
    def __getitem__(self, index: slice) -> list[Image.Image]: ...
    def __getitem__(self, index: int | slice) -> Image.Image | list[Image.Image]:
        if isinstance(index, slice):
            return [self[place] for place in range(len(self))[index]]
        place = self._sample.location or self._sample.id
        ref = self._sample.images[index]
        return load_image(ref, location=place)


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
