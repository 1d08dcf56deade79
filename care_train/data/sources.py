"""Read a data set into samples."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from care_train.config import DataSettings
from care_train.data.easy_vqa import easy_vqa_samples
from care_train.data.lazy import LazySamples, samples_where
from care_train.data.order import permutation
from care_train.data.row_error import join_errors
from care_train.data.row_files import RowFile, open_rows
from care_train.data.schema import Sample, sample_digest, sample_from_row
from care_train.data.table_format import (
    BUILT_COLUMNS,
    BUILT_FIELDS,
    DIGEST_COLUMN,
    OTHER_COLUMNS,
)


def load_samples(settings: DataSettings, seed: int = 0) -> Sequence[Sample]:
    """The samples of a data set, in its order, each read when it is asked for.

    With `max_samples`, whole rows are drawn by `seed`; a larger number adds rows to a smaller
    one's. A row's id is its `id` column, else the file's name and the row's number. Every row is
    read once to check it, except those of `care-train data build`: it has, and their checksums are
    checked as they are read.

    Raises:
        ValueError: an unknown or missing source, no rows, rows that break the schema, or an id
            that is not unique, naming path, rows and fix.
    """
    limit = settings.max_samples
    if limit is not None and limit < 1:
        raise ValueError(f"data.max_samples: got {limit}, wanted at least 1, or null for all rows")
    if settings.path == "easy_vqa":
        samples = easy_vqa_samples(settings.split)
        return [samples[place] for place in _choose(len(samples), limit, seed)]
    path = Path(settings.path).expanduser()
    rows = open_rows(path, settings.split)
    if not rows.numbers:
        raise ValueError(f"{path}: got no rows, wanted at least 1: check data.path and data.split")
    read = _built_reader(rows, path) if rows.digests else _plain_reader(rows, path)
    samples = LazySamples(read, _choose(len(rows.numbers), limit, seed), rows.digests)
    if not rows.digests:
        _check(samples, path)
    return samples


def require_rationales(samples: Sequence[Sample]) -> Sequence[Sample]:
    """The samples that have a rationale, which the cold start learns from.

    Raises:
        ValueError: when none has, naming the first rows.
    """
    rows = samples_where(samples, lambda sample: sample.rationale is not None)
    if not rows:
        shown = ", ".join(sample.location or sample.id for sample in samples[:3])
        raise ValueError(
            f"rationale: got none in {len(samples)} rows ({shown}{', ...' * (len(samples) > 3)}), "
            "wanted text: add a `rationale` column, or choose other rows in sft.data"
        )
    return rows


def _choose(num_rows: int, limit: int | None, seed: int) -> Sequence[int]:
    if limit is None or limit >= num_rows:
        return range(num_rows)
    return sorted(permutation(num_rows, f"{seed}/rows")[:limit])


def _plain_reader(rows: RowFile, path: Path) -> Any:
    base_dir = path if path.is_dir() else path.parent

    def read(place: int) -> Sample:
        number = rows.numbers[place]
        location = f"{path.name}: row {number}"
        row = _row(rows, place, location)
        id = row.get("id")
        return sample_from_row(
            row,
            location=location,
            base_dir=base_dir,
            id=f"{path.name}/{number}" if id is None else str(id),
            source=path.name,
        )

    return read


def _built_reader(rows: RowFile, path: Path) -> Any:
    def read(place: int) -> Sample:
        location = f"{path.name}: row {rows.numbers[place]}"
        row = dict(_row(rows, place, location))
        digest, other = row.pop(DIGEST_COLUMN), json.loads(row.pop(OTHER_COLUMNS))
        # Its columns come first: the source may have had an `id` or a `source` of its own.
        columns = {**other, **{name: row[name] for name in BUILT_COLUMNS}}
        sample = Sample(
            **{name: row[name] for name in BUILT_FIELDS},
            images=tuple(image["bytes"] for image in row["images"]),
            location=location,
            columns=columns,
        )
        if (got := sample_digest(sample)) != digest:
            raise ValueError(
                f"{location}: digest: got {got}, wanted {digest}: the file is damaged; build it "
                "again"
            )
        return sample

    return read


def _row(rows: RowFile, place: int, location: str) -> Mapping[str, Any]:
    try:
        row = rows.read(place)
    except ValueError as error:
        raise ValueError(f"{location}: not JSON ({error}): correct or drop the line") from None
    if not isinstance(row, Mapping):
        raise ValueError(
            f"{location}: got a {type(row).__name__}, wanted an object with named columns"
        )
    return row


def _check(samples: LazySamples, path: Path) -> None:
    """Read every row once: all that cannot be used are named together."""
    errors: list[str] = []
    seen: dict[str, int] = {}
    for index in range(len(samples)):
        try:
            sample = samples[index]
        except ValueError as error:
            errors.append(str(error))
            continue
        first = seen.setdefault(sample.id, index)
        if first != index and not errors:
            raise ValueError(
                f"{sample.location}: id: got {sample.id!r}, already used by "
                f"{samples[first].location}: make the `id` column unique, or remove it"
            )
    if errors:
        raise ValueError(join_errors(path, errors))
