"""Worker processes with a hard time limit, killed and replaced."""

import atexit
import json
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict
from multiprocessing.connection import wait

from care_train.verifier.child import Child
from care_train.verifier.messages import TAKEN
from care_train.verifier.types import AnswerType, Item, Verdict

_START_SECONDS = 120.0
_MAX_FAILED_STARTS = 3


class _Worker(Child):
    """A process and the item it is at."""

    def __init__(self) -> None:
        super().__init__("care_train.verifier.worker", {"CUDA_VISIBLE_DEVICES": ""}, is_silent=True)
        self.ready = False
        self.index: int | None = None
        self.has_taken = False
        self.started = 0.0
        self.deadline = time.monotonic() + _START_SECONDS

    def send(self, index: int, item: Item, timeout: float) -> bool:
        """Give it an item; False where the process is gone."""
        message = json.dumps(asdict(item) | {"timeout": timeout}).encode()
        try:
            self.requests.send_bytes(message)
        except OSError:
            return False
        self.index, self.deadline = index, time.monotonic() + timeout
        self.has_taken = False
        self.started = time.monotonic()
        return True


class WorkerPool:
    """Runs comparisons that need symbolic algebra; each has `timeout` seconds.

    Workers start when first needed. One that hangs or dies costs its own verdict alone and is
    replaced. They end with `close`, with the interpreter, and when the parent dies.
    """

    def __init__(self, workers: int = 2, timeout: float = 5.0) -> None:
        self._size = workers
        self._timeout = timeout
        self._workers: list[_Worker] = []
        self._lock = threading.Lock()
        self._failed_starts = 0
        self.timeouts = 0
        self.crashes = 0
        self.longest = 0.0
        """Seconds from an item's start to its verdict, at most."""
        atexit.register(self.close)

    @property
    def pids(self) -> list[int]:
        """The processes running now."""
        return [worker.pid for worker in self._workers]

    def run(self, items: Sequence[Item]) -> list[Verdict]:
        """A verdict per item, in order; `timeout` and `crashed` are reasons of wrong ones.

        Raises:
            ValueError: no worker can be started.
        """
        with self._lock:
            verdicts: dict[int, Verdict] = {}
            pending = deque(range(len(items)))
            try:
                while len(verdicts) < len(items):
                    self._assign(pending, items)
                    self._collect(pending, verdicts)
            finally:
                # After an interrupt, a late reply must not answer the next batch.
                for worker in [w for w in self._workers if w.index is not None]:
                    self._remove(worker)
            return [verdicts[index] for index in range(len(items))]

    def close(self) -> None:
        """End all workers."""
        for worker in list(self._workers):
            self._remove(worker)

    def _assign(self, pending: deque[int], items: Sequence[Item]) -> None:
        busy = sum(worker.index is not None for worker in self._workers)
        while len(self._workers) < min(self._size, busy + len(pending)):
            self._workers.append(_Worker())
        for worker in [w for w in self._workers if w.ready and w.index is None]:
            if pending:
                if worker.send(pending[0], items[pending[0]], self._timeout):
                    pending.popleft()
                else:
                    self._remove(worker)

    def _collect(self, pending: deque[int], verdicts: dict[int, Verdict]) -> None:
        waited = [
            worker for worker in self._workers if worker.index is not None or not worker.ready
        ]
        if not waited:
            return
        first = min(worker.deadline for worker in waited)
        ready = wait([w.replies for w in waited], max(0.0, first - time.monotonic()))
        for worker in waited:
            if worker.replies in ready:
                self._receive(worker, pending, verdicts)
            elif time.monotonic() >= worker.deadline:
                self._end(worker, verdicts, f"timeout: over {self._timeout:g} s")

    def _receive(self, worker: _Worker, pending: deque[int], verdicts: dict[int, Verdict]) -> None:
        try:
            message = worker.replies.recv_bytes()
        except (EOFError, OSError):
            if worker.index is not None and not worker.has_taken:
                # It died before it read the item, which another worker gets.
                self._remove(worker)
                pending.appendleft(worker.index)
                return
            self._end(worker, verdicts, "crashed: the comparison ended its process")
            return
        if worker.index is None:
            worker.ready = True
            self._failed_starts = 0
            return
        if message == TAKEN:
            worker.has_taken = True
            return
        self._record_time(worker)
        reply = json.loads(message)
        kind = reply["answer_type"]
        verdicts[worker.index] = Verdict(
            reply["accuracy"], reply["reason"], AnswerType(kind) if kind else None
        )
        worker.index = None

    def _end(self, worker: _Worker, verdicts: dict[int, Verdict], reason: str) -> None:
        self._remove(worker)
        if worker.index is None:
            self._failed_starts += 1
            if self._failed_starts < _MAX_FAILED_STARTS:
                return
            raise ValueError(
                "reward: no worker process for symbolic answers: got none that starts, wanted "
                f"one from `{sys.executable} -m care_train.verifier.worker`: run it to see why"
            )
        self._record_time(worker)
        verdicts[worker.index] = Verdict(0.0, reason)
        self.timeouts += reason.startswith("timeout")
        self.crashes += reason.startswith("crashed")

    def _record_time(self, worker: _Worker) -> None:
        self.longest = max(self.longest, time.monotonic() - worker.started)

    def _remove(self, worker: _Worker) -> None:
        self._workers.remove(worker)
        worker.kill()


_POOLS: dict[tuple[int, int, float], WorkerPool] = {}


def shared_pool(workers: int = 2, timeout: float = 5.0) -> WorkerPool:
    """This process's pool with these limits; a forked child has its own."""
    key = (os.getpid(), workers, timeout)
    if key not in _POOLS:
        _POOLS[key] = WorkerPool(workers, timeout)
    return _POOLS[key]
