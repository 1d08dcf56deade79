"""Files of rows, read at a place or all in order."""

import json
from array import array
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

from care_train.data.columns import RowError

MAX_ROW_BYTES = 2**28
"""Longest line or JSON row that is read."""

READ_BYTES = 2**20
"""Read at a time."""

_BETWEEN_ROWS = tuple(" \t\r\n,")
_NUM_TRIED = 128
"""Rows among which one that can be read stands for a file's columns."""


class RowFile:
    """One file's rows, or a folder's that Dataset.save_to_disk wrote."""

    def __init__(self, path: Path, name: str | None = None) -> None:
        self.path = path
        self.name = name or path.name
        """As errors, ids and manifests name it."""
        self.base_dir = path if path.is_dir() else path.parent
        """Where relative image paths start."""
        self.labels: Mapping[str, list[str]] = {}
        """Names of the classes of class-label columns."""
        self.num_rows: int | None = None
        """How many rows there are, where that is known without reading them."""
        self.is_built = False
        """Whether `care-train data build` wrote it: its rows were checked and have digests."""

    def __len__(self) -> int:
        """How many rows there are."""
        assert self.num_rows is not None
        return self.num_rows

    def number(self, place: int) -> int:
        """The row's number for people, from 1; for JSON lines its line."""
        return place + 1

    def location(self, place: int) -> str:
        """File and row, for errors."""
        return f"{self.name}: row {self.number(place)}"

    def row(self, place: int) -> dict[str, Any]:
        """The row at a place, from 0.

        Raises:
            RowError: not JSON, or no object with named columns.
        """
        return named_columns(self._value(place), at=self.location(place), labels=self.labels)

    def values(self) -> Iterator[tuple[int, Any]]:
        """(number, value) of all rows in order, for `named_columns`; few are held in memory."""
        yield from ((self.number(place), self._value(place)) for place in range(len(self)))

    def first_row(self) -> dict[str, Any]:
        """The first row that can be read, which stands for the file's columns; {} without any.

        Raises:
            ValueError: the first rows cannot be read, saying why.
        """
        fault: RowError | None = None
        for number, value in islice(self.values(), _NUM_TRIED):
            try:
                return named_columns(value, at=f"{self.name}: row {number}", labels=self.labels)
            except RowError as error:
                fault = fault or error
        if fault is not None:
            raise fault
        return {}

    def built_column(self, name: str) -> Sequence[str]:
        """A column of text of a built file, whole."""
        raise NotImplementedError

    def _value(self, place: int) -> Any:
        raise NotImplementedError


class ListedRows(RowFile):
    """Rows that are in memory anyway."""

    def __init__(self, name: str, rows: Sequence[Any]) -> None:
        super().__init__(Path(name))
        self.num_rows = len(rows)
        self._rows = rows

    def _value(self, place: int) -> Any:
        return self._rows[place]


class JsonLines(RowFile):
    """A file of JSON lines."""

    def __init__(self, path: Path, name: str | None = None) -> None:
        super().__init__(path, name)
        self._file = path.open("rb")

    def __len__(self) -> int:
        return len(self._lines[0])

    def number(self, place: int) -> int:
        return self._lines[0][place]

    def values(self) -> Iterator[tuple[int, Any]]:
        yield from ((number, parsed(line)) for number, _, line in self._scan())

    def _value(self, place: int) -> Any:
        self._file.seek(self._lines[1][place])
        return parsed(self._file.readline(MAX_ROW_BYTES + 1))

    @cached_property
    def _lines(self) -> tuple["array[int]", "array[int]"]:
        """(number, start in bytes) of each line that holds something."""
        numbers, starts = array("q"), array("q")
        for number, start, _ in self._scan():
            numbers.append(number)
            starts.append(start)
        return numbers, starts

    def _scan(self) -> Iterator[tuple[int, int, bytes]]:
        """(number, start, line) of each line that holds something."""
        with self.path.open("rb") as file:
            start = 0
            for number, line in enumerate(_lines_of(file), 1):
                if line.strip():
                    yield number, start, line
                start = file.tell()


class JsonList(RowFile):
    """A file that holds one JSON list of rows, parsed row by row."""

    def __len__(self) -> int:
        return len(self._all)

    def values(self) -> Iterator[tuple[int, Any]]:
        yield from enumerate(read_json_list(self.path), 1)

    def _value(self, place: int) -> Any:
        return self._all[place]

    @cached_property
    def _all(self) -> list[Any]:
        return list(read_json_list(self.path))


def named_columns(value: Any, *, at: str, labels: Mapping[str, list[str]]) -> dict[str, Any]:
    """A row as columns by name, class numbers as the classes' names.

    Raises:
        RowError: it is no object, or could not be parsed.
    """
    if isinstance(value, ValueError):
        raise RowError("not_an_object", f"{at}: not JSON ({value}): correct or drop the line")
    if not isinstance(value, Mapping):
        raise RowError(
            "not_an_object",
            f"{at}: got a {type(value).__name__}, wanted an object with named columns",
        )
    row = dict(value)
    for column, names in labels.items():
        number = row.get(column)
        if isinstance(number, int) and 0 <= number < len(names):
            row[column] = names[number]
    return row


def parsed(line: bytes) -> Any:
    """A line's JSON value, or the ValueError that says why there is none."""
    if len(line) > MAX_ROW_BYTES:
        return ValueError(f"longer than {MAX_ROW_BYTES} bytes")
    try:
        return json.loads(line)
    except RecursionError:
        return ValueError("nested too deeply")
    except ValueError as error:
        return error


def read_json_list(path: Path) -> Iterator[Any]:
    """The elements of a file's one JSON list of objects, with about one of them in memory.

    Raises:
        ValueError: a row that is damaged, too long or nested too deeply, naming it: where it ends,
            and so the next one begins, cannot be told.
    """
    decoder, number, more = json.JSONDecoder(), 1, READ_BYTES
    with path.open(encoding="utf-8-sig") as file:
        text = file.read(READ_BYTES)
        # `files._open_file` takes only files that begin with a list for this form.
        place = text.index("[") + 1
        while True:
            while text[place : place + 1] in _BETWEEN_ROWS:
                place += 1
            if text[place : place + 1] == "]":
                return
            try:
                value, end = decoder.raw_decode(text, place)
            except RecursionError:
                raise ValueError(f"{path}: row {number}: JSON nested too deeply") from None
            except ValueError as error:
                read = file.read(more)
                if not read:
                    raise ValueError(f"{path}: row {number}: not JSON ({error})") from None
                if len(text) - place > MAX_ROW_BYTES:
                    raise ValueError(
                        f"{path}: row {number}: longer than {MAX_ROW_BYTES} characters"
                    ) from None
                # Twice as much each time, so that one huge row is not parsed over and over.
                text, place, more = text[place:] + read, 0, more * 2
                continue
            number, place, more = number + 1, end, READ_BYTES
            yield value


def _lines_of(file: Any) -> Iterator[bytes]:
    """Lines; one that is too long is cut off one byte beyond what `parsed` takes."""
    while line := file.readline(MAX_ROW_BYTES + 1):
        rest = line
        while len(line) > MAX_ROW_BYTES and rest and not rest.endswith(b"\n"):
            rest = file.readline(READ_BYTES)
        yield line
