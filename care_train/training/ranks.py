"""Which process a rank is, and what ranks tell each other beside collectives.

They write to the process group's store, which still answers when a collective hangs. Any program
that can connect to the store can write there, so everything that is read is checked first.
"""

import os
import socket
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, TypeVar

import psutil
import torch.distributed as dist
from pydantic import AfterValidator, ConfigDict, Field, TypeAdapter, ValidationError

from care_train.training.timer import PARTS

Value = TypeVar("Value")

_STATE, _START_TICKS = 3, 22
"""Fields of /proc/PID/stat, counted from 1 as proc(5) does."""
_STRICT = ConfigDict(extra="forbid", strict=True)


class ForeignValueError(RuntimeError):
    """The store holds a value that no rank of this run wrote."""


@dataclass(frozen=True)
class ProcessId:
    """A process, told apart from every other one of any machine and time."""

    host: str
    """For people: containers and machines may share one."""
    machine: str | None
    """What `pid` and `start_ticks` are valid in: one boot of one kernel, one pid namespace. None
    where /proc does not say."""
    pid: int
    start_ticks: int | None
    """Clock ticks between the boot and the process's start: a later process with the same pid has
    others, and no change of the clock moves them. None where /proc does not say."""

    @classmethod
    def own(cls) -> "ProcessId":
        """This process."""
        pid, stat = os.getpid(), _stat(os.getpid())
        return cls(socket.gethostname(), _machine(), pid, None if stat is None else stat[1])

    def is_running(self) -> bool | None:
        """Whether it runs; None where that cannot be seen from here (another machine, say)."""
        if self.machine is None or self.machine != _machine():
            return None
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return False
        except PermissionError:  # another user's
            pass
        stat = _stat(self.pid)
        if stat is None or self.start_ticks is None:  # /proc hides other users' processes
            return None
        state, start_ticks = stat
        return start_ticks == self.start_ticks and state not in "ZX"


def end_at_once(status: int) -> None:
    """End this process and its children without any clean-up."""
    for child in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            child.kill()
    os._exit(status)


def _known_part(name: str) -> str:
    if name not in PARTS:
        raise ValueError(f"got {name!r}, wanted one of {', '.join(PARTS)}")
    return name


@dataclass(frozen=True)
class Beat:
    """A rank's sign of life."""

    __pydantic_config__ = _STRICT

    number: int
    """Counts up; a rank whose number stays the same is dead, stopped or cut off."""
    part: Annotated[str, AfterValidator(_known_part)]
    """One of `timer.PARTS`."""
    step: int | None
    seconds: float
    """How long the rank has been in the part."""
    over: bool
    """Whether that is longer than the part's limit."""

    def __str__(self) -> str:
        step = "" if self.step is None else f" of step {self.step}"
        return f"{self.part}{step} for {self.seconds:.0f} s"


@dataclass(frozen=True)
class Fault:
    """Why a run ends."""

    __pydantic_config__ = _STRICT

    rank: Annotated[int, Field(ge=0)]
    """The rank that failed, died, fell silent or hangs."""
    message: str
    status: Annotated[int, Field(ge=1, le=125)]
    """The exit status of all ranks; a fault never ends a run with 0."""
    hung: bool = False
    """All ranks are over their limits or wait for one that is: their stacks are written."""


_PROCESS, _BEAT, _FAULT = TypeAdapter(ProcessId), TypeAdapter(Beat), TypeAdapter(Fault)


class RankBoard:
    """The ranks' messages, as keys of the store. One thread at a time may use it."""

    def __init__(self, store: dist.Store, rank: int, size: int) -> None:
        """Tell the other ranks which process this is, and wait until each has said so.

        Raises:
            ForeignValueError: another program writes to the store.
        """
        self._store = store
        self.rank, self.size = rank, size
        self._set(f"home/{rank}", _PROCESS.dump_json(ProcessId.own()))
        self._others = {
            other: _parse(_PROCESS, f"home/{other}", store.get(f"home/{other}"))
            for other in range(size)
            if other != rank
        }

    def beat(self, beat: Beat) -> None:
        """Publish this rank's sign of life."""
        self._set(f"beat/{self.rank}", _BEAT.dump_json(beat))

    def beat_of(self, rank: int) -> Beat | None:
        """A rank's last sign of life; None before its first."""
        return self._get(_BEAT, f"beat/{rank}")

    def report(self, fault: Fault) -> Fault:
        """Tell all ranks of a fault; returns the one that counts, the first any rank reported."""
        value = self._store.compare_set("fault", "", _FAULT.dump_json(fault).decode())
        return _parse(_FAULT, "fault", value)

    def fault(self) -> Fault | None:
        """The fault that was reported by any rank."""
        return self._get(_FAULT, "fault")

    def end(self, rank: int | None = None) -> None:
        """Say that this rank, or a lost one, needs nothing more from the others."""
        self._set(f"end/{self.rank if rank is None else rank}", b"true")

    def has_ended(self, rank: int) -> bool:
        """Whether `end` was called for `rank`."""
        return self._store.check([f"end/{rank}"])

    def dead_neighbour(self) -> tuple[int, int] | None:
        """Rank and pid of a process on this machine that died before it called `end`."""
        for rank, process in self._others.items():
            # None: the rank is on another machine, where its process cannot be seen.
            if process.is_running() is False and not self._said_end(rank):
                return rank, process.pid
        return None

    def _said_end(self, rank: int) -> bool:
        try:
            return self.has_ended(rank)
        except RuntimeError:  # the store was in the process that died
            return False

    def _set(self, key: str, value: bytes) -> None:
        self._store.set(key, value.decode())

    def _get(self, kind: TypeAdapter[Value], key: str) -> Value | None:
        return _parse(kind, key, self._store.get(key)) if self._store.check([key]) else None


def _parse(kind: TypeAdapter[Value], key: str, value: bytes) -> Value:
    try:
        return kind.validate_json(value)
    except ValidationError as error:
        raise ForeignValueError(
            f"the ranks' store has {value[:100]!r} under {key!r}, which no rank of this run wrote "
            f"({error.errors()[0]['msg']}): another program connects to it; start all ranks on a "
            "network of their own"
        ) from None


def _machine() -> str | None:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        namespace = os.stat("/proc/self/ns/pid").st_ino
    except OSError:
        return None
    return f"{socket.gethostname()}/{boot}/{namespace}"


def _stat(pid: int) -> tuple[str, int] | None:
    """State and start ticks."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except OSError:
        return None
    # The second field, the program's name in parentheses, may hold spaces and parentheses.
    fields = text.rpartition(")")[2].split()
    return fields[_STATE - 3], int(fields[_START_TICKS - 3])
