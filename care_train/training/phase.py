"""Where this process is: the step and its phase, for the guard and for messages."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from care_train.rollout.errors import NotFiniteLogitsError, RolloutError
from care_train.rollout.memory import is_out_of_memory
from care_train.training.failures import (
    CHANGES,
    DiskFullError,
    EngineError,
    NotFiniteError,
    OutOfMemoryError,
    RunError,
    is_disk_full,
)

_GENERATION = (
    "lower rollout.batch_size (eval.batch_size in evaluations) or rollout.max_new_tokens, and "
    "under rollout.engine=vllm rollout.vllm.gpu_memory_utilization or rollout.vllm.kv_cache_gib"
)
_TRAINING = (
    "lower train.micro_batch_size (sft.micro_batch_size in a cold start), or start anew with a "
    "higher deepspeed.zero_stage; `care-train plan` says what fits"
)
_ADVICE = {
    "generate": _GENERATION,
    "sync": _GENERATION,
    "forward": _TRAINING,
    "update": _TRAINING,
}
_ELSEWHERE = "make room: fewer ranks on one machine, or fewer other programs beside them"


@dataclass(frozen=True)
class Place:
    """Where a process is."""

    phase: str = "other"
    """generate | reward | forward | update | sync | save, or `other` between them."""
    step: int | None = None
    """Counted from 1; None outside of steps."""
    since: float = field(default_factory=time.monotonic)


_place = Place()


def current_place() -> Place:
    """Where this process is now."""
    return _place


def begin_step(step: int | None) -> None:
    """From here on the process works at `step`, counted from 1; None: at none."""
    global _place
    _place = Place("other", step)


@contextmanager
def at_step(step: int, total: int, run_dir: Path) -> Iterator[None]:
    """Work at one step; its errors say so, and how the run goes on.

    Args:
        step: which, counted from 1.
        total: how many there will be.
        run_dir: the run's folder.
    """
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
    # Not after an error: the guard still says where it was.
    begin_step(None)


@contextmanager
def phase(name: str) -> Iterator[None]:
    """What is done in the `with` block; around it goes on what was before.

    Raises:
        OutOfMemoryError: the block ran out of memory; the message names what to lower.
    """
    global _place
    before = _place
    _place = replace(before, phase=name, since=time.monotonic())
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RolloutError) or not is_out_of_memory(error):
            raise
        reason = str(error).strip().splitlines() or ["no memory"]
        advice = f"{_ADVICE[name]}; {CHANGES}" if name in _ADVICE else _ELSEWHERE
        raise OutOfMemoryError(f"out of memory in {name} ({reason[0]}): {advice}") from error
    # Not after an error, as above.
    _place = replace(before, since=time.monotonic())
