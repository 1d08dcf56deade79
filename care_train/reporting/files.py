"""Files that survive a kill: JSON lines appended whole, texts replaced whole."""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

PARTIAL = ".partial"
"""Ends the name of a file or folder that is still being written."""


class JsonlWriter:
    """Appends one JSON object per line."""

    def __init__(self, path: Path) -> None:
        """Open `path` for appending, without the half line that a killed run may have left."""
        path.parent.mkdir(parents=True, exist_ok=True)
        # Unbuffered: what a full disk refused must not be tried again, and raise again, in `close`.
        self._file = path.open("ab", buffering=0)
        content = path.read_bytes()
        if rest := content.rpartition(b"\n")[2]:
            try:
                json.loads(rest)
            except ValueError:
                os.truncate(path, len(content) - len(rest))
            else:
                self._file.write(b"\n")

    def write(self, record: Mapping[str, Any]) -> None:
        """Append `record` at once: a reader sees whole lines while the run goes on.

        Raises:
            OSError: no room; the half line that may be there is dropped when it is opened again.
        """
        rest = json.dumps(finite(record), allow_nan=False).encode() + b"\n"
        while rest:
            rest = rest[self._file.write(rest) :]

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Every record of `path`, a JSON object per line, without a last line that a kill cut.

    Raises:
        ValueError: another line is not a JSON object; the message names file and line.
    """
    lines = path.read_bytes().split(b"\n")
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
        except ValueError as error:
            # What follows the last newline is nothing, or a line that was cut.
            if number == len(lines):
                break
            raise ValueError(f"{path}:{number}: not JSON ({error})") from error
        if not isinstance(record, dict):
            raise ValueError(f"{path}:{number}: got {type(record).__name__}, wanted an object")
        records.append(record)
    return records


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object that `path` holds.

    Raises:
        ValueError: it holds none; the message names the file.
    """
    try:
        found = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error})") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path}: got {type(found).__name__}, wanted an object")
    return found


def finite(value: Any) -> Any:
    """`value` with null for NaN and infinities, which JSON cannot hold."""
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def write_json(path: Path, value: Any) -> None:
    """`write_file` of a value as JSON; NaN and infinities become null."""
    write_file(path, json.dumps(finite(value), indent=2, allow_nan=False) + "\n")


def write_file(path: Path, content: str | memoryview) -> None:
    """Write `path` whole, text as UTF-8: a kill leaves the old content or the new."""
    put_in_place({path: write_partial(path, content)})


def write_partial(path: Path, content: str | memoryview, writer: str = "") -> Path:
    """Write the partial file of `path` that `put_in_place` syncs and renames.

    `writer` is part of its name where several processes may write `path` at once.
    """
    partial = path.with_name(f"{path.name}{writer}{PARTIAL}")
    partial.write_bytes(content.encode() if isinstance(content, str) else content)
    return partial


def put_in_place(partials: Mapping[Path, Path]) -> None:
    """Sync and rename what `write_partial` returned, by the file's path.

    For several files at once the disk has much less to do than for one after the other.
    """
    for partial in partials.values():
        sync(partial)
    for path, partial in partials.items():
        partial.replace(path)
    for folder in {path.parent for path in partials}:
        sync(folder)


def sync(path: Path) -> None:
    """Wait until a file or folder is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
