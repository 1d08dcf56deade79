"""Functions that run in processes of their own, which are killed when they take too long."""

import atexit
import json
import os
import pickle
import queue
import resource
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Generic, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

_AHEAD = 2
"""Items per process that a pool has taken from its input before their results are asked for."""
_START_SECONDS = 300.0
"""Until the function can be called: for its imports."""
_PARENT_CHECK_SECONDS = 1.0
# A child reads its import path from its arguments, so it imports nothing from the working folder.
_BOOT = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from care_train.killable import serve; serve(int(sys.argv[2]), int(sys.argv[3]))"
)


@dataclass(frozen=True)
class Lost:
    """Why a call has no result."""

    reason: str
    """For people: `got nothing in 5 s`, `got the end of its process`, or the exception's text."""
    is_timeout: bool = False
    """Killed because its time was over."""
    error: Exception | None = None
    """What the function raised; its process goes on."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a process may use. Without values: as much as its parent."""

    seconds: float | None = None
    """Wall-clock seconds for one call."""
    cpu_seconds: float | None = None
    """Processor seconds for one call: unlike wall-clock time, independent of the machine's load.
    Enforced by the kernel, even where the parent can no longer kill the process."""
    memory_bytes: int | None = None
    """Address space."""
    environment: Mapping[str, str] = field(default_factory=dict)
    """Variables laid over the parent's."""
    is_silent: bool = False
    """Throw away what is printed once the function has started."""


class Worker(Generic[Item, Result]):
    """A function in a process of its own, which keeps its state from one call to the next.

    The process is started afresh: it inherits no memory, threads or CUDA context, imports neither
    the parent's script nor anything from the working folder, and ends when its parent ends. After a
    call that was lost, the next call starts a new one.
    """

    def __init__(
        self, name: str, make: Callable[[], Callable[[Item], Result]], limits: Limits | None = None
    ) -> None:
        """Nothing is started yet.

        `make` is called once in the process and returns the function. It is pickled, so it must be
        importable by name.
        """
        self._name, self._make = name, make
        self._limits = limits or Limits()
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: Connection | None = None
        self._ended_by = 0
        atexit.register(self.close)

    def __call__(self, item: Item, cpu_seconds: float | None = None) -> Result | Lost:
        """The function's result, or why there is none; `cpu_seconds` in place of the limits' own.

        Raises:
            ValueError: the process cannot be started.
        """
        self.start()
        limit = cpu_seconds or self._limits.cpu_seconds
        reply = self._exchange((limit, item), self._limits.seconds)
        if isinstance(reply, Lost) and limit and self._ended_by == signal.SIGPROF:
            return Lost(f"got nothing in {limit:g} s of processor time", is_timeout=True)
        return reply

    def start(self) -> None:
        """Start the process where none is running, and wait until the function can be called.

        Raises:
            ValueError: it cannot be started.
            Exception: what `make` raised.
        """
        if self._process is not None:
            return
        self._connection, theirs = Pipe()
        path = json.dumps(_import_path())
        numbers = [str(theirs.fileno()), str(os.getpid())]
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-c", _BOOT, path, *numbers],
            stdin=subprocess.DEVNULL,
            # What a library prints must not appear among the parent's own output.
            stdout=sys.__stderr__.fileno() if sys.__stderr__ else subprocess.DEVNULL,
            env={**os.environ, **self._limits.environment},
            pass_fds=[theirs.fileno()],
            # Ctrl-C reaches the foreground group, and the parent decides what it means. A group of
            # its own is also killed as one, with the processes that the function started.
            start_new_session=True,
        )
        theirs.close()
        started = self._exchange((self._make, self._limits), _START_SECONDS)
        if isinstance(started, Lost):
            self.close()
            if started.error is not None:
                raise started.error
            raise ValueError(
                f"{self._name}: {started.reason} at its start, wanted a running process: the lines "
                "above say why"
            )

    def close(self) -> None:
        """Kill the process and those it started, and wait until it is gone."""
        process, self._process = self._process, None
        if process is None:
            return
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        self._ended_by = -process.wait()
        if self._connection is not None:
            self._connection.close()

    @property
    def pid(self) -> int | None:
        """The running process."""
        return None if self._process is None else self._process.pid

    def _exchange(self, message: Any, seconds: float | None) -> Any:
        assert self._connection is not None
        try:
            self._connection.send_bytes(pickle.dumps(message))
            if not self._connection.poll(seconds):
                self.close()
                return Lost(f"got nothing in {seconds:g} s", is_timeout=True)
            # From our own child, which runs this package's code or the user's own function.
            return pickle.loads(self._connection.recv_bytes())  # nosec B301
        except (EOFError, OSError):
            self.close()
            return Lost("got the end of its process")


class Pool(Generic[Item, Result]):
    """Several workers of one function; each process starts when it is first needed."""

    def __init__(
        self,
        name: str,
        make: Callable[[], Callable[[Item], Result]],
        size: int,
        limits: Limits | None = None,
    ) -> None:
        self._workers = [Worker[Item, Result](name, make, limits) for _ in range(size)]
        # Last in, first out: few items start few processes.
        self._idle: queue.LifoQueue[Worker[Item, Result]] = queue.LifoQueue()
        for worker in self._workers:
            self._idle.put(worker)
        self._threads = ThreadPoolExecutor(size)
        self.longest = 0.0
        """Wall-clock seconds of the longest call."""

    @property
    def pids(self) -> list[int]:
        """The running processes."""
        return [worker.pid for worker in self._workers if worker.pid is not None]

    def map(
        self, items: Iterable[Item], cpu_seconds: Callable[[], float] | None = None
    ) -> Iterator[tuple[Item, Result | Lost]]:
        """Each item with its result or why it has none, in order.

        Args:
            items: read as results are taken, at most two per process ahead.
            cpu_seconds: asked when an item's turn comes, in place of the limits' own.

        Raises:
            ValueError: a process cannot be started.
        """
        waiting: deque[tuple[Item, Future[Result | Lost]]] = deque()
        rest = iter(items)
        try:
            while True:
                for item in islice(rest, _AHEAD * len(self._workers) - len(waiting)):
                    waiting.append((item, self._threads.submit(self._call, item, cpu_seconds)))
                if not waiting:
                    return
                yield waiting[0][0], waiting[0][1].result()
                waiting.popleft()
        finally:
            # Nobody takes the rest. A list: calls that have not begun must all be cancelled first.
            if any([not future.cancel() and not future.done() for _, future in waiting]):
                self.close()

    def close(self) -> None:
        """Kill all processes; a later call starts new ones."""
        for worker in self._workers:
            worker.close()

    def _call(self, item: Item, cpu_seconds: Callable[[], float] | None) -> Result | Lost:
        worker = self._idle.get()
        start = time.monotonic()
        try:
            worker.start()
            start = time.monotonic()
            return worker(item, cpu_seconds() if cpu_seconds else None)
        finally:
            self.longest = max(self.longest, time.monotonic() - start)
            self._idle.put(worker)


def ordered_map(
    work: Callable[[Item], Result], items: Iterable[Item], workers: int
) -> Iterator[tuple[Item, Result]]:
    """(item, work(item)) in order; with one worker in this process.

    Raises:
        ValueError: a process died.
        Exception: what `work` raised.
    """
    if workers == 1:
        yield from ((item, work(item)) for item in items)
        return
    limits = Limits(environment={"CUDA_VISIBLE_DEVICES": ""})
    pool = Pool[Item, Result](f"{workers} workers", partial(_itself, work), workers, limits)
    try:
        for item, result in pool.map(items):
            if isinstance(result, Lost):
                raise result.error or ValueError(f"{item}: {result.reason}, wanted its result")
            yield item, result
    finally:
        pool.close()


def _itself(work: Callable[[Item], Result]) -> Callable[[Item], Result]:
    return work


def _import_path() -> list[str]:
    """This process's import path without the working folder.

    A `json.py` there would replace the library's. Where this package itself lies there, the folder
    comes last, so that it replaces nothing.
    """
    here = os.path.realpath(os.getcwd())
    entries = [os.path.abspath(entry) for entry in sys.path if entry]
    path = [entry for entry in entries if os.path.realpath(entry) != here]
    root = str(Path(__file__).resolve().parents[1])
    return path if root in map(os.path.realpath, path) else [*path, root]


def serve(descriptor: int, parent: int) -> None:
    """The child's side: make the function, then answer calls until the parent, a process number,
    ends; `descriptor` is the connection to it."""
    connection = Connection(descriptor)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    make, limits = connection.recv()
    if limits.memory_bytes:
        hard = resource.getrlimit(resource.RLIMIT_AS)[1]
        soft = limits.memory_bytes if hard < 0 else min(limits.memory_bytes, hard)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
    try:
        work = make()
    except Exception as error:  # the parent raises it
        connection.send(Lost(str(error), error=_portable(error)))
        return
    if limits.is_silent:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 1)
        os.dup2(nowhere, 2)
    connection.send(None)
    while True:
        try:
            cpu_seconds, item = connection.recv()
        except EOFError:
            return
        connection.send_bytes(_answer(work, item, cpu_seconds or 0.0))


def _answer(work: Callable[[Any], Any], item: Any, cpu_seconds: float) -> bytes:
    if cpu_seconds:
        signal.signal(signal.SIGPROF, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_PROF, cpu_seconds)
    try:
        return pickle.dumps(work(item))
    except Exception as error:  # the caller decides
        return pickle.dumps(Lost(f"{type(error).__name__}: {error}", error=_portable(error)))
    finally:
        if cpu_seconds:
            signal.setitimer(signal.ITIMER_PROF, 0)


def _portable(error: Exception) -> Exception:
    """The error with its traceback as a note, of a type that the parent can unpickle."""
    kind = type(error)
    trace = "".join(traceback.format_exception(error))
    if kind.__module__ != "builtins":
        notes = getattr(error, "__notes__", [])
        if isinstance(error, ValueError):
            error = ValueError(str(error))
        else:
            error = RuntimeError(f"{kind.__name__}: {error}")
        for note in notes:
            error.add_note(note)
    if not isinstance(error, ValueError):
        error.add_note(trace)
    return error.with_traceback(None)


def _end_with(parent: int) -> None:
    # The end of the connection is not enough: a process that the parent forked may hold it open.
    while os.getppid() == parent:
        time.sleep(_PARENT_CHECK_SECONDS)
    os._exit(1)
