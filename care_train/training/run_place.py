"""Where a run may write: its name, and whether what is there may be gone on with or replaced.

Nothing here changes a folder.
"""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from care_train.config import Config, config_to_dict
from care_train.data import Sample

CONFIG_FILE = "config.yaml"
MARKER = ".care-train-run.json"
"""Says that care-train made the folder, and so may delete it: one that was there before, with a
user's files in it, never gets it."""

_TRACES = (
    *(CONFIG_FILE, MARKER, "checkpoints", "cold_start_checkpoints", "metrics.jsonl", "answers"),
    *("base", "cold_start", "final", "summary.json", "results.json"),
)
"""What tells that a run wrote to a folder."""


def run_dir_of(config: Config) -> Path:
    """`output_dir/name`."""
    return Path(config.output_dir) / config.name


def marker_id(folder: Path) -> str | None:
    """The id of the run that `folder` was made for; None where care-train did not make it."""
    try:
        values = json.loads((folder / MARKER).read_text())
    except (OSError, ValueError):
        return None
    is_own = isinstance(values, dict) and values.get("made_by") == "care-train"
    return str(values.get("id")) if is_own else None


def marker_text(id: str) -> str:
    """What `MARKER` holds.

    Args:
        id: of the run.
    """
    return json.dumps({"made_by": "care-train", "id": id}) + "\n"


def bears_marker(folder: Path) -> bool:
    """Whether care-train made `folder`."""
    return marker_id(folder) is not None


def holds_run(folder: Path) -> bool:
    """Whether a run writes, or wrote, to `folder`; of a version before the marker too."""
    return bears_marker(folder) or all(
        (folder / name).is_file() for name in (CONFIG_FILE, "metrics.jsonl")
    )


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

    Args:
        config: the run's settings.
        folder: `locate` of them.
        files: those the settings were read from, by what named them.

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
    _check_inputs(config, folder, files)
    if not bears_marker(folder):
        raise ValueError(
            f"overwrite: {folder} has no {MARKER}: care-train did not make it, or a version before "
            "that file did. Nothing was deleted: look at what is in it and remove it yourself, or "
            "choose another name"
        )
    if inner := _run_within(folder):
        raise ValueError(f"overwrite: {folder} holds another run, {inner}: move it elsewhere first")
    return False


def check_images(folder: Path, rows: Mapping[str, Sequence[Sample]]) -> None:
    """Refuse rows whose images lie in a folder that is to be replaced.

    Args:
        folder: which.
        rows: all of the run, by the setting that names them.

    Raises:
        ValueError: one does; key, row and file are named.
    """
    real = folder.resolve()
    for key, samples in rows.items():
        for sample in samples:
            for image in sample.images:
                is_file = isinstance(image, str | Path)
                if is_file and Path(image).resolve().is_relative_to(real):
                    raise ValueError(
                        f"{key}: {sample.location}: {image} lies in {folder}, which overwrite=true "
                        "would delete; set name=... or move it"
                    )


def _check_inputs(config: Config, folder: Path, files: Mapping[str, Path]) -> None:
    """A run must not replace the folder that it reads from."""
    named = [*files.items(), ("the working directory", Path.cwd())]
    named += [
        (key, Path(os.path.expanduser(part)))
        for key, text in _texts(config_to_dict(config), "")
        # `file.py:function` is a path too.
        for part in (text, text.rpartition(":")[0])
        if key not in ("name", "output_dir") and part
    ]
    for key, path in named:
        if os.path.exists(path) and path.resolve().is_relative_to(folder.resolve()):
            raise ValueError(
                f"{key}: {path} lies in {folder}, which overwrite=true would delete; set name=... "
                "or move it"
            )


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


def _run_within(folder: Path) -> Path | None:
    """Another run somewhere below `folder`."""
    for place, _, names in os.walk(folder):
        if MARKER in names and Path(place) != folder:
            return Path(place)
    return None
