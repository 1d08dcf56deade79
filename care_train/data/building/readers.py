"""Files of rows as streams: fixed chunks in order, from any row on, in memory one at a time."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

from care_train.data.building.kinds import LABEL, kind_of_arrow, kind_of_value

CHUNK_ROWS = 128
"""Rows of a chunk: what a worker gets, and what is lost at most when the build is killed."""

_READ_BYTES = 2**20


@dataclass(frozen=True)
class Chunk:
    """Consecutive rows, in a form that is cheap to send to a worker."""

    first: int
    """The first row's number, from 1; for .jsonl its line."""
    num_rows: int
    payload: Any
    """Arrow's IPC bytes, lines, or rows."""


class RowStream(Protocol):
    """One file's rows."""

    @property
    def path(self) -> Path:
        """The file or folder."""
        ...

    @property
    def labels(self) -> Mapping[str, list[str]]:
        """Names of the classes of class-label columns."""
        ...

    @property
    def num_rows(self) -> int | None:
        """How many rows there are, where that is known beforehand."""
        ...

    def kinds(self) -> dict[str, str]:
        """What each column holds, by the schema, or by the first row where there is none."""
        ...

    def chunks(self, start: int) -> Iterator[Chunk]:
        """The chunks from row `start` on, counted from 0: a multiple of CHUNK_ROWS."""
        ...


class ParquetStream:
    """A Parquet file, page by page even where its row groups are large."""

    def __init__(self, path: Path) -> None:
        from pyarrow import ArrowInvalid, parquet

        self.path = path
        try:
            # With a buffer, pages are read when they are needed, not whole columns of a row group.
            self._file = parquet.ParquetFile(path, buffer_size=_READ_BYTES, pre_buffer=False)
        except (ArrowInvalid, OSError) as error:
            raise ValueError(f"{path}: not a Parquet file ({error})") from None
        self.labels = _noted_labels(self._file.schema_arrow)
        self.num_rows: int | None = self._file.metadata.num_rows

    def kinds(self) -> dict[str, str]:
        return _kinds_of_schema(self._file.schema_arrow, self.labels)

    def chunks(self, start: int) -> Iterator[Chunk]:
        metadata, before, group = self._file.metadata, 0, 0
        while group < metadata.num_row_groups:
            rows = metadata.row_group(group).num_rows
            if before + rows > start:
                break
            before, group = before + rows, group + 1
        groups = list(range(group, metadata.num_row_groups))
        batches = self._file.iter_batches(CHUNK_ROWS, row_groups=groups, use_threads=False)
        yield from _arrow_chunks(batches, before, start)


class ArrowFolderStream:
    """A data set of Dataset.save_to_disk, memory-mapped."""

    def __init__(self, path: Path, dataset: Any) -> None:
        self.path = path
        self.labels = {n: list(f.names) for n, f in dataset.features.items() if hasattr(f, "names")}
        self.num_rows: int | None = len(dataset)
        self._schema = dataset.features.arrow_schema
        self._rows = dataset.with_format("arrow")

    def kinds(self) -> dict[str, str]:
        return _kinds_of_schema(self._schema, self.labels)

    def chunks(self, start: int) -> Iterator[Chunk]:
        starts = range(start, len(self._rows), CHUNK_ROWS)
        batches = (
            batch
            for place in starts
            for batch in self._rows[place : place + CHUNK_ROWS].combine_chunks().to_batches()
        )
        yield from _arrow_chunks(batches, start, start)


class JsonLinesStream:
    """A .jsonl file; the workers parse its lines."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.labels: dict[str, list[str]] = {}
        self.num_rows: int | None = None

    def kinds(self) -> dict[str, str]:
        with self.path.open("rb") as file:
            line = next((line for line in file if line.strip()), b"{}")
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{self.path}: first line: not JSON ({error})") from None
        return _kinds_of_row(self.path, row)

    def chunks(self, start: int) -> Iterator[Chunk]:
        with self.path.open("rb") as file:
            yield from _blocks(islice(file, start, None), start)


class JsonStream:
    """A .json file that holds one list of rows, parsed row by row."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.labels: dict[str, list[str]] = {}
        self.num_rows: int | None = None

    def kinds(self) -> dict[str, str]:
        return _kinds_of_row(self.path, next(read_json_list(self.path), {}))

    def chunks(self, start: int) -> Iterator[Chunk]:
        yield from _blocks(islice(read_json_list(self.path), start, None), start)


class RowListStream:
    """Rows that are in memory anyway, such as easy-VQA's questions."""

    def __init__(self, path: Path, rows: list[dict[str, Any]]) -> None:
        self.path = path
        self.labels: dict[str, list[str]] = {}
        self.num_rows: int | None = len(rows)
        self._rows = rows

    def kinds(self) -> dict[str, str]:
        return _kinds_of_row(self.path, self._rows[0])

    def chunks(self, start: int) -> Iterator[Chunk]:
        yield from _blocks(islice(self._rows, start, None), start)


def read_json_list(path: Path) -> Iterator[Any]:
    """The elements of a file's one JSON list of objects, with about one of them in memory.

    Raises:
        ValueError: no list at the top, or damaged JSON, naming the row.
    """
    decoder, number, place, more = json.JSONDecoder(), 0, 0, _READ_BYTES
    with path.open(encoding="utf-8-sig") as file:
        text = file.read(_READ_BYTES)
        place = _skip(text, 0, " \t\r\n")
        if text[place : place + 1] != "[":
            raise ValueError(f"{path}: got {text[:20]!r} at the top, wanted a list of rows")
        place += 1
        while True:
            place = _skip(text, place, " \t\r\n,")
            if text[place : place + 1] == "]":
                return
            try:
                value, end = decoder.raw_decode(text, place)
            except ValueError as error:
                read = file.read(more)
                if not read:
                    raise ValueError(f"{path}: row {number + 1}: not JSON ({error})") from None
                # Twice as much each time, so that one huge row is not parsed over and over.
                text, place, more = text[place:] + read, 0, more * 2
                continue
            number, place, more = number + 1, end, _READ_BYTES
            yield value


def _skip(text: str, place: int, characters: str) -> int:
    while place < len(text) and text[place] in characters:
        place += 1
    return place


def _blocks(rows: Iterator[Any], start: int) -> Iterator[Chunk]:
    first = start + 1
    while block := list(islice(rows, CHUNK_ROWS)):
        yield Chunk(first, len(block), block)
        first += len(block)


def rows_of(chunk: Chunk) -> Iterator[tuple[int, Any]]:
    """(number, row) of a chunk, for a worker; a line that is not JSON comes as its ValueError."""
    if isinstance(chunk.payload, bytes):
        import pyarrow

        with pyarrow.ipc.open_stream(chunk.payload) as reader:
            values: list[Any] = reader.read_all().to_pylist()
    else:
        values = chunk.payload
    for number, value in enumerate(values, chunk.first):
        if not isinstance(value, bytes):
            yield number, value
        elif value.strip():
            try:
                yield number, json.loads(value)
            except ValueError as error:
                yield number, error


def _arrow_chunks(batches: Iterator[Any], position: int, start: int) -> Iterator[Chunk]:
    """Batches cut at multiples of the chunk size, without the rows before `start`."""
    import pyarrow

    held: list[Any] = []
    count = 0
    for batch in batches:
        if (skip := min(max(start - position, 0), batch.num_rows)) > 0:
            batch, position = batch.slice(skip), position + skip
        while batch.num_rows:
            part = batch.slice(0, CHUNK_ROWS - count)
            held.append(part)
            count, position, batch = count + len(part), position + len(part), batch.slice(len(part))
            if count == CHUNK_ROWS:
                yield Chunk(position - count + 1, count, _serialized(pyarrow, held))
                held, count = [], 0
    if count:
        yield Chunk(position - count + 1, count, _serialized(pyarrow, held))


def _serialized(pyarrow: Any, batches: list[Any]) -> bytes:
    sink = pyarrow.BufferOutputStream()
    with pyarrow.ipc.new_stream(sink, batches[0].schema) as writer:
        for batch in batches:
            writer.write_batch(batch)
    return sink.getvalue().to_pybytes()


def _noted_labels(schema: Any) -> dict[str, list[str]]:
    """The class names that the datasets library noted in an Arrow schema."""
    noted = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
    features = noted.get("info", {}).get("features", {})
    return {
        name: list(feature["names"])
        for name, feature in features.items()
        if isinstance(feature, Mapping) and feature.get("_type") == "ClassLabel"
    }


def _kinds_of_schema(schema: Any, labels: Mapping[str, list[str]]) -> dict[str, str]:
    kinds = {field.name: kind_of_arrow(field.type) for field in schema}
    return kinds | {name: LABEL for name in labels if name in kinds}


def _kinds_of_row(path: Path, row: Any) -> dict[str, str]:
    if not isinstance(row, Mapping):
        raise ValueError(f"{path}: first row: got a {type(row).__name__}, wanted named columns")
    return {name: kind_of_value(value) for name, value in row.items()}
