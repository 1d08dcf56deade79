"""What is asked of the verifier, and what it answers."""

from dataclasses import dataclass

from care_train.data.answers import AnswerType


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
