"""Read a data set into samples.

datasets and pyarrow take seconds to load, so they are imported only by the readers that need them.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from care_train.data.easy_vqa import easy_vqa_samples
from care_train.data.order import permutation
from care_train.data.schema import Sample, sample_from_row
from care_train.settings import DataSettings

if TYPE_CHECKING:
    import datasets

ACCEPTED = "easy_vqa, a .jsonl, .json or .parquet file, or a folder written by Dataset.save_to_disk"
"""What `data.path` may name."""

_NUM_ERRORS_SHOWN = 5


@dataclass(frozen=True)
class _Rows:
    """Rows not read yet."""

    numbers: Sequence[int]
    """Row numbers as errors name them: from 1, and for .jsonl the line."""
    read: Callable[[int], object]
    """The row at a place in `numbers`."""


def load_samples(settings: DataSettings, seed: int = 0) -> list[Sample]:
    """The samples of a data set, in its order.

    With `max_samples`, whole rows are drawn by `seed`; a larger number adds rows to a smaller
    one's. A row's id is its `id` column, else the file's name and the row's number.

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
    rows = _open(path, settings.split)
    if not rows.numbers:
        raise ValueError(f"{path}: got no rows, wanted at least 1: check data.path and data.split")
    base_dir = path if path.is_dir() else path.parent
    samples, errors = [], []
    for place in _choose(len(rows.numbers), limit, seed):
        try:
            samples.append(_sample(rows, place, path, base_dir))
        except ValueError as error:
            errors.append(str(error))
    if errors:
        raise ValueError(_summary(path, errors))
    _check_ids(samples)
    return samples


def require_rationales(samples: Sequence[Sample]) -> int:
    """How many samples have a rationale, which the cold start learns from.

    Raises:
        ValueError: when none has, naming the first rows.
    """
    count = sum(sample.rationale is not None for sample in samples)
    if not count:
        shown = ", ".join(sample.location or sample.id for sample in samples[:3])
        raise ValueError(
            f"rationale: got none in {len(samples)} rows ({shown}{', ...' * (len(samples) > 3)}), "
            "wanted text: add a `rationale` column, or choose other rows in sft.data"
        )
    return count


def _choose(num_rows: int, limit: int | None, seed: int) -> list[int]:
    if limit is None or limit >= num_rows:
        return list(range(num_rows))
    return sorted(permutation(num_rows, f"{seed}/rows")[:limit])


def _sample(rows: _Rows, place: int, path: Path, base_dir: Path) -> Sample:
    number = rows.numbers[place]
    location = f"{path.name}: row {number}"
    try:
        row = rows.read(place)
    except ValueError as error:
        raise ValueError(f"{location}: not JSON ({error}): correct or drop the line") from None
    if not isinstance(row, Mapping):
        raise ValueError(
            f"{location}: got a {type(row).__name__}, wanted an object with named columns"
        )
    id = row.get("id")
    return sample_from_row(
        row,
        location=location,
        base_dir=base_dir,
        id=f"{path.name}/{number}" if id is None else str(id),
        source=path.name,
    )


def _open(path: Path, split: str) -> _Rows:
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


def _open_jsonl(path: Path) -> _Rows:
    lines = path.read_bytes().split(b"\n")
    numbers = [number for number, line in enumerate(lines, 1) if line.strip()]
    return _Rows(numbers, lambda place: json.loads(lines[numbers[place] - 1]))


def _open_json(path: Path) -> _Rows:
    try:
        values = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error}): correct the file") from None
    if not isinstance(values, list):
        raise ValueError(
            f"{path}: got a {type(values).__name__} at the top, wanted a list of rows: save the "
            "list alone"
        )
    return _Rows(range(1, len(values) + 1), values.__getitem__)


def _open_parquet(path: Path) -> _Rows:
    import datasets
    import pyarrow
    from pyarrow import parquet

    try:
        table = parquet.read_table(path)
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise ValueError(f"{path}: not a Parquet file ({error}): write it again") from None
    # Without the datasets library's note in the file, a column type may be one it does not know.
    if b"huggingface" in (table.schema.metadata or {}):
        _check_features(path, datasets.Features.from_arrow_schema(table.schema))
    # One row at a time: selecting from a column of images beyond 2 GiB overflows Arrow's offsets.
    return _Rows(range(1, table.num_rows + 1), lambda place: table.slice(place, 1).to_pylist()[0])


def _open_folder(path: Path, split: str) -> _Rows:
    import datasets

    try:
        loaded = datasets.load_from_disk(str(path))
    except FileNotFoundError:
        raise ValueError(f"data.path: {path} is no saved data set: wanted {ACCEPTED}") from None
    if isinstance(loaded, datasets.DatasetDict):
        if split not in loaded:
            raise ValueError(f"data.split: got {split!r}, {path} has {', '.join(map(str, loaded))}")
        loaded = loaded[split]
    _check_features(path, loaded.features)
    # Arrow rows keep images as they were stored; the plain format would decode them.
    rows: Any = loaded.with_format("arrow")
    return _Rows(range(1, len(loaded) + 1), lambda place: rows[place].to_pylist()[0])


def _check_features(path: Path, features: "datasets.Features") -> None:
    answer = features.get("answer")
    if hasattr(answer, "names"):
        raise ValueError(
            f"{path}: answer: got a ClassLabel column, whose rows hold class numbers, wanted text: "
            "store each label's name"
        )


def _summary(path: Path, errors: Sequence[str]) -> str:
    if len(errors) == 1:
        return errors[0]
    shown = errors[:_NUM_ERRORS_SHOWN]
    rest = len(errors) - len(shown)
    tail = [f"and {rest} more"] if rest else []
    return "\n".join([f"{path}: {len(errors)} rows cannot be used:", *shown, *tail])


def _check_ids(samples: Sequence[Sample]) -> None:
    seen: dict[str, Sample] = {}
    for sample in samples:
        first = seen.setdefault(sample.id, sample)
        if first is not sample:
            raise ValueError(
                f"{sample.location}: id: got {sample.id!r}, already used by {first.location}: make "
                "the `id` column unique, or remove it"
            )
