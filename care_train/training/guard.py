"""A thread beside the run: it ends one that hangs, and one that lost a rank, and says why."""

import faulthandler
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Self

import torch

from care_train.config import LimitSettings
from care_train.distributed import all_max, initialize_process_group, is_main, ranks_store
from care_train.training.failures import (
    HUNG_STATUS,
    RANK_LOST_STATUS,
    EngineError,
    RankLostError,
    RunError,
    Stopped,
    resume_hint,
    status_of,
)
from care_train.training.processes import end_at_once
from care_train.training.ranks import Beat, Fault, RankBoard
from care_train.training.timer import begin_step, current_place

_TICK = 1.0
"""Seconds between two looks."""
_GRACE = 5.0
"""Seconds that the main thread has to end the run itself, with a message of its own."""
_ANSWER = 10.0
"""Seconds in which the other ranks learn of a failure, or tell this one of theirs."""
_SAME_REQUEST = 1.0
"""Seconds within which signals count as one: a launcher may pass on what the terminal also sent."""


class StopSignals:
    """Notes SIGTERM and SIGINT while the `with` block runs; ranks ask together."""

    def __init__(self) -> None:
        self._first = 0
        self._time = 0.0
        self._before: dict[int, Any] = {}

    def requested(self, device: torch.device) -> int:
        """The signal that any rank received, or 0; every rank must ask at the same point."""
        return all_max(self._first, device)

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, _: FrameType | None) -> None:
        now = time.monotonic()
        if self._first and now - self._time > _SAME_REQUEST:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        elif not self._first:
            self._first, self._time = number, now
            if is_main():
                name = signal.Signals(number).name
                text = f"\n{name}: stopping after this step; once more ends the run at once\n"
                os.write(2, text.encode())


class Guard:
    """Watches while its `with` block runs.

    Within the block, an error of this rank ends all ranks with its message, and an error that only
    says that another rank is gone is replaced by what happened there.
    """

    def __init__(self, limits: LimitSettings, run_dir: Path, board: RankBoard | None) -> None:
        """Ready to watch.

        Args:
            limits: how long things may take.
            run_dir: the run's folder; stacks go to `stacks/` there.
            board: where ranks meet; None for a run of one.
        """
        self._limits, self._run_dir, self._board = limits, run_dir, board
        positive = [v for v in vars(limits).values() if v > 0]
        self._tick = min([_TICK, *(value / 4 for value in positive)])
        self._leaving = threading.Event()
        self._found = threading.Event()
        self._fault: Fault | None = None
        self._number = 0
        self._handler: Any = None
        self._heard: dict[int, tuple[int, float]] = {}
        self._last: dict[int, Beat] = {}
        self._thread = threading.Thread(target=self._watch, name="care-guard", daemon=True)

    def __enter__(self) -> Self:
        if self._board is not None and threading.current_thread() is threading.main_thread():
            self._handler = signal.signal(signal.SIGTERM, self._on_signal)
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        is_vague = isinstance(error, (RuntimeError, EngineError))
        if is_vague and self._board is not None:
            # Perhaps it only says that another rank is gone: which one, the thread knows soon.
            self._found.wait(_ANSWER)
        self._leaving.set()
        self._thread.join()
        if self._handler is not None:
            signal.signal(signal.SIGTERM, self._handler)
        faulthandler.cancel_dump_traceback_later()
        if self._board is None:
            return
        if error is None or isinstance(error, Stopped):
            self._end_together(self._board)
        elif is_vague and self._fault is not None:
            self._leave_last()
            raise _as_error(self._fault) from error
        else:
            self._tell(self._board, error)

    def _on_signal(self, number: int, _: FrameType | None) -> None:
        """A launcher sends it where a rank died: then the cause is known in a moment."""
        if not self._found.wait(3 * _TICK):
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    def _watch(self) -> None:
        while not self._leaving.is_set():
            if self._limits.rank > 0:
                # A thread of C: code that never gives the interpreter back stops this one too. To
                # standard error itself: what stands in for it in a notebook may have no file.
                faulthandler.dump_traceback_later(self._limits.rank, exit=True, file=2)
            fault = self._look()
            if fault is not None:
                self._end(fault)
                return
            self._leaving.wait(self._tick)

    def _look(self) -> Fault | None:
        own = self._own_beat()
        if self._board is None:
            return self._hang([own])
        board = self._board
        if dead := board.dead_neighbour():
            return self._report(self._death(board, *dead))
        try:
            board.beat(own)
            if fault := board.fault():
                return fault
            beats = board.beats() if board.rank == 0 else [board.beat_of(0)]
            self._last = {rank: beat for rank, beat in enumerate(beats) if beat is not None}
        except RuntimeError as error:
            return self._without_store(board, error)
        silent = self._silence(beats)
        # One rank decides, so that all say the same.
        hang = self._hang(beats) if board.rank == 0 and silent is None else None
        fault = silent or hang
        return None if fault is None else self._report(fault)

    def _without_store(self, board: RankBoard, error: RuntimeError) -> Fault:
        """The store is rank 0's or its launcher's."""
        for _ in range(20):  # a process that was killed takes a moment to be seen as dead
            if dead := board.dead_neighbour():
                return self._death(board, *dead)
            time.sleep(0.1)
        reason = str(error).splitlines()[0]
        return self._lost(0, f"the ranks' store does not answer any more ({reason})")

    def _own_beat(self) -> Beat:
        self._number += 1
        place = current_place()
        seconds = time.monotonic() - place.since
        limit = self._limit(place.phase)
        return Beat(self._number, place.phase, place.step, seconds, 0 < limit < seconds)

    def _limit(self, phase: str) -> float:
        return getattr(self._limits, phase)

    def _hang(self, beats: list[Beat | None]) -> Fault | None:
        """A hang, where every rank is over its limit or waits in the phase of one that is."""
        over = {beat.phase for beat in beats if beat is not None and beat.over}
        if not over or not all(b is not None and (b.over or b.phase in over) for b in beats):
            return None
        lines = []
        for rank, beat in enumerate(beats):
            assert beat is not None
            limit = f" (limits.{beat.phase} = {self._limit(beat.phase):g})" if beat.over else ""
            lines.append(f"rank {rank} has been in {beat}{limit}")
        first = next(rank for rank, beat in enumerate(beats) if beat is not None and beat.over)
        names = ", ".join(f"limits.{name}" for name in sorted(over))
        message = (
            f"{'; '.join(lines)}: taken for hung; the stacks of all threads are in "
            f"{self._run_dir / 'stacks'}; raise {names} where this is no hang; "
            f"{resume_hint(self._run_dir)}"
        )
        return Fault(first, message, HUNG_STATUS, hung=True)

    def _silence(self, beats: list[Beat | None]) -> Fault | None:
        """A rank whose sign of life stays the same for too long."""
        now = time.monotonic()
        for rank, beat in enumerate(beats):
            number = 0 if beat is None else beat.number
            last, since = self._heard.setdefault(rank, (number, now))
            if last != number:
                self._heard[rank] = (number, now)
            elif 0 < self._limits.rank < now - since:
                where = "" if beat is None else f"; it was in {beat}"
                text = f"no sign of life for limits.rank = {self._limits.rank:g} s{where}"
                return self._lost(rank, text)
        return None

    def _death(self, board: RankBoard, rank: int, pid: int) -> Fault:
        try:
            beat = board.beat_of(rank)
        except RuntimeError:  # the store went with it
            beat = self._last.get(rank)
        where = "" if beat is None else f" in {beat}"
        text = f"its process {pid} died{where} (the kernel's log says whether memory ran out)"
        return self._lost(rank, text)

    def _lost(self, rank: int, text: str) -> Fault:
        # The lost rank's last sign of life may be of an earlier step, or there may be none.
        assert self._board is not None
        place = f"meanwhile rank {self._board.rank} was in {self._own_beat()}"
        message = f"{text}; {place}; {resume_hint(self._run_dir)}"
        return Fault(rank, message, RANK_LOST_STATUS)

    def _report(self, fault: Fault) -> Fault:
        assert self._board is not None
        try:
            if fault.status == RANK_LOST_STATUS:
                self._board.end(fault.rank)  # it cannot say so itself
            return self._board.report(fault)
        except RuntimeError:  # nobody hears it any more; they find out themselves
            return fault

    def _end(self, fault: Fault) -> None:
        """End this process, unless the main thread does so itself."""
        if fault.hung:
            self._dump_stacks()
        self._fault = fault
        self._acknowledge()
        self._found.set()
        # Where it hangs there is nothing to wait for.
        if not fault.hung and self._leaving.wait(_GRACE):
            return
        rank = 0 if self._board is None else self._board.rank
        # One rank speaks; the failed one has, or cannot.
        if rank == (1 if fault.rank == 0 and not fault.hung else 0):
            print(f"\ncare-train: error: {_as_error(fault)}", file=sys.stderr, flush=True)
        self._leave_last()
        end_at_once(fault.status)

    def _acknowledge(self) -> None:
        if self._board is not None:
            try:
                self._board.end()
            except RuntimeError:  # rank 0 is gone
                return

    def _leave_last(self) -> None:
        """Rank 0 keeps the store until the others know the cause."""
        if self._board is not None and self._board.rank == 0:
            self._await_others(self._board, _ANSWER)

    def _dump_stacks(self) -> None:
        rank = 0 if self._board is None else self._board.rank
        folder = self._run_dir / "stacks"
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / f"rank_{rank:05d}.txt").open("w") as file:
            faulthandler.dump_traceback(file)

    def _tell(self, board: RankBoard, error: BaseException) -> None:
        """Let the other ranks end with this one's error, before it leaves."""
        text = str(error) or type(error).__name__
        try:
            board.report(Fault(board.rank, text, status_of(error)))
            board.end()
            self._await_others(board, _ANSWER)
        except RuntimeError:  # they are gone already
            return

    def _end_together(self, board: RankBoard) -> None:
        """Rank 0 leaves last: the store may be its own."""
        try:
            board.end()
            if board.rank == 0 and (lost := self._await_others(board, self._limits.rank or None)):
                raise _as_error(lost)
        except RuntimeError:  # rank 0 is through, or gone without anything left to do
            return

    def _await_others(self, board: RankBoard, seconds: float | None) -> Fault | None:
        """Wait until all ranks have ended; the fault that one of them ends with instead."""
        end = None if seconds is None else time.monotonic() + seconds
        while end is None or time.monotonic() < end:
            if all(board.has_ended(rank) for rank in range(board.size)):
                return None
            if dead := board.dead_neighbour():
                return self._report(self._death(board, *dead))
            time.sleep(0.05)
        return None


def _as_error(fault: Fault) -> RunError:
    verb = "" if fault.hung else f"rank {fault.rank}: "
    error = RankLostError(f"{verb}{fault.message}")
    error.status = fault.status
    return error


@contextmanager
def guarded(limits: LimitSettings, run_dir: Path) -> Iterator[None]:
    """Join the process group, and watch over what is done in the `with` block.

    Raises:
        RankLostError: another rank failed, died or fell silent.
        ValueError: not all ranks came.
    """
    initialize_process_group(limits.start, limits.collective)
    begin_step(None)
    store = ranks_store()
    board = None if store is None else RankBoard(*store)
    with Guard(limits, run_dir, board):
        yield
