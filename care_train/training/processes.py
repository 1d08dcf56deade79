"""Which process is meant by a pid, and whether it still runs: by what no clock step moves."""

import os
import socket
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

_STATE, _START_TICKS = 3, 22
"""Fields of /proc/PID/stat, counted from 1 as proc(5) does."""


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
    others. None where /proc does not say."""

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
