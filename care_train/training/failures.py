"""How a run fails: errors that say what happened, where, and how to go on; one status each."""

import errno
import os
import re
import signal
from pathlib import Path
from typing import Self

from care_train.rollout.errors import NotFiniteLogitsError, RolloutError

INPUT_STATUS = 2
NOT_FINITE_STATUS = 65
NO_SIGNAL_STATUS = 66
RANK_LOST_STATUS = 69
HUNG_STATUS = 70
OUT_OF_MEMORY_STATUS = 71
ENGINE_STATUS = 72
IN_USE_STATUS = 73
DISK_FULL_STATUS = 74
STOPPED_STATUS = 75
"""Exit status of a run that was asked to stop, saved a checkpoint and can go on (EX_TEMPFAIL)."""

CHANGES = "a run that goes on takes a changed key with allow_changes=[KEY]"
"""Of settings that decide where a run goes."""

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_NO_ROOM_TEXTS = (*map(os.strerror, _NO_ROOM), "database or disk is full")
_CHECKPOINT = re.compile(r"step_\d{6,}")


class RunError(Exception):
    """A run cannot go on. `status` is its exit status."""

    status = 1

    def at(self, step: int, total: int, run_dir: Path) -> Self:
        """The same error, with the step that could not be finished and how the run goes on."""
        named = type(self)(f"step {step} of {total}: {self}; {resume_hint(run_dir)}")
        named.status = self.status
        return named


class NotFiniteError(RunError, FloatingPointError):
    """A loss, a gradient or the policy's logits are NaN or infinite."""

    status = NOT_FINITE_STATUS


class NoSignalError(RunError):
    """Several steps in a row had no group to learn from."""

    status = NO_SIGNAL_STATUS


class OutOfMemoryError(RunError):
    """No memory for a forward, a backward or a generation."""

    status = OUT_OF_MEMORY_STATUS


class EngineError(RunError):
    """The rollout engine failed."""

    status = ENGINE_STATUS


class DiskFullError(RunError):
    """There is no room for a log or a sample."""

    status = DISK_FULL_STATUS


class RankLostError(RunError):
    """Another rank of the run failed, died or fell silent."""

    status = RANK_LOST_STATUS


class Stopped(Exception):  # noqa: N818
    """The run saved a checkpoint and ends before its last step, as it was asked to."""

    def __init__(self, signal_number: int, step: int, last: int, run_dir: Path, saved: Path):
        name = signal.Signals(signal_number).name
        super().__init__(f"{name}: stopped after step {step} of {last}, saved {saved}")
        self.run_dir = run_dir


def is_disk_full(error: BaseException | None) -> bool:
    """Whether a write found no room: on the disk, in the user's quota, or under `ulimit -f`.

    Also where a library wraps the system's error, or hands on its text alone (safetensors, torch,
    SQLite).
    """
    while error is not None:
        if isinstance(error, OSError) and error.errno in _NO_ROOM:
            return True
        if any(text in str(error) for text in _NO_ROOM_TEXTS):
            return True
        error = error.__cause__ or error.__context__
    return False


def is_explained(error: BaseException) -> bool:
    """Whether an error's message is all that a user needs; a traceback helps with any other."""
    if isinstance(error, RunError | RolloutError | ValueError):
        return True
    return (isinstance(error, OSError) and error.filename is not None) or is_disk_full(error)


def status_of(error: BaseException) -> int:
    """With what status a command ends by this error."""
    if isinstance(error, RunError):
        return error.status
    if isinstance(error, NotFiniteLogitsError):
        return NOT_FINITE_STATUS
    if isinstance(error, RolloutError):
        return ENGINE_STATUS
    if is_disk_full(error):
        return DISK_FULL_STATUS
    return INPUT_STATUS if is_explained(error) else 1


def checkpoint_folders(folder: Path) -> list[Path]:
    """The checkpoints in `folder`, oldest first, without unfinished and damaged ones."""
    found = [path for path in folder.glob("step_*") if _CHECKPOINT.fullmatch(path.name)]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step_")))


def resume_hint(run_dir: Path) -> str:
    """From what and how a run that ended goes on."""
    names = ("cold_start_checkpoints", "checkpoints")
    found = [path for name in names for path in checkpoint_folders(run_dir / name)]
    kept = f"the newest checkpoint is {found[-1]}" if found else "there is no checkpoint yet"
    return f"{kept}; go on with the same command and --resume, or with resume={run_dir}"
