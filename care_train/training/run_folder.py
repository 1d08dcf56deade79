"""A run's folder: where it is, how a new run takes it, and an old one's place.

A new run is prepared in `.NAME.new`, beside its folder. Once its settings, data and rows are found
valid (`RunFolder.begin`) the old run, where `overwrite=true` replaces one, is renamed to
`.NAME.old` and the new one takes its name. The old one is deleted when the first step begins
(`RunFolder.started`); if the new run fails or is killed before that, the old one gets its name
back, at once or when the folder is opened the next time. Rank 0 does all of it, under a `RunLock`.
"""

import json
import os
import shutil
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, TypeVar

from care_train.config import Config, config_to_dict, config_to_yaml
from care_train.data import Sample
from care_train.distributed import barrier, is_main, of_first_rank
from care_train.reporting.files import sync, write_file
from care_train.training.failures import RunError, is_disk_full
from care_train.training.run_lock import PATIENCE, RunLock

Value = TypeVar("Value")

CONFIG_FILE = "config.yaml"
MARKER = ".care-train-run.json"
"""Says that care-train made the folder, and so may delete it: one that was there before, with a
user's files in it, never gets it."""

_TRACES = (
    *(CONFIG_FILE, MARKER, "checkpoints", "cold_start_checkpoints", "metrics.jsonl", "answers"),
    *("base", "cold_start", "final", "summary.json", "results.json"),
)
"""What tells that a run wrote to a folder."""
_VISIBLE_SECONDS = 120.0
"""How long a network disk's client may go on seeing the folder that was renamed away."""


def run_dir_of(config: Config) -> Path:
    """`output_dir/name`."""
    return Path(config.output_dir) / config.name


def marker_text(id: str) -> str:
    """What `MARKER` holds, for the run that has this id."""
    return json.dumps({"made_by": "care-train", "id": id}) + "\n"


def marker_id(folder: Path) -> str | None:
    """The id of the run that `folder` was made for; None where care-train did not make it."""
    try:
        values = json.loads((folder / MARKER).read_text())
    except (OSError, ValueError):
        return None
    is_own = isinstance(values, dict) and values.get("made_by") == "care-train"
    return str(values.get("id")) if is_own else None


def locate(config: Config) -> Path:
    """Where the run's folder is: `output_dir/name`, or what that is a link to.

    Raises:
        ValueError: it is not within `output_dir`.
    """
    root, given = Path(config.output_dir), run_dir_of(config)
    try:
        real_root, real, real_parent = root.resolve(), given.resolve(), given.parent.resolve()
    except RuntimeError as error:  # links in a circle
        raise ValueError(f"name: {given}: {error}") from None
    if real == real_root or not real.is_relative_to(real_root):
        raise ValueError(
            f"name: got {config.name!r}, which leads to {real}, wanted a folder within "
            f"output_dir = {config.output_dir}: set output_dir to the folder that it is in"
        )
    return given if real_parent / given.name == real else real


def check_free(config: Config, folder: Path, files: Mapping[str, Path]) -> bool:
    """Whether the run goes on with what `folder` holds; changes nothing.

    `files` are those the settings were read from, by what named them.

    Returns:
        True: `resume` finds a run there. False: a new run begins.

    Raises:
        ValueError: there is something that the settings do not allow to go on with or to replace.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"name: {folder} is a file, wanted a folder")
    traces = [name for name in _TRACES if (folder / name).exists()]
    if config.resume and CONFIG_FILE in traces:
        return True
    if config.resume and traces:
        raise ValueError(
            f"resume: {folder} has {', '.join(traces)}, but no {CONFIG_FILE}: the run's settings "
            f"were lost. Copy the file that it was started with to {folder / CONFIG_FILE}, or "
            "choose another name; nothing was changed"
        )
    if not traces:
        return False
    if not config.overwrite:
        raise ValueError(
            f"name: {folder} already holds a run; choose another name, or set resume=true to go "
            "on, or overwrite=true to replace it"
        )
    for key, path in _inputs(config, files):
        if os.path.exists(path):
            _check_outside(folder.resolve(), path, f"{key}: {path}")
    if marker_id(folder) is None:
        raise ValueError(
            f"overwrite: {folder} has no {MARKER}: care-train did not make it, or a version before "
            "that file did. Nothing was deleted: look at what is in it and remove it yourself, or "
            "choose another name"
        )
    inner = (Path(place) for place, _, names in os.walk(folder) if MARKER in names)
    if within := next((place for place in inner if place != folder), None):
        raise ValueError(
            f"overwrite: {folder} holds another run, {within}: move it elsewhere first"
        )
    return False


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
        if marker_id(folder) is None:
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
        """Prepare a new run of `folder`, on all ranks; one that goes on is there already."""
        self.is_resumed = is_resumed
        self._config, self._folder = config, folder
        self._has_started = False
        self.path = folder if is_resumed else _sibling(folder, "new")
        """Where the run writes: until `begin`, a new one's is another folder than its own."""
        if not is_resumed:
            on_main(self._prepare)

    def begin(self, rows: Mapping[str, Sequence[Sample]]) -> Path:
        """Settings, data and rows are valid: a new run gets its folder, from now on `path`, which
        is returned. All ranks call it.

        Args:
            rows: what the run reads, by the setting that names it.

        Raises:
            ValueError: rows have images in the folder that the run replaces, or a rank does not
                see the one that rank 0 made.
            OSError: it could not be written.
        """
        on_main(lambda: self._take_name(rows))
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

    def close(self) -> None:
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
        if marker_id(self._folder) is not None:
            _check_images(self._folder, rows)
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

    `files` are those the settings were read from, by what named them.

    Raises:
        FolderInUseError: another process writes to it.
        ValueError: its name is none, or what is there cannot be gone on with or replaced.
    """
    with ExitStack() as stack:
        folder, is_resumed = on_main(lambda: _claim(config, files, stack))
        run = RunFolder(config, folder, is_resumed)
        stack.callback(run.close)
        yield run


@contextmanager
def writing_within_runs(path: Path) -> Iterator[None]:
    """Hold the lock of the run whose folder `path` lies in, where it lies in one.

    Raises:
        FolderInUseError: another process writes to that folder.
    """
    with ExitStack() as stack:
        for folder in path.resolve().parents:
            # A run in a folder that was a user's before has no marker.
            files = (folder / name for name in (CONFIG_FILE, "metrics.jsonl"))
            if marker_id(folder) is not None or all(file.is_file() for file in files):
                stack.enter_context(RunLock(folder))
                break
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


def _inputs(config: Config, files: Mapping[str, Path]) -> Iterator[tuple[str, Path]]:
    """What a run reads, and its working directory, by what names it."""
    yield from files.items()
    yield "the working directory", Path.cwd()
    for key, text in _texts(config_to_dict(config), ""):
        # `file.py:function` is a path too.
        for part in (text, text.rpartition(":")[0]):
            if key not in ("name", "output_dir") and part:
                yield key, Path(os.path.expanduser(part))


def _texts(value: Any, key: str) -> Iterator[tuple[str, str]]:
    """Every text of nested settings, with its key."""
    if isinstance(value, str):
        yield key, value
    elif isinstance(value, Mapping):
        for name, item in value.items():
            yield from _texts(item, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _texts(item, key)


def _check_images(folder: Path, rows: Mapping[str, Sequence[Sample]]) -> None:
    real = folder.resolve()
    for key, samples in rows.items():
        for sample in samples:
            for image in sample.images:
                if isinstance(image, str | Path):
                    _check_outside(real, Path(image), f"{key}: {sample.location}: {image}")


def _check_outside(folder: Path, path: Path, what: str) -> None:
    """A run must not replace the folder that it reads from."""
    if path.resolve().is_relative_to(folder):
        raise ValueError(
            f"{what} lies in {folder}, which overwrite=true would delete; set name=... or move it"
        )


def _sibling(folder: Path, role: str) -> Path:
    """`.NAME.ROLE` beside `folder`: no run has such a name, for none begins with a dot."""
    return folder.with_name(f".{folder.name}.{role}")


def on_main(action: Callable[[], Value]) -> Value:
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
