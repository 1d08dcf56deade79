"""A response with its row, its form (fmt of Eq. 1, Sec. 3.1), and its answer with the key."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from PIL import Image

from care_train.data import RowError, Sample, load_image
from care_train.data.answers import AnswerType
from care_train.verifier.notation import closing_brace

_BOX = "\\boxed{"


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


@dataclass(frozen=True)
class Item:
    """One answer and its key."""

    predicted: str
    """The text of the answer span: untrusted, of any length."""
    expected: str
    """The key, trusted."""
    answer_type: AnswerType | None = None
    """None: inferred from the key and the options."""
    options: tuple[str, ...] = ()
    """The texts of a multiple-choice question, in the order of their letters."""
    tolerance: float | None = None
    """Largest distance of a number, relative to the key. None: the type's own."""


@dataclass(frozen=True)
class Verdict:
    """Whether an answer is right, and why."""

    accuracy: float
    """acc in [0, 1]."""
    reason: str
    """For people."""
    answer_type: AnswerType | None = None
    """As what it was compared; None where it was not."""


def item_of(predicted: str, sample: Sample, tolerance: float | None = None) -> Item:
    """An answer with its row's key, type, options and tolerance; `tolerance` where it has none."""
    tolerance = tolerance if sample.tolerance is None else sample.tolerance
    return Item(predicted, sample.answer, sample.answer_type, sample.options, tolerance)


def check_comparable(sample: Sample) -> None:
    """Check that answers can be compared with a row's key.

    Raises:
        RowError: only a reward function can read it.
    """
    if sample.answer_type is AnswerType.FUNCTION:
        raise RowError(
            "answer_type",
            f"{sample.where}: answer: got {sample.answer[:60]!r}, which only a "
            "reward function can read (an object, a list of numbers or options, or a long solution "
            "without one marked answer), wanted the final answer as text, a number or a boolean, "
            "'A, C' for several options, or a list of texts of which any is right: correct the "
            "row, set its answer_type to text, which compares text as it stands, or set "
            "reward.functions",
        )


class RowImages(Sequence[Image.Image]):
    """A row's images as RGB, each decoded when it is asked for."""

    def __init__(self, sample: Sample) -> None:
        self._sample = sample

    def __len__(self) -> int:
        return len(self._sample.images)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[place] for place in range(len(self))[index]]
        sample = self._sample
        return load_image(sample.images[index], location=sample.where)


def format_score(text: str, think_tag: str = "think", answer_tag: str = "answer") -> float:
    """1.0 for exactly one think span followed by exactly one answer span, else 0.0.

    Both must hold text, and only whitespace may stand around them. Each tag occurs once, so
    nested, repeated and unclosed spans score 0. Takes time linear in the text.
    """
    return float(not format_fault(text, think_tag, answer_tag))


def format_fault(text: str, think_tag: str = "think", answer_tag: str = "answer") -> str:
    """What is wrong with a response's form, or "" where its `format_score` is 1."""
    tags, pattern = _tags(think_tag, answer_tag)
    # Texts and tags in turn.
    pieces = pattern.split(text)
    found = pieces[1::2]
    for tag in tags:
        if (count := found.count(tag)) != 1:
            return f"{count} {tag}, wanted 1"
    if found != tags:
        return "tags out of order"
    before, think, between, answer, after = (piece.strip() for piece in pieces[::2])
    if before or between or after:
        return "text outside the spans"
    return "" if think and answer else "an empty span"


@lru_cache
def _tags(think_tag: str, answer_tag: str) -> tuple[list[str], re.Pattern[str]]:
    """The four tags in the order they are wanted in, and what finds them."""
    tags = [f"<{think_tag}>", f"</{think_tag}>", f"<{answer_tag}>", f"</{answer_tag}>"]
    return tags, re.compile(f"({'|'.join(map(re.escape, tags))})")


def boxed_answer(text: str) -> str | None:
    """What the last `\\boxed{}` of a response holds; None where it has none, or an unclosed one."""
    start = text.rfind(_BOX) + len(_BOX)
    end = closing_brace(text, start - 1) if _BOX in text else -1
    return None if end < 0 else text[start:end].strip()


def boxed_fault(text: str, think_tag: str = "think") -> str:
    """What is wrong with the form "rationale in its tags, then `\\boxed{}`", or "".

    EasyR1's rule (examples/reward_function/math.py): the response begins with the opening tag; the
    closing one, a box and a closing brace follow in this order, whatever stands between them. Space
    around `<`, `>` and `/` does not count.
    """
    text = "".join(piece.strip() for piece in re.split("([<>/])", text.strip()))
    if not text.startswith(f"<{think_tag}>"):
        return f"does not begin with <{think_tag}>"
    place = 0
    for wanted in (f"<{think_tag}>", f"</{think_tag}>", _BOX, "}"):
        found = text.find(wanted, place)
        if found < 0:
            return f"no {wanted} behind the {place} characters before"
        place = found + len(wanted)
    return ""
