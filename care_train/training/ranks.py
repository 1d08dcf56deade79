"""What the ranks of a run tell each other beside collectives: where they are, and what failed.

It goes through the process group's store, which still answers when a collective hangs. Any program
that can connect to the store can write there, so everything that is read is checked first.
"""

from dataclasses import dataclass
from typing import Annotated, TypeVar

import torch.distributed as dist
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from care_train.training.processes import ProcessId
from care_train.training.timer import PARTS

Value = TypeVar("Value")

_STRICT = ConfigDict(extra="forbid", strict=True)


class ForeignValueError(RuntimeError):
    """The store holds a value that no rank of this run wrote."""


@dataclass(frozen=True)
class Beat:
    """A rank's sign of life."""

    __pydantic_config__ = _STRICT

    number: int
    """Counts up; a rank whose number stays the same is dead, stopped or cut off."""
    part: str
    """A key of `timer.PARTS`."""
    step: int | None
    seconds: float
    """How long the rank has been in the part."""
    over: bool
    """Whether that is longer than the part's limit."""

    def __post_init__(self) -> None:
        if self.part not in PARTS:
            raise ValueError(f"part: got {self.part!r}, wanted one of {', '.join(PARTS)}")

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


_PROCESS = TypeAdapter(ProcessId)
_BEAT, _FAULT = TypeAdapter(Beat), TypeAdapter(Fault)


class RankBoard:
    """The ranks' messages, as keys of the store. One thread at a time may use it."""

    def __init__(self, store: dist.Store, rank: int, size: int) -> None:
        """Tell the other ranks which process this is, and wait until each of them has said so.

        Args:
            store: the process group's.
            rank: this process's.
            size: how many ranks there are.

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
        """Tell all ranks of a fault.

        Returns:
            The fault that counts: the first one that any rank reported.
        """
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
