"""Files of rows, opened for reading one row at a time: the trainer's side of a data set.

datasets and pyarrow take seconds to load, so they are imported only by the readers that need them.
"""

import json
from array import array
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

from care_train.data.table_format import BUILT_KEY, DIGEST_COLUMN

if TYPE_CHECKING:
    import datasets

ACCEPTED = "easy_vqa, a .jsonl, .json or .parquet file, or a folder written by Dataset.save_to_disk"
"""What `data.path` may name."""

_MAX_GROUP_BYTES = 64 * 2**20
"""Larger Parquet row groups are not read for one row of theirs: the file is memory-mapped whole."""


@dataclass(frozen=True)
class RowFile:
    """Rows not read yet."""

    numbers: Sequence[int]
    """Row numbers as errors name them: from 1, and for .jsonl the line."""
    read: Callable[[int], object]
    """The row at a place in `numbers`."""
    digests: Callable[[], Sequence[str]] | None = None
    """Each row's checksum; only `care-train data build` writes them, into rows it has checked."""


def open_rows(path: Path, split: str) -> RowFile:
    """Open a file or folder of rows.

    Raises:
        ValueError: missing, of an unknown kind, or damaged; an answer column of class numbers.
    """
    if not path.exists():
        raise ValueError(f"data.path: {path} does not exist: wanted {ACCEPTED}")
    if path.is_dir():
        return _open_folder(path, split)
    reader = {".jsonl": _open_jsonl, ".json": _open_json, ".parquet": _open_parquet}.get(
        path.suffix.lower()
    )
    if reader is None:
        raise ValueError(f"data.path: {path} ends with {path.suffix!r}: wanted {ACCEPTED}")
    return reader(path)


def _open_jsonl(path: Path) -> RowFile:
    numbers, starts, position = array("q"), array("q"), 0
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                numbers.append(number)
                starts.append(position)
            position += len(line)
    lines = path.open("rb")

    def read(place: int) -> object:
        lines.seek(starts[place])
        return json.loads(lines.readline())

    return RowFile(numbers, read)


def _open_json(path: Path) -> RowFile:
    try:
        values = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error}): correct the file") from None
    if not isinstance(values, list):
        raise ValueError(
            f"{path}: got a {type(values).__name__} at the top, wanted a list of rows: save the "
            "list alone"
        )
    return RowFile(range(1, len(values) + 1), values.__getitem__)


def _open_parquet(path: Path) -> RowFile:
    import datasets
    import pyarrow
    from pyarrow import parquet

    try:
        # Mapped pages would count as this process's memory once touched.
        file = parquet.ParquetFile(path, memory_map=False, pre_buffer=False)
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise ValueError(f"{path}: not a Parquet file ({error}): write it again") from None
    metadata = file.schema_arrow.metadata or {}
    # Without the datasets library's note in the file, a column type may be one it does not know.
    if b"huggingface" in metadata:
        _check_features(path, datasets.Features.from_arrow_schema(file.schema_arrow))
    groups = [file.metadata.row_group(i) for i in range(file.num_row_groups)]
    if any(group.total_byte_size > _MAX_GROUP_BYTES for group in groups):
        return _arrow_rows(path, datasets.Dataset.from_parquet(str(path)))
    starts = list(accumulate((group.num_rows for group in groups), initial=0))
    numbers = range(1, starts[-1] + 1)
    reader = _RowGroups(file, starts)
    if BUILT_KEY not in metadata:
        return RowFile(numbers, reader.read)
    return RowFile(numbers, reader.read, reader.digests)


class _RowGroups:
    """One row group at a time in memory."""

    def __init__(self, file: Any, starts: Sequence[int]) -> None:
        self._file, self._starts = file, starts
        self._group, self._table = -1, None

    def read(self, place: int) -> object:
        group = bisect_right(self._starts, place) - 1
        if group != self._group:
            self._table = None
            self._table = self._file.read_row_group(group)
            self._group = group
        assert self._table is not None
        return self._table.slice(place - self._starts[group], 1).to_pylist()[0]

    def digests(self) -> Sequence[str]:
        return self._file.read(columns=[DIGEST_COLUMN]).column(0).to_pylist()


def _open_folder(path: Path, split: str) -> RowFile:
    import datasets

    try:
        loaded = datasets.load_from_disk(str(path))
    except FileNotFoundError:
        raise ValueError(f"data.path: {path} is no saved data set: wanted {ACCEPTED}") from None
    if isinstance(loaded, datasets.DatasetDict):
        if split not in loaded:
            raise ValueError(f"data.split: got {split!r}, {path} has {', '.join(map(str, loaded))}")
        loaded = loaded[split]
    return _arrow_rows(path, loaded)


def _arrow_rows(path: Path, loaded: Any) -> RowFile:
    _check_features(path, loaded.features)
    # Arrow rows keep images as they were stored; the plain format would decode them. They lie in
    # memory-mapped files.
    rows: Any = loaded.with_format("arrow")
    return RowFile(range(1, len(loaded) + 1), lambda place: rows[place].to_pylist()[0])


def _check_features(path: Path, features: "datasets.Features") -> None:
    answer = features.get("answer")
    if hasattr(answer, "names"):
        raise ValueError(
            f"{path}: answer: got a ClassLabel column, whose rows hold class numbers, wanted text: "
            "store each label's name"
        )
