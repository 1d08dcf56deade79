"""Where a step's wall seconds go."""

import time
from collections.abc import Callable

Mark = Callable[[str], None]
"""Called with the name of the part that ends here."""


def no_mark(part: str) -> None:
    """For callers that do not ask where the time goes."""


class StepClock:
    """Wall seconds of a step by part; every moment belongs to exactly one.

    A part may come in several pieces. The parts: `sync` (weights to the rollout engine), `prepare`
    (chat template, image processor), `generate`, `score` (spans and verifier), `old_forward` (old
    log-probs and embeddings), `select`, `reflect` (its generation), `reference` (its log-probs),
    `gap` (log-probs that only the engine's correction needs), `collate` (loss rows and padding),
    `update` (forward and backward), `optimizer`, and `other`. Work that a GPU still does is counted
    where the program waits for it.
    """

    MODEL_PARTS = ("generate", "old_forward", "reflect", "reference", "gap", "update")
    """Generation, forwards and backwards; the rest is overhead."""

    def __init__(self) -> None:
        self._start = self._last = time.perf_counter()
        self._parts: dict[str, float] = {}

    def mark(self, part: str) -> None:
        """The time since the last mark was spent on `part`."""
        now = time.perf_counter()
        self._parts[part] = self._parts.get(part, 0.0) + now - self._last
        self._last = now

    @property
    def total(self) -> float:
        """Seconds until the last mark."""
        return self._last - self._start

    def values(self) -> dict[str, float]:
        """`seconds`, `seconds_<part>`, and `seconds_overhead`: all that is neither generation nor a
        forward or backward."""
        model = sum(self._parts.get(part, 0.0) for part in self.MODEL_PARTS)
        named = {f"seconds_{part}": seconds for part, seconds in self._parts.items()}
        return named | {"seconds": self.total, "seconds_overhead": self.total - model}
