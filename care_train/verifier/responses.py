"""A response with its row, and a row's columns as the verifier reads them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from care_train.data import Sample
from care_train.verifier.types import AnswerType, Item


@dataclass(frozen=True)
class Response:
    """A decoded response, which is untrusted, and the row it answers."""

    text: str
    """Without EOS, a forced prefix included."""
    sample: Sample
    finished: bool = True
    """False when the length limit cut it."""
    num_tokens: int = 0
    """Sampled tokens."""


def item_of(predicted: str, sample: Sample, tolerance: float | None = None) -> Item:
    """An answer with its row's key, `answer_type`, `options` and `tolerance` columns.

    Raises:
        ValueError: a column that holds something else.
    """
    columns = sample.columns
    own = columns.get("tolerance")
    is_number = isinstance(own, (int, float)) and not isinstance(own, bool) and 0 <= own < 1
    if own is not None and not is_number:
        raise ValueError(f"{_place(sample)}: tolerance: got {own!r}, wanted a number in [0, 1)")
    return Item(
        predicted,
        sample.answer,
        _answer_type(sample),
        _options(sample),
        tolerance if own is None else float(own),
    )


def _answer_type(sample: Sample) -> AnswerType | None:
    name = sample.columns.get("answer_type")
    if name is None or name == "":
        return None
    if name not in list(AnswerType):
        wanted = ", ".join(AnswerType)
        raise ValueError(f"{_place(sample)}: answer_type: got {name!r}, wanted one of {wanted}")
    return AnswerType(name)


def _options(sample: Sample) -> tuple[str, ...]:
    for column in ("options", "choices"):
        options: Any = sample.columns.get(column)
        if options is None:
            continue
        if isinstance(options, Mapping):
            options = [options[key] for key in sorted(options)]
        if hasattr(options, "tolist"):
            options = options.tolist()
        if isinstance(options, Sequence) and not isinstance(options, str):
            return tuple(str(option) for option in options)
        raise ValueError(
            f"{_place(sample)}: {column}: got {options!r}, wanted a list of the options' texts"
        )
    return ()


def _place(sample: Sample) -> str:
    return sample.location or sample.id
