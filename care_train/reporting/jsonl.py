"""JSON lines that survive a kill: one flushed line per record, a cut last line dropped."""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class JsonlWriter:
    """Appends one JSON object per line."""

    def __init__(self, path: Path) -> None:
        """Open `path` for appending, without the half line a killed run may have left.

        Args:
            path: the file; its folder is created.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        # Unbuffered: what a full disk refused must not be tried again, and raise again, in `close`.
        self._file = path.open("ab", buffering=0)
        _drop_cut_line(path)

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
    """Every record of `path`, without a last line that a kill cut.

    Args:
        path: a file of one JSON object per line.

    Raises:
        ValueError: another line is not a JSON object; the message names file and line.
    """
    *whole, rest = path.read_bytes().split(b"\n")
    records = []
    for number, line in enumerate(whole, start=1):
        try:
            record = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{path}:{number}: not JSON ({error})") from error
        if not isinstance(record, dict):
            raise ValueError(f"{path}:{number}: got {type(record).__name__}, wanted an object")
        records.append(record)
    return records + _complete(rest)


def _complete(rest: bytes) -> list[dict[str, Any]]:
    """What follows the last newline, as a record where it is one (a file edited by hand)."""
    try:
        record = json.loads(rest)
    except ValueError:
        return []
    return [record] if isinstance(record, dict) else []


def _drop_cut_line(path: Path) -> None:
    """Without this, the next record would be glued to the half line and both would be lost."""
    content = path.read_bytes()
    rest = content[content.rfind(b"\n") + 1 :]
    if not rest:
        return
    if _complete(rest):
        with path.open("ab") as file:
            file.write(b"\n")
    else:
        os.truncate(path, len(content) - len(rest))


def finite(value: Any) -> Any:
    """`value` with null for NaN and infinities, which JSON has no words for."""
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
