"""Comparisons that need symbolic algebra, in processes that are killed where they take too long."""

import logging
import os
from collections.abc import Callable, Iterator, Sequence

from care_train.killable import Limits, Lost, Pool
from care_train.verifier.answers import compare
from care_train.verifier.types import Item, Verdict

logger = logging.getLogger(__name__)

_MEMORY_BYTES = 2 << 30
"""Address space: a number of gigabytes is a failed comparison, not a full machine."""
_WALL_FACTOR = 20.0
"""A process that waits for a processor this many times longer than it may compute is stuck."""
_START_SECONDS = 120.0
_FULL_LIMITS = 6
"""Time limits that a batch's lost comparisons may use up with the whole limit for each ..."""
_SHORT = 1 / 5
"""... after which the others have this part of it ..."""
_ALL_LIMITS = 24
"""... until all together have used up this many."""


class WorkerPool:
    """Runs comparisons that need symbolic algebra; each has `timeout` seconds of processor time.

    Workers start when first needed. One that hangs or dies costs its own verdict alone and is
    replaced. They end with `close`, with the interpreter, and when the parent dies.
    """

    def __init__(self, workers: int = 2, timeout: float = 5.0) -> None:
        self._timeout = timeout
        limits = Limits(
            seconds=_WALL_FACTOR * timeout,
            cpu_seconds=timeout,
            memory_bytes=_MEMORY_BYTES,
            start_seconds=_START_SECONDS,
            environment={"CUDA_VISIBLE_DEVICES": ""},
            is_silent=True,
        )
        self._pool = Pool[Item, Verdict](
            "reward: symbolic comparison", _make_comparison, workers, limits
        )
        self._spent = 0.0
        self.timeouts = 0
        self.crashes = 0

    @property
    def pids(self) -> list[int]:
        """The processes running now."""
        return self._pool.pids

    @property
    def longest(self) -> float:
        """Seconds from an item's start to its verdict, at most."""
        return self._pool.longest

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
        found: dict[Item, Verdict | Lost] = dict.fromkeys(
            distinct, Lost("its batch's time is over")
        )
        for item, got in self._pool.map(self._affordable(distinct), self._limit):
            found[item] = self._count(got)
        for item in [item for item, got in found.items() if isinstance(got, Lost)]:
            if self._spent < _FULL_LIMITS * self._timeout:
                found[item] = self._count(next(self._pool.map([item]))[1])
        verdicts = {item: _verdict(got) for item, got in found.items()}
        if lost := [got for got in found.values() if isinstance(got, Lost)]:
            reasons = ", ".join(dict.fromkeys(one.reason for one in lost))
            logger.warning("warning: %d answers are unverified: %s", len(lost), reasons)
        return [verdicts[item] for item in items]

    def close(self) -> None:
        """End all workers."""
        self._pool.close()

    def _affordable(self, items: Sequence[Item]) -> Iterator[Item]:
        for item in items:
            if self._spent >= _ALL_LIMITS * self._timeout:
                return
            yield item

    def _limit(self) -> float:
        if self._spent < _FULL_LIMITS * self._timeout:
            return self._timeout
        return self._timeout * _SHORT

    def _count(self, got: Verdict | Lost) -> Verdict | Lost:
        if isinstance(got, Lost):
            self.timeouts += got.is_timeout
            self.crashes += not got.is_timeout
            self._spent += self._limit()
        return got


def _verdict(got: Verdict | Lost) -> Verdict:
    return Verdict(0.0, f"unverified: {got.reason}") if isinstance(got, Lost) else got


def _make_comparison() -> Callable[[Item], Verdict]:
    # Imported here: the parser of untrusted text is loaded in worker processes alone.
    from care_train.verifier.symbolic import MathVerify

    symbolic = MathVerify()
    symbolic.equal("\\frac{1}{2}", "x")
    return lambda item: compare(item, symbolic)


_POOLS: dict[tuple[int, int, float], WorkerPool] = {}


def shared_pool(workers: int = 2, timeout: float = 5.0) -> WorkerPool:
    """This process's pool with these limits; a forked child has its own."""
    key = (os.getpid(), workers, timeout)
    if key not in _POOLS:
        _POOLS[key] = WorkerPool(workers, timeout)
    return _POOLS[key]
