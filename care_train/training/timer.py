"""`with timer("generate"):` names the part of a step that its block is.

The name goes to three readers: the step's metrics (`seconds_generate`), the messages of errors
("step 3 of 60: out of memory in generate"), and the watchdog, which compares how long the part has
taken with `limits.step`.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from care_train.rollout.errors import NotFiniteLogitsError, RolloutError, is_out_of_memory
from care_train.training.failures import (
    CHANGES,
    DiskFullError,
    EngineError,
    NotFiniteError,
    OutOfMemoryError,
    RunError,
    is_disk_full,
)

PARTS = (
    *("sync", "prepare", "generate", "score", "old_forward", "select", "reflect", "reference"),
    *("gap", "collate", "update", "optimizer", "archive", "save", "other"),
)
"""The parts of a step.

`sync`: weights to the rollout engine. `prepare`: chat template and image processor. `generate`: the
G rollouts. `score`: spans and verifier. `old_forward`: old log-probs and rationale embeddings.
`select`: the subgroup and its advantages. `reflect`: generation of the reflections. `reference`:
pi_ref's log-probs. `gap`: log-probs that only the correction for the engine needs. `collate`: loss
rows and padding. `update`: forward and backward. `optimizer`: its step. `archive`: what is
handed over to be written to it. `save`: a checkpoint or model. `other`: everything outside of a
timer."""

MODEL_PARTS = ("generate", "old_forward", "reflect", "reference", "gap", "update")
"""Generation, forwards and backwards; the other parts are the trainer's overhead."""

BOUNDED_PARTS = (*MODEL_PARTS, "score", "optimizer")
"""Those that `limits.step` bounds; the others have an hour where it is shorter."""

_GENERATION = (
    "lower rollout.batch_size or rollout.max_new_tokens, and "
    "under rollout.engine=vllm rollout.vllm.gpu_memory_utilization"
)
_TRAINING = (
    "lower train.micro_batch_size, or start anew with a higher deepspeed.zero_stage; "
    "`care-train plan` says what fits"
)
_ADVICE = dict.fromkeys(("generate", "reflect", "sync"), _GENERATION) | dict.fromkeys(
    ("old_forward", "reference", "gap", "update", "optimizer"), _TRAINING
)
_OTHER_ADVICE = "make room: fewer ranks on one machine, or fewer other programs beside them"


@dataclass(frozen=True)
class Place:
    """What a process is doing."""

    part: str = "other"
    """One of `PARTS`."""
    step: int | None = None
    """Counted from 1; None outside of steps."""
    since: float = field(default_factory=time.monotonic)
    """When the part began, by `time.monotonic`."""


class StepSeconds:
    """Wall seconds by part from here on, up to the next `StepSeconds` of this process.

    Every moment belongs to exactly one part: a timer inside another one interrupts it. Work that a
    GPU still does is counted where the program waits for it.
    """

    def __init__(self) -> None:
        global _seconds
        _seconds = self
        self._parts: dict[str, float] = {}
        self._start = self._last = time.perf_counter()

    def add(self, part: str) -> None:
        """The time since the last `add` was spent on `part`."""
        now = time.perf_counter()
        self._parts[part] = self._parts.get(part, 0.0) + now - self._last
        self._last = now

    def values(self) -> dict[str, float]:
        """`seconds`, `seconds_<part>`, and `seconds_overhead`, the sum of all parts that are not
        in `MODEL_PARTS`."""
        self.add(_place.part)
        total = self._last - self._start
        model = sum(self._parts.get(part, 0.0) for part in MODEL_PARTS)
        named = {f"seconds_{part}": seconds for part, seconds in self._parts.items()}
        return named | {"seconds": total, "seconds_overhead": total - model}


_place, _seconds = Place(), StepSeconds()


def current_place() -> Place:
    """What this process is doing now."""
    return _place


@contextmanager
def timer(part: str) -> Iterator[None]:
    """The `with` block is a `part` of the step; after it goes on the part that was before.

    Only the main thread may use it.

    Raises:
        OutOfMemoryError: the block ran out of memory; the message names the settings to lower.
    """
    outer = _place
    _enter(part, outer.step)
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RolloutError) or not is_out_of_memory(error):
            raise
        reason = str(error).strip().splitlines() or ["no memory"]
        advice = f"{_ADVICE[part]}; {CHANGES}" if part in _ADVICE else _OTHER_ADVICE
        raise OutOfMemoryError(f"out of memory in {part} ({reason[0]}): {advice}") from error
    # An error leaves the place as it is, so that the watchdog can still say where it came from.
    _enter(outer.part, outer.step)


def begin_step(step: int | None) -> None:
    """From here on the process works at `step`, counted from 1, or outside of steps (None)."""
    _enter("other", step)


@contextmanager
def at_step(step: int, total: int, run_dir: Path) -> Iterator[None]:
    """Work at one step of `total`, counted from 1; errors from it name the step and say how the run
    is resumed."""
    begin_step(step)
    try:
        yield
    except RunError as error:
        raise error.at(step, total, run_dir) from error
    except RolloutError as error:
        kind = NotFiniteError if isinstance(error, NotFiniteLogitsError) else EngineError
        raise kind(f"{error}{error.advice}").at(step, total, run_dir) from error
    except OSError as error:
        if not is_disk_full(error):
            raise
        raise DiskFullError(str(error)).at(step, total, run_dir) from error
    begin_step(None)


def _enter(part: str, step: int | None) -> None:
    global _place
    _seconds.add(_place.part)
    _place = Place(part, step)
