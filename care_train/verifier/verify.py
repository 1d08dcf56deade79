"""Verdicts: in this process where text and numbers decide, in a worker where algebra must."""

import logging
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache, lru_cache
from itertools import takewhile
from typing import Any

from care_train.killable import Limits, Lost, Pool
from care_train.verifier.answers import AlgebraNeededError, AnswerType, compare
from care_train.verifier.expressions import to_latex
from care_train.verifier.responses import Item, Verdict

logger = logging.getLogger(__name__)

_MEMORY_BYTES = 2 << 30
"""Address space: a number of gigabytes is a failed comparison, not a full machine."""
_WALL_FACTOR = 20.0
"""A process that waits for a processor this many times longer than it may compute is stuck."""
_FULL_LIMITS = 6
"""Time limits that a batch's lost comparisons may use up with the whole limit for each ..."""
_SHORT = 1 / 5
"""... after which the others have this part of it ..."""
_ALL_LIMITS = 24
"""... until all together have used up this many."""


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


def verify_batch(items: Sequence[Item], pool: "WorkerPool | None" = None) -> list[Verdict]:
    """A verdict per item, in order; `pool` is for those that need symbolic algebra.

    Equal items, as a group's rollouts often are, are compared once.
    """
    found = {item: verify_in_process(item) for item in dict.fromkeys(items)}
    waiting = [item for item, verdict in found.items() if verdict is None]
    if waiting:
        verdicts = (pool or _shared_pool(os.getpid())).run(waiting)
        found |= zip(waiting, verdicts, strict=True)
    return [verdict for item in items if (verdict := found[item]) is not None]


@lru_cache(maxsize=4096)
def verify_in_process(item: Item) -> Verdict | None:
    """The verdict, or None where it takes symbolic algebra. Policies repeat themselves."""
    try:
        return compare(item, None)
    except AlgebraNeededError:
        return None


class WorkerPool(Pool[Item, Verdict]):
    """Runs comparisons that need symbolic algebra; each has `timeout` seconds of processor time.

    Workers start when first needed. One that hangs or dies costs its own verdict alone and is
    replaced. They end with `close`, with the interpreter, and when the parent dies.
    """

    def __init__(self, workers: int = 2, timeout: float = 5.0) -> None:
        limits = Limits(
            seconds=_WALL_FACTOR * timeout,
            cpu_seconds=timeout,
            memory_bytes=_MEMORY_BYTES,
            environment={"CUDA_VISIBLE_DEVICES": ""},
            is_silent=True,
        )
        super().__init__("reward: symbolic comparison", _make_comparison, workers, limits)
        self._timeout, self._spent = timeout, 0.0
        self.timeouts = self.crashes = 0

    def run(self, items: Sequence[Item]) -> list[Verdict]:
        """A verdict per item, in order; equal items are compared once.

        A comparison that takes too long, or whose process dies, is tried once more with no other
        beside it, and then wrong with a reason that begins with `unverified`. Comparisons that take
        too long share a limit per batch, after which the others have less time each and at last
        none: a batch of answers made to be slow ends.

        Raises:
            ValueError: no worker can be started.
        """
        self._spent = 0.0
        distinct = list(dict.fromkeys(items))
        late = Lost("its batch's time is over")
        found: dict[Item, Verdict | Lost] = dict.fromkeys(distinct, late)
        affordable = takewhile(lambda _: self._spent < _ALL_LIMITS * self._timeout, distinct)
        for item, got in self.map(affordable, self._limit):
            found[item] = self._count(got)
        for item in [item for item, got in found.items() if isinstance(got, Lost)]:
            if self._spent < _FULL_LIMITS * self._timeout:
                found[item] = self._count(next(self.map([item]))[1])
        if reasons := [got.reason for got in found.values() if isinstance(got, Lost)]:
            shown = ", ".join(dict.fromkeys(reasons))
            logger.warning("warning: %d answers are unverified: %s", len(reasons), shown)
        return [_verdict(found[item]) for item in items]

    def _limit(self) -> float:
        is_full = self._spent < _FULL_LIMITS * self._timeout
        return self._timeout * (1.0 if is_full else _SHORT)

    def _count(self, got: Verdict | Lost) -> Verdict | Lost:
        if isinstance(got, Lost):
            self.timeouts += got.is_timeout
            self.crashes += not got.is_timeout
            self._spent += self._limit()
        return got


def _verdict(got: Verdict | Lost) -> Verdict:
    return Verdict(0.0, f"unverified: {got.reason}") if isinstance(got, Lost) else got


@cache
def _shared_pool(process: int) -> WorkerPool:
    """This process's pool; a forked child has its own."""
    return WorkerPool()


class MathVerify:
    """Symbolic algebra, bounded by nothing but the worker process that it runs in.

    The parser of untrusted text is imported here, so in worker processes alone.
    """

    def __init__(self) -> None:
        import math_verify

        # It warns at each call that it has no time limit of its own: the process has one.
        logging.getLogger("math_verify").setLevel(logging.ERROR)
        self._library = math_verify
        config = math_verify.LatexExtractionConfig()
        # It takes a variable h at the end, of \\pi r^2 h, for hours and drops it: units are ours.
        normalization = replace(config.normalization_config, units=False)
        self._config = [replace(config, normalization_config=normalization)]
        self._parse_key = lru_cache(maxsize=512)(self._parse)

    def equal(self, predicted: str, expected: str) -> bool:
        """Whether two expressions are equal; False where either is none."""
        key, got = self._parse_key(expected), self._parse(predicted)
        # Without a time limit of its own, which would take the worker's alarm away.
        return bool(key and got) and self._library.verify(key, got, timeout_seconds=0)

    def value(self, text: str) -> str:
        """The decimal value of a constant expression to 30 digits, or ""."""
        parsed = self._parse(text)
        if not parsed or isinstance(parsed[0], str) or getattr(parsed[0], "free_symbols", True):
            return ""
        value = str(parsed[0].evalf(30))
        return value if re.fullmatch(r"-?[0-9]+(\.[0-9]+)?", value) else ""

    def _parse(self, text: str) -> list[Any]:
        # A dollar sign would end the environment.
        text = to_latex(text).replace("$", "")
        return self._library.parse(
            f"${text}$", self._config, fallback_mode="no_fallback", parsing_timeout=0
        )


def _make_comparison() -> Callable[[Item], Verdict]:
    symbolic = MathVerify()
    symbolic.equal("\\frac{1}{2}", "x")  # what is loaded at the first call belongs to the start
    return lambda item: compare(item, symbolic)
