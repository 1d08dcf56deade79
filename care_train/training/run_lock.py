"""One process at a time writes to a run's folder: a lock beside it, on a local disk or NFS.

The lock of `runs/care` is the folder `runs/.care.lock`. It holds one file, which says who has the
lock and is named by a random token.

- It is taken by renaming a folder that holds the own file onto it: an atomic step, on NFS too,
  which the file system refuses while the lock has a file in it.
- A dead holder's file is deleted by its name. Of two processes that find it dead, neither can
  delete the other's.
- A holder of this machine is judged by its pid and start ticks. One of another machine touches its
  file every few seconds, and who wants the lock watches whether the file's time changes. Only that
  it changes counts, so no two clocks have to agree.
"""

import errno
import os
import shlex
import shutil
import sys
import threading
import time
import uuid
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Self

from pydantic import TypeAdapter, ValidationError

from care_train.reporting.files import sync
from care_train.training.failures import IN_USE_STATUS, RunError
from care_train.training.ranks import ProcessId, end_at_once

BEAT, PATIENCE = 5.0, 300.0
"""Seconds between two signs of life, and without one until a holder that cannot be looked at counts
as dead."""
_RETRIES, _PAUSE = 100, 0.1
"""Of taking a lock that was just released, and seconds between two."""


class FolderInUseError(RunError):
    """Another process writes to the run's folder."""

    status = IN_USE_STATUS


@dataclass(frozen=True)
class Holder:
    """Who has a lock."""

    process: ProcessId
    since: float
    """Seconds since the epoch by its host's clock: for people alone."""
    command: str

    def __str__(self) -> str:
        since = datetime.fromtimestamp(self.since, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
        return f"pid {self.process.pid} on {self.process.host} since {since} ({self.command})"


_HOLDER = TypeAdapter(Holder)


class RunLock:
    """Held within its `with` block, by this process alone: a fork of it holds nothing."""

    def __init__(self, folder: Path, *, beat: float = BEAT, patience: float = PATIENCE) -> None:
        """Ready to be taken; `folder`, the run's, need not exist, but its parent must.

        `beat` is the seconds between two signs of life, `patience` those without one after which a
        holder on another machine counts as dead; at least four beats.
        """
        self._folder, self._beat, self._patience = folder, beat, max(patience, 4 * beat)
        self._place = folder.with_name(f".{folder.name}.lock")
        self._token = uuid.uuid4().hex
        self._released = threading.Event()
        self._thread = threading.Thread(target=self._give_signs, name="care-lock", daemon=True)
        self._pid = os.getpid()

    def __enter__(self) -> Self:
        """Take the lock; of a dead holder too.

        Raises:
            FolderInUseError: a process that lives has it.
            OSError: the folder's parent cannot be written.
        """
        for _ in range(_RETRIES):
            if self._publish():
                self._clean_up()
                self._thread.start()
                return self
            held = self._find()
            if held is None:  # just released, or an NFS client still has a deleted file open
                time.sleep(_PAUSE)
                continue
            path, holder = held
            if self._is_alive(path, holder):
                raise FolderInUseError(
                    f"{self._folder}: in use by {holder}: wait until it ends, stop it there with "
                    f"`kill -TERM {holder.process.pid}`, or choose another name=..."
                )
            path.unlink(missing_ok=True)
        raise FolderInUseError(
            f"{self._place}: got files that no run left there, wanted one that says who writes to "
            f"{self._folder}: delete them if no run does"
        )

    def __exit__(self, *_: object) -> None:
        if os.getpid() != self._pid:
            return
        self._released.set()
        self._thread.join()
        try:
            (self._place / self._token).unlink(missing_ok=True)
            self._place.rmdir()
        except OSError:  # somebody else's already, or the disk has become read-only
            return

    def _publish(self) -> bool:
        """Put the own file into the lock, unless there is one."""
        own = self._place.with_name(f"{self._place.name}.{self._token}")
        command = shlex.join(["care-train", *sys.argv[1:]])
        command = command.encode(errors="replace").decode()  # a path may be in no encoding
        holder = Holder(ProcessId.own(), time.time(), command)
        try:
            own.mkdir(exist_ok=True)
            (own / self._token).write_bytes(_HOLDER.dump_json(holder))
            sync(own / self._token)
            own.rename(self._place)
        except OSError as error:
            # NFS sends a request again when the reply is lost, and then says that it failed.
            if (self._place / self._token).exists():
                return True
            shutil.rmtree(own, ignore_errors=True)
            # ENOENT: the holder's `_clean_up` took it for a leftover.
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOENT):
                raise
            return False
        return True

    def _clean_up(self) -> None:
        """Delete what was killed between the two steps of `_publish`."""
        for path in self._place.parent.iterdir():
            if path.name.startswith(f"{self._place.name}."):
                shutil.rmtree(path, ignore_errors=True)

    def _find(self) -> tuple[Path, Holder] | None:
        """The holder's file and what it says."""
        try:
            for path in self._place.iterdir():
                if not path.name.startswith("."):  # .nfsXXXX: deleted, and still open
                    return path, _read_holder(path)
        except FileNotFoundError:
            pass
        return None

    def _is_alive(self, path: Path, holder: Holder) -> bool:
        """Whether the holder runs, where need be by watching its file."""
        if (running := holder.process.is_running()) is not None:
            return running
        print(
            f"{self._folder}: in use by {holder}: watching for up to {self._patience:g} s whether "
            "it gives a sign of life",
            file=sys.stderr,
        )
        first, end = _time_of(path), time.monotonic() + self._patience
        while time.monotonic() < end:
            time.sleep(min(self._beat / 2, self._patience / 4))
            now = _time_of(path)
            if now != first:
                return now is not None
            if (running := holder.process.is_running()) is not None:
                return running
        return False

    def _give_signs(self) -> None:
        while not self._released.wait(self._beat):
            try:
                os.utime(self._place / self._token)
            except FileNotFoundError:
                print(
                    f"\ncare-train: error: {self._folder}: its lock was deleted, or taken over "
                    "while this process gave no sign of life: ended, so as not to write among "
                    "another run's files",
                    file=sys.stderr,
                    flush=True,
                )
                end_at_once(IN_USE_STATUS)
            except OSError:  # the disk is away; who wants the lock allows for that
                continue


def _read_holder(path: Path) -> Holder:
    """What a lock's file says; one that cannot be read is of nobody that can be looked at.

    Raises:
        FileNotFoundError: it was released.
    """
    try:
        return _HOLDER.validate_json(path.read_bytes())
    except ValidationError:
        return Holder(ProcessId("an unknown host", None, 0, None), 0.0, "unreadable lock")


def _time_of(path: Path) -> int | None:
    """When a file was last touched, in ns by its server's clock; None where it is gone."""
    try:
        # NFS clients ask the server anew when a file is opened, and may not for a stat.
        with path.open("rb") as file:
            return os.fstat(file.fileno()).st_mtime_ns
    except FileNotFoundError:
        return None
