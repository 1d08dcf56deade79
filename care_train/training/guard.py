"""Ends a run that hangs, lost a rank or was asked to stop, with a message that says why.

A thread of every rank publishes once a second what its rank is doing (`ranks.RankBoard`) and looks
for three kinds of faults: another rank reported an error; a rank's process died or fell silent;
every rank is over the time limit of what it does, or waits for a rank that is. Then all ranks end
with the same message and exit status.
"""

import faulthandler
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, Self

import torch

from care_train.config import LimitSettings
from care_train.distributed import (
    all_max,
    initialize_process_group,
    is_main,
    leave_at_exit,
    rank,
    ranks_store,
    world_size,
)
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
from care_train.training.ranks import Beat, Fault, ForeignValueError, RankBoard, end_at_once
from care_train.training.timer import BOUNDED_PARTS, begin_step, current_place

_OTHER_LIMIT = 3600.0
"""Seconds for loading, a weight sync or a checkpoint where `limits.step` is less."""
_TICK = 1.0
"""Seconds between two looks at the other ranks."""
_GRACE = 5.0
"""Seconds that the main thread has to end the run itself once another rank has failed."""
_ANSWER = 10.0
"""Seconds in which the other ranks must learn of a failure, or report theirs."""
_SAME_REQUEST = 1.0
"""Seconds in which signals count as one: a launcher may pass on what the terminal also sent."""


class StopSignals:
    """Notes SIGTERM and SIGINT while its `with` block runs; a second signal ends the process, or
    where that is a program's (a notebook's), does what signals do there."""

    def __init__(self, *, in_program: bool = False) -> None:
        self._in_program = in_program
        self._first = 0
        self._time = 0.0
        self._before: dict[int, Any] = {}

    def requested(self, device: torch.device) -> int:
        """The signal that any rank received, or 0; a collective of all ranks."""
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
            signal.signal(number, self._before[number] if self._in_program else signal.SIG_DFL)
            os.kill(os.getpid(), number)
        elif not self._first:
            self._first, self._time = number, now
            if is_main():
                name = signal.Signals(number).name
                text = f"\n{name}: stopping after this step; once more ends the run at once\n"
                os.write(2, text.encode())


class Guard:
    """Watches while its `with` block runs.

    An error that leaves the block is reported to the other ranks, which end with its message. Where
    it is only the consequence of another rank's end (a broken connection, say), that rank's fault
    is raised instead.
    """

    def __init__(self, limits: LimitSettings, run_dir: Path, board: RankBoard) -> None:
        """Ready to watch, with the seconds that each part of a step may take; stacks of a hang are
        written to `stacks/` in `run_dir`."""
        self._limits, self._run_dir, self._board = limits, run_dir, board
        self._tick = min(_TICK, *(value / 4 or _TICK for value in (limits.step, limits.rank)))
        self._leaving = threading.Event()
        self._found = threading.Event()
        self._fault: Fault | None = None
        self._number = 0
        self._handler: Any = None
        self._heard = (0, time.monotonic())
        """The next rank's last number, and since when it is that one."""
        self._thread = threading.Thread(target=self._watch, name="care-guard", daemon=True)

    def __enter__(self) -> Self:
        if self._board.size > 1 and threading.current_thread() is threading.main_thread():
            self._handler = signal.signal(signal.SIGTERM, self._on_signal)
        self._thread.start()
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        may_be_consequence = self._board.size > 1 and isinstance(error, RuntimeError | EngineError)
        if may_be_consequence:
            self._found.wait(_ANSWER)
        self._leaving.set()
        self._thread.join()
        if self._handler is not None:
            signal.signal(signal.SIGTERM, self._handler)
        faulthandler.cancel_dump_traceback_later()
        is_first = self._board.rank == 0
        if error is None or isinstance(error, Stopped):
            self._call_end()
            # Rank 0 leaves last: the store may be in its process.
            if is_first and (lost := self._await_others(self._limits.rank or None)):
                raise _as_error(lost)
        elif may_be_consequence and self._fault is not None:
            self._await_others(_ANSWER if is_first else 0)
            raise _as_error(self._fault) from error
        else:
            text = str(error) or type(error).__name__
            self._report(Fault(self._board.rank, text, status_of(error)))
            self._call_end()
            # A launcher kills the other ranks when the first one leaves.
            self._await_others(_ANSWER)

    def _on_signal(self, number: int, _: FrameType | None) -> None:
        """A launcher sends SIGTERM when a rank died: wait until the thread knows which."""
        if not self._found.wait(3 * _TICK):
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    def _watch(self) -> None:
        while not self._leaving.is_set():
            self._end_without_sign(self._limits.rank)
            if (fault := self._look()) is not None:
                self._end_without_sign(self._limits.rank + _GRACE + _ANSWER)
                self._end(fault)
                return
            self._leaving.wait(self._tick)

    def _end_without_sign(self, seconds: float) -> None:
        """End the process unless this thread calls again before so many seconds have gone.

        A thread of C does, for code that never releases the interpreter's lock and so stops this
        thread too.
        """
        if self._limits.rank > 0:
            # File descriptor 2: a notebook's sys.stderr has none.
            faulthandler.dump_traceback_later(seconds, exit=True, file=2)

    def _look(self) -> Fault | None:
        """What ends the run, if anything does."""
        board, own = self._board, self._own_beat()
        try:
            if dead := board.dead_neighbour():
                return self._report(self._death(*dead))
            board.beat(own)
            fault = board.fault() or self._silence()
            if fault is None and own.over:
                fault = self._hang([board.beat_of(rank) for rank in range(board.size)])
            return None if fault is None else self._report(fault)
        except ForeignValueError as error:
            return Fault(board.rank, str(error), RANK_LOST_STATUS)
        except RuntimeError as error:
            return self._store_lost(error)

    def _own_beat(self) -> Beat:
        self._number += 1
        place = current_place()
        seconds, limit = time.monotonic() - place.since, self._limit(place.part)
        return Beat(self._number, place.part, place.step, seconds, 0 < limit < seconds)

    def _limit(self, part: str) -> float:
        step = self._limits.step
        return step if part in BOUNDED_PARTS or not step else max(step, _OTHER_LIMIT)

    def _hang(self, beats: Sequence[Beat | None]) -> Fault | None:
        """A hang: every rank is over its limit, or waits in the part of a step where one is."""
        late = {beat.part for beat in beats if beat is not None and beat.over}
        lines = []
        for place, beat in enumerate(beats):
            if beat is None or beat.part not in late:
                return None
            limit, step = self._limit(beat.part), self._limits.step
            over = f" (limit {limit:g} s, limits.step = {step:g})" if beat.over else ""
            lines.append(f"rank {place} has been in {beat}{over}")
        message = (
            f"{'; '.join(lines)}: taken for hung; the stacks of all threads are in "
            f"{self._run_dir / 'stacks'}; raise limits.step where this is no hang; "
            f"{resume_hint(self._run_dir)}"
        )
        return Fault(self._board.rank, message, HUNG_STATUS, hung=True)

    def _silence(self) -> Fault | None:
        """The next rank, where its sign of life stays the same for longer than `limits.rank`."""
        rank = (self._board.rank + 1) % self._board.size
        beat = None if rank == self._board.rank else self._board.beat_of(rank)
        number, now = 0 if beat is None else beat.number, time.monotonic()
        if number != self._heard[0] or rank == self._board.rank:
            self._heard = (number, now)
        if not 0 < self._limits.rank < now - self._heard[1] or self._board.has_ended(rank):
            return None
        where = "" if beat is None else f"; it was in {beat}"
        return self._lost(rank, f"no sign of life for limits.rank = {self._limits.rank:g} s{where}")

    def _death(self, rank: int, pid: int) -> Fault:
        try:
            beat = self._board.beat_of(rank)
        except RuntimeError:  # the store was in the process that died
            beat = None
        where = "" if beat is None else f" in {beat}"
        text = f"its process {pid} died{where} (the kernel's log says whether memory ran out)"
        return self._lost(rank, text)

    def _store_lost(self, error: RuntimeError) -> Fault:
        """The store does not answer: rank 0 or the launcher, which has it, is gone."""
        for _ in range(20):  # it takes a moment until a killed process is seen as dead
            if dead := self._board.dead_neighbour():
                return self._death(*dead)
            time.sleep(0.1)
        reason = str(error).splitlines()[0]
        return self._lost(0, f"the ranks' store does not answer any more ({reason})")

    def _lost(self, rank: int, text: str) -> Fault:
        # The lost rank's last sign of life may be of an earlier step, or there may be none.
        place = f"meanwhile rank {self._board.rank} was in {self._own_beat()}"
        message = f"{text}; {place}; {resume_hint(self._run_dir)}"
        return Fault(rank, message, RANK_LOST_STATUS)

    def _report(self, fault: Fault) -> Fault:
        """Tell the other ranks; the fault that counts is the first that any rank reported."""
        try:
            if fault.status == RANK_LOST_STATUS:
                self._board.end(fault.rank)  # it cannot do so itself
            return self._board.report(fault)
        except RuntimeError:  # the store is gone: the others find out themselves
            return fault

    def _end(self, fault: Fault) -> None:
        """End this process, unless the main thread does so itself."""
        if fault.hung:
            folder = self._run_dir / "stacks"
            folder.mkdir(parents=True, exist_ok=True)
            with (folder / f"rank_{self._board.rank:05d}.txt").open("w") as file:
                faulthandler.dump_traceback(file)
        self._fault = fault
        self._call_end()
        self._found.set()
        if not fault.hung and self._leaving.wait(_GRACE):
            return
        # Rank 0 prints the message, or rank 1 where rank 0 is the one that failed.
        speaker = 1 if fault.rank == 0 and not fault.hung else 0
        found_alone = fault.rank == self._board.rank and not fault.hung
        if found_alone or self._board.rank == speaker:
            print(f"\ncare-train: error: {_as_error(fault)}", file=sys.stderr, flush=True)
        self._await_others(_ANSWER if self._board.rank == 0 else 0)
        end_at_once(fault.status)

    def _call_end(self) -> None:
        try:
            self._board.end()
        except RuntimeError:  # rank 0 has left: it needs nothing more from this one
            return

    def _await_others(self, seconds: float | None) -> Fault | None:
        """Wait until all ranks have called `end`; a fault where one of them dies instead."""
        end = None if seconds is None else time.monotonic() + seconds
        try:
            while end is None or time.monotonic() < end:
                if all(self._board.has_ended(rank) for rank in range(self._board.size)):
                    return None
                if dead := self._board.dead_neighbour():
                    return self._report(self._death(*dead))
                time.sleep(0.05)
        except RuntimeError:  # the store has gone with rank 0
            pass
        return None


def _as_error(fault: Fault) -> RunError:
    prefix = "" if fault.hung else f"rank {fault.rank}: "
    error = RankLostError(f"{prefix}{fault.message}")
    error.status = fault.status
    return error


@contextmanager
def guarded(limits: LimitSettings, run_dir: Path, *, in_program: bool = False) -> Iterator[None]:
    """Join the process group, and watch over what is done in the `with` block.

    Where the process is a program's (`in_program`), which the guard must not end, it watches over
    several ranks alone: there the others would wait for ever.

    Raises:
        RankLostError: another rank failed, died or fell silent.
        ValueError: not all ranks came.
    """
    initialize_process_group(limits.collective)
    if in_program:
        leave_at_exit()  # not before: the program's next run uses the group too
    begin_step(None)
    if in_program and world_size() == 1:
        yield
        return
    try:
        board = RankBoard(ranks_store(), rank(), world_size())
    except ForeignValueError as error:
        raise RankLostError(str(error)) from None
    with Guard(limits, run_dir, board):
        yield
    leave_at_exit()  # not after an error: other ranks may not answer
