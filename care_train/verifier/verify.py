"""Verdicts: in this process where text and numbers decide, in a worker where algebra must."""

from collections.abc import Sequence

from care_train.verifier.answers import compare
from care_train.verifier.pool import WorkerPool, shared_pool
from care_train.verifier.types import AnswerType, Item, Verdict


class _AlgebraNeededError(Exception):
    """Only a worker can tell."""


class _Elsewhere:
    """No symbolic algebra in this process: its parser is not for untrusted text."""

    def equal(self, predicted: str, expected: str) -> bool:
        raise _AlgebraNeededError

    def value(self, text: str) -> str:
        raise _AlgebraNeededError


def verify(
    predicted: str,
    expected: str,
    answer_type: AnswerType | None = None,
    *,
    options: Sequence[str] = (),
    tolerance: float | None = None,
) -> Verdict:
    """Whether an answer, the text of the answer span, equals its key.

    Args:
        predicted: untrusted, of any length.
        expected: the key.
        answer_type: how they are compared; None infers it from the key.
        options: the texts of a multiple-choice question, in the order of their letters.
        tolerance: largest distance of a number, relative to the key; None: the type's own.
    """
    item = Item(predicted, expected, answer_type, tuple(options), tolerance)
    return verify_batch([item])[0]


def verify_batch(items: Sequence[Item], pool: WorkerPool | None = None) -> list[Verdict]:
    """A verdict per item, in order; `pool` is for those that need symbolic algebra."""
    verdicts = [verify_in_process(item) for item in items]
    waiting = [place for place, verdict in enumerate(verdicts) if verdict is None]
    if waiting:
        found = (pool or shared_pool()).run([items[place] for place in waiting])
        for place, verdict in zip(waiting, found, strict=True):
            verdicts[place] = verdict
    return [verdict for verdict in verdicts if verdict is not None]


def verify_in_process(item: Item) -> Verdict | None:
    """The verdict, or None where it takes symbolic algebra."""
    try:
        return compare(item, _Elsewhere())
    except _AlgebraNeededError:
        return None
