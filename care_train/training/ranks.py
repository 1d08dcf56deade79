"""What the ranks of a run tell each other beside collectives: where they are, and what failed.

It goes through the process group's store, which answers when collectives hang.
"""

import json
from dataclasses import asdict, dataclass
from typing import Any

import torch.distributed as dist

from care_train.training.processes import ProcessId


@dataclass(frozen=True)
class Beat:
    """A rank's sign of life."""

    number: int
    """Grows; one that stays tells of a rank that is gone."""
    phase: str
    step: int | None
    seconds: float
    """How long it has been in the phase."""
    over: bool
    """Over the phase's limit."""

    def __str__(self) -> str:
        step = "" if self.step is None else f" of step {self.step}"
        return f"{self.phase}{step} for {self.seconds:.0f} s"


@dataclass(frozen=True)
class Fault:
    """Why a run ends."""

    rank: int
    """Whose fault it is."""
    message: str
    status: int
    """The exit status of all ranks."""
    hung: bool = False
    """Stacks tell where."""


class RankBoard:
    """Keys in the store; one thread at a time may use it."""

    def __init__(self, store: dist.Store, rank: int, size: int) -> None:
        """Tell the others where this process runs, and learn it of them.

        Args:
            store: the process group's.
            rank: this one.
            size: how many there are.
        """
        self._store = store
        self.rank, self.size = rank, size
        self._set(f"home/{rank}", asdict(ProcessId.own()))
        homes = [json.loads(self._store.get(f"home/{other}")) for other in range(size)]
        self._others = {
            other: ProcessId(**home) for other, home in enumerate(homes) if other != rank
        }

    def beat(self, beat: Beat) -> None:
        """Leave this rank's sign of life."""
        self._set(f"beat/{self.rank}", asdict(beat))

    def beats(self) -> list[Beat | None]:
        """Each rank's last sign of life; None before its first."""
        return [self.beat_of(rank) for rank in range(self.size)]

    def beat_of(self, rank: int) -> Beat | None:
        """One rank's last sign of life."""
        values = self._get(f"beat/{rank}")
        return None if values is None else Beat(**values)

    def report(self, fault: Fault) -> Fault:
        """Tell all ranks; returns what counts: the first that was told."""
        value = self._store.compare_set("fault", "", json.dumps(asdict(fault)))
        return Fault(**json.loads(value))

    def fault(self) -> Fault | None:
        """What was reported, by any rank."""
        values = self._get("fault")
        return None if values is None else Fault(**values)

    def end(self, rank: int | None = None) -> None:
        """This rank, or a lost one, has nothing more to do with the others."""
        self._set(f"end/{self.rank if rank is None else rank}", True)

    def has_ended(self, rank: int) -> bool:
        """Whether `end` was said there."""
        return self._store.check([f"end/{rank}"])

    def dead_neighbour(self) -> tuple[int, int] | None:
        """Rank and process id of a rank of this machine that died without an `end`."""
        for rank, process in self._others.items():
            # None for a rank on another machine: nothing is known of it here.
            if process.is_running() is False and not self._said_end(rank):
                return rank, process.pid
        return None

    def _said_end(self, rank: int) -> bool:
        try:
            return self.has_ended(rank)
        except RuntimeError:  # the store went with it
            return False

    def _set(self, key: str, value: Any) -> None:
        self._store.set(key, json.dumps(value))

    def _get(self, key: str) -> Any:
        return json.loads(self._store.get(key)) if self._store.check([key]) else None
