"""A run's folder: how a new run takes it, and an old one's place.

A new run is prepared in `.NAME.new`, beside its folder. Once its settings, data and rows are found
valid (`RunFolder.begin`) the old run, where `overwrite=true` replaces one, is renamed to
`.NAME.old` and the new one takes its name. The old one is deleted when the first step begins
(`RunFolder.started`); if the new run fails or is killed before that, the old one gets its name
back, at once or when the folder is opened the next time. Rank 0 does all of it, under a `RunLock`.
"""

import shutil
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import TypeVar

from care_train.config import Config, config_to_yaml
from care_train.data import Sample
from care_train.distributed import barrier, is_main, of_first_rank
from care_train.reporting.files import sync, write_file
from care_train.training.failures import RunError, is_disk_full
from care_train.training.run_lock import PATIENCE, RunLock
from care_train.training.run_place import (
    CONFIG_FILE,
    MARKER,
    bears_marker,
    check_free,
    check_images,
    holds_run,
    locate,
    marker_id,
    marker_text,
)

Value = TypeVar("Value")

_VISIBLE_SECONDS = 120.0
"""How long a network disk's client may go on seeing the folder that was renamed away."""


def recover(folder: Path) -> None:
    """Undo or complete what a killed run left half done beside `folder`; its lock must be held.

    Raises:
        ValueError: an old run waits to get its name back, which something else has.
    """
    for garbage in (_sibling(folder, "new"), _sibling(folder, "deleted")):
        shutil.rmtree(garbage, ignore_errors=True)
    old = _sibling(folder, "old")
    if not old.exists():
        return
    if folder.exists():
        if not bears_marker(folder):
            raise ValueError(
                f"name: {old} is a run that was to be replaced and gets its name back, but "
                f"{folder} is not care-train's: move one of them elsewhere"
            )
        folder.rename(_sibling(folder, "deleted"))
    old.rename(folder)
    sync(folder.parent)
    shutil.rmtree(_sibling(folder, "deleted"), ignore_errors=True)
    print(
        f"{folder}: the run that was to replace this one ended before its first step; this one is "
        "kept",
        file=sys.stderr,
    )


class RunFolder:
    """The folder of a run that holds its lock."""

    def __init__(self, config: Config, folder: Path, is_resumed: bool) -> None:
        """Prepare a new run, on all ranks; one that goes on is there already.

        Args:
            config: the run's settings.
            folder: where it will be, or is.
            is_resumed: it goes on with what is there.
        """
        self.is_resumed = is_resumed
        self._config, self._folder = config, folder
        self._has_started = False
        self.path = folder if is_resumed else _sibling(folder, "new")
        """Where the run writes: until `begin`, a new one's is another folder than its own."""
        if not is_resumed:
            _on_main(self._prepare)

    def begin(self, rows: Mapping[str, Sequence[Sample]]) -> Path:
        """Settings, data and rows are valid: a new run gets its folder. All ranks call it.

        Args:
            rows: what the run reads, by the setting that names it.

        Returns:
            The run's folder, from now on `path`.

        Raises:
            ValueError: rows have images in the folder that the run replaces, or a rank does not
                see the one that rank 0 made.
            OSError: it could not be written.
        """
        _on_main(lambda: self._take_name(rows))
        self.path = self._folder
        if not self.is_resumed:
            self._await_folder()
        barrier()
        return self.path

    def started(self) -> None:
        """The first step begins: the run that this one replaces is deleted."""
        if is_main() and not self._has_started:
            old, doomed = _sibling(self._folder, "old"), _sibling(self._folder, "deleted")
            if old.exists():
                old.rename(doomed)
                shutil.rmtree(doomed, ignore_errors=True)
        self._has_started = True

    def close(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Leave no trace of a new run that did not get to its first step where it replaces one."""
        if is_main() and not self._has_started and not self.is_resumed:
            recover(self._folder)

    def _prepare(self) -> None:
        self.path.mkdir()
        write_file(self.path / MARKER, marker_text(uuid.uuid4().hex))

    def _take_name(self, rows: Mapping[str, Sequence[Sample]]) -> None:
        write_file(self.path / CONFIG_FILE, config_to_yaml(self._config))
        if self.is_resumed:
            return
        if bears_marker(self._folder):
            check_images(self._folder, rows)
            self._folder.rename(_sibling(self._folder, "old"))
        elif self._folder.is_dir() and any(self._folder.iterdir()):
            self._move_in()
            return
        self.path.rename(self._folder)
        sync(self._folder.parent)

    def _move_in(self) -> None:
        """Into a folder with a user's files, which is not care-train's to delete: no marker."""
        (self.path / MARKER).unlink()
        # config.yaml comes first: what else a run writes says without it that a file was lost.
        names = sorted(path.name for path in self.path.iterdir())
        for name in sorted(names, key=lambda name: name != CONFIG_FILE):
            (self.path / name).rename(self._folder / name)
        self.path.rmdir()

    def _await_folder(self) -> None:
        """Until this rank's machine sees the new folder, where it has a marker, by its name."""
        wanted = of_first_rank(marker_id(self._folder))
        end = time.monotonic() + _VISIBLE_SECONDS
        while wanted is not None and marker_id(self._folder) != wanted:
            if time.monotonic() > end:
                raise ValueError(
                    f"output_dir: {self._folder}, which rank 0 made, cannot be seen here: all "
                    "machines of a run need the same disk under the same path"
                )
            time.sleep(0.2)


@contextmanager
def open_run(config: Config, files: Mapping[str, Path]) -> Iterator[RunFolder]:
    """The run's folder, locked until the `with` block ends. All ranks call it.

    Args:
        config: the run's settings.
        files: those the settings were read from, by what named them.

    Raises:
        FolderInUseError: another process writes to it.
        ValueError: its name is none, or what is there cannot be gone on with or replaced.
    """
    with ExitStack() as stack:
        folder, is_resumed = _on_main(lambda: _claim(config, files, stack))
        run = RunFolder(config, folder, is_resumed)
        stack.push(run.close)
        yield run


@contextmanager
def writing_within_runs(path: Path) -> Iterator[None]:
    """Hold the lock of the run whose folder `path` lies in, where it lies in one.

    Raises:
        FolderInUseError: another process writes to that folder.
    """
    runs = [folder for folder in path.resolve().parents if holds_run(folder)]
    with ExitStack() as stack:
        for folder in runs[:1]:
            stack.enter_context(RunLock(folder))
        yield


def _claim(config: Config, files: Mapping[str, Path], stack: ExitStack) -> tuple[Path, bool]:
    folder = locate(config)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        stack.enter_context(RunLock(folder, patience=config.limits.rank or PATIENCE))
    except OSError as error:
        if is_disk_full(error):
            raise
        raise ValueError(f"output_dir: {folder.parent} cannot be written: {error}") from error
    recover(folder)
    return folder, check_free(config, folder, files)


def _sibling(folder: Path, role: str) -> Path:
    """`.NAME.ROLE` beside `folder`: no run has such a name, for none begins with a dot."""
    return folder.with_name(f".{folder.name}.{role}")


def _on_main(action: Callable[[], Value]) -> Value:
    """Run `action` on rank 0: its result, or its error, on every rank."""
    result: tuple[Value | None, Exception | None] = (None, None)
    if is_main():
        try:
            result = action(), None
        except (RunError, ValueError, OSError) as error:
            result = None, error
    value, error = of_first_rank(result)
    if error is not None:
        raise error
    return value  # pyright: ignore[reportReturnType]
