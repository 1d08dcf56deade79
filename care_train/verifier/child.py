"""Processes of our own that another one talks to: started afresh, ended with their parent."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from multiprocessing.connection import Connection

_PARENT_CHECK_SECONDS = 1.0


class Child:
    """`python -m module`, and the two ends of what is said."""

    def __init__(self, module: str, environment: Mapping[str, str], *, is_silent: bool) -> None:
        """Start it; it inherits no memory, threads or CUDA context.

        Args:
            module: makes a `Parent` and answers it.
            environment: laid over this process's own.
            is_silent: throw away what it prints to standard error.
        """
        path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
        self._process = subprocess.Popen(
            [sys.executable, "-m", module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL if is_silent else None,
            env={**os.environ, "PYTHONPATH": path, **environment},
        )
        assert self._process.stdin is not None and self._process.stdout is not None
        self.requests = Connection(os.dup(self._process.stdin.fileno()), readable=False)
        self.replies = Connection(os.dup(self._process.stdout.fileno()), writable=False)
        self._process.stdin.close()
        self._process.stdout.close()
        self.pid = self._process.pid

    def kill(self) -> None:
        """End the process now and wait until it is gone."""
        self._process.kill()
        self._process.wait()
        self.requests.close()
        self.replies.close()


class Parent:
    """The other side, in the child, which ends when its parent does."""

    def __init__(self) -> None:
        self.requests = Connection(os.dup(0), writable=False)
        self.replies = Connection(os.dup(1), readable=False)
        # Libraries may print: nothing but replies may come this way.
        os.dup2(2, 1)
        # Ctrl-C reaches the whole foreground group; the parent decides what it means.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()

    def receive(self) -> bytes | None:
        """The next request; None where there will be none."""
        try:
            return self.requests.recv_bytes()
        except EOFError:
            return None


def _end_with(parent: int) -> None:
    # The end of the pipe is not enough: a child the parent forked may hold it open.
    while os.getppid() == parent:
        time.sleep(_PARENT_CHECK_SECONDS)
    os._exit(1)
