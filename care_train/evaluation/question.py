"""One question of a benchmark, and what its answer is compared with."""

import ast
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from care_train.data import ImageRef, Sample
from care_train.data.image_refs import image_refs
from care_train.evaluation.columns import Kind, describe
from care_train.verifier.types import Item


@dataclass(frozen=True)
class Question:
    """What is asked, and by which rule an answer is right."""

    sample: Sample
    """Prompt, images and key."""
    options: tuple[str, ...] = ()
    """The texts of a multiple-choice question, in the order of their letters."""
    kind: str = ""
    """The benchmark's own word for the answer's form, such as `integer`."""
    precision: int | None = None
    """Decimals an answer is rounded to."""
    group: str = ""
    """The part of the benchmark it is reported under, such as a subject."""

    @property
    def is_choice(self) -> bool:
        """Whether one of several options is asked for; they may be in the image alone."""
        return bool(self.options) or self.kind == "choice"


@dataclass(frozen=True)
class Judgement:
    """Whether an answer is right."""

    accuracy: float
    """1.0 or 0.0, or what the verifier's partial credit says."""
    is_exact: bool
    """Right by the benchmark's own exact match: without the verifier's reading of free-form
    answers, which stands in for the language model that the benchmark's authors ask."""
    reason: str
    """For people."""
    vote: str
    """The answer in the form in which answers are counted for a majority."""
    asked: tuple[Item, ...] = ()
    """What the verifier is still asked, of a whole batch at once; the best verdict counts."""


@dataclass(frozen=True)
class Benchmark:
    """Where a benchmark's rows are published, and how they are read and scored."""

    name: str
    title: str
    """As Table 1 heads its column."""
    dataset: str
    """Its id on the Hugging Face Hub."""
    split: str
    columns: Mapping[str, Kind]
    """Those that are read, and what they hold."""
    to_question: Callable[[Mapping[str, Any], str, Path], Question]
    """From a checked row, its location and the folder of relative paths."""
    judge: Callable[[str, Question], Judgement]
    """From the text of the answer span, which is untrusted."""
    subsets: tuple[str, ...] = field(default=())
    """Configurations to read; none: the only one, or all."""


def image_ref(value: Any, base_dir: Path, location: str) -> ImageRef:
    """An image column's value as the rest of the code takes it; checked by `check_row` before."""
    return image_refs(value, column="image", base_dir=base_dir, at=location)[0]


def decode_texts(value: Any, *, column: str, location: str) -> tuple[str, ...]:
    """A list of texts, or the Python literal that MMMU stores in its place.

    Raises:
        ValueError: the text is no such literal.
    """
    if isinstance(value, str):
        try:
            value = ast.literal_eval(value) if value.strip() else []
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            value = None
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise ValueError(
            f"{location}: column {column!r}: got {describe(value)}, wanted text that spells a list "
            "of texts, such as \"['red', 'blue']\""
        )
    return tuple(value)


def letters(count: int) -> str:
    """The letters of so many options."""
    return "ABCDEFGHIJKLMNOPQRSTUVWXYZ"[:count]


def list_options(options: Sequence[str], form: str) -> str:
    """Options a line each; `form` holds {letter} and {text}."""
    return "\n".join(
        form.format(letter=letter, text=text)
        for letter, text in zip(letters(len(options)), options, strict=True)
    )
