"""Rows of Parquet files and of the datasets library's folders, in bounded memory."""

import json
import resource
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any

from care_train.data.built import BUILT_KEY, BUILT_NOTE
from care_train.data.rows import READ_BYTES, RowFile

MAX_EXPANDED_BYTES = 2**32
"""Memory that reading a foreign file's rows may take: a few kilobytes of Parquet can hold the same
long text a thousand times."""

_NUM_TOGETHER = 128
"""Rows that are read together, of all in order."""
_MAX_GROUP_BYTES = 64 * 2**20
"""Larger Parquet row groups are not read for one row of theirs: the file is memory-mapped whole."""
_MAX_RATIO = 200
"""Largest size of a Parquet file's columns over the file's own, above MAX_EXPANDED_BYTES."""


class ArrowRows(RowFile):
    """A data set of Dataset.save_to_disk, or a cache of the datasets library: memory-mapped."""

    def __init__(self, path: Path, dataset: Any, name: str | None = None) -> None:
        super().__init__(path, name)
        self.labels = {n: list(f.names) for n, f in dataset.features.items() if hasattr(f, "names")}
        self.num_rows = len(dataset)
        # Arrow rows keep images as they were stored; the plain format would decode them.
        self._rows = dataset.with_format("arrow")

    def values(self) -> Iterator[tuple[int, Any]]:
        for start in range(0, len(self._rows), _NUM_TOGETHER):
            rows = self._rows[start : start + _NUM_TOGETHER].to_pylist()
            yield from enumerate(rows, start + 1)

    def _value(self, place: int) -> Any:
        return self._rows[place].to_pylist()[0]


class ParquetRows(RowFile):
    """A Parquet file: a row group is read for single rows, page by page for all in order."""

    def __init__(self, path: Path, name: str | None = None) -> None:
        from pyarrow import ArrowInvalid, parquet

        super().__init__(path, name)
        try:
            # Mapped pages would count as this process's memory once touched. With a buffer, pages
            # are read when they are needed, not whole columns of a row group.
            self._file = parquet.ParquetFile(path, buffer_size=READ_BYTES, pre_buffer=False)
        except (ArrowInvalid, OSError) as error:
            raise ValueError(f"{path}: not a Parquet file ({error}): write it again") from None
        metadata = self._file.metadata
        noted = self._file.schema_arrow.metadata or {}
        self.labels = _noted_labels(noted)
        self.num_rows = metadata.num_rows
        self.is_built = BUILT_KEY in noted
        if noted.get(BUILT_KEY, BUILT_NOTE) != BUILT_NOTE:
            raise ValueError(
                f"{path}: got a data set that `care-train data build` of another version wrote "
                f"({noted[BUILT_KEY].decode()}), wanted {BUILT_NOTE.decode()}: build it again"
            )
        groups = [metadata.row_group(i) for i in range(metadata.num_row_groups)]
        self._starts = list(accumulate((group.num_rows for group in groups), initial=0))
        sizes, own = [group.total_byte_size for group in groups], path.stat().st_size
        if sum(sizes) > max(MAX_EXPANDED_BYTES, own * _MAX_RATIO):
            raise ValueError(
                f"{path}: got a file of {own} bytes that says it holds {sum(sizes)}, wanted at "
                f"most {_MAX_RATIO} times as many: write it again"
            )
        self._has_large_groups = any(size > _MAX_GROUP_BYTES for size in sizes)
        self._group, self._table = -1, None
        self._read_before: set[int] = set()

    def values(self) -> Iterator[tuple[int, Any]]:
        batches, number = self._file.iter_batches(_NUM_TOGETHER, use_threads=False), 1
        while True:
            with memory_bounded(str(self.path)):
                batch = next(batches, None)
                rows = None if batch is None else batch.to_pylist()
            if rows is None:
                return
            yield from enumerate(rows, number)
            number += len(rows)

    def built_column(self, name: str) -> Sequence[str]:
        return self._file.read(columns=[name]).column(0).to_pylist()

    def _value(self, place: int) -> Any:
        if self._has_large_groups:
            return self._mapped._value(place)
        group = bisect_right(self._starts, place) - 1
        if group != self._group:
            self._table = None
            self._table = self._read(group)
            self._group = group
        assert self._table is not None
        return self._table.slice(place - self._starts[group], 1).to_pylist()[0]

    def _read(self, group: int) -> Any:
        # A group that was read once fits: later reads fall into a run's steps, whose other threads
        # may need memory at the same time.
        if self.is_built or group in self._read_before:
            return self._file.read_row_group(group)
        rows = f"rows {self._starts[group] + 1} to {self._starts[group + 1]}"
        with memory_bounded(f"{self.path}: {rows}"):
            table = self._file.read_row_group(group)
        self._read_before.add(group)
        return table

    @cached_property
    def _mapped(self) -> ArrowRows:
        """The file as the datasets library's cache has it, memory-mapped."""
        import datasets
        from datasets.exceptions import DatasetGenerationError

        try:
            with memory_bounded(str(self.path)):
                loaded = datasets.Dataset.from_parquet(str(self.path))
        except DatasetGenerationError as error:
            raise ValueError(f"{self.path}: not readable ({error.__cause__})") from None
        return ArrowRows(self.path, loaded, self.name)


@contextmanager
def memory_bounded(what: str) -> Iterator[None]:
    """Let the process's memory grow by MAX_EXPANDED_BYTES at most, on Linux.

    Only for moments in which no other thread may need as much.

    Raises:
        ValueError: more was needed, naming `what`.
    """
    statm = Path("/proc/self/statm")
    if not statm.is_file():
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    used = int(statm.read_text().split()[5]) * resource.getpagesize()
    limit = used + MAX_EXPANDED_BYTES
    tighter = limit if soft == resource.RLIM_INFINITY else min(soft, limit)
    resource.setrlimit(resource.RLIMIT_DATA, (tighter, hard))
    try:
        yield
    except MemoryError:
        raise ValueError(
            f"{what}: reading it takes more than {MAX_EXPANDED_BYTES} bytes of memory, wanted "
            "less: the file repeats long values, or its row groups are too large; write it again"
        ) from None
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


def _noted_labels(metadata: Mapping[bytes, bytes]) -> dict[str, list[str]]:
    """The class names that the datasets library noted in an Arrow schema's metadata."""
    noted = json.loads(metadata.get(b"huggingface", b"{}"))
    features = noted.get("info", {}).get("features", {})
    return {
        name: list(feature["names"])
        for name, feature in features.items()
        if isinstance(feature, Mapping) and feature.get("_type") == "ClassLabel"
    }
