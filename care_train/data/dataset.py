"""A run's samples: read from their files when asked for, and drawn in a resumable order."""

import random
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import accumulate, chain
from pathlib import Path
from typing import overload

from care_train.config import FROM_PYTHON, LEVELS, SHIPPED_DATA, DataSettings, source_of
from care_train.data.built import DIGEST_COLUMN, sample_of_built
from care_train.data.charts import charts_sample
from care_train.data.columns import RowError, join_errors
from care_train.data.digits import digits_sample
from care_train.data.easy_vqa import easy_vqa_samples
from care_train.data.files import HELD_OUT, TRAINING, Rows, given_rows, open_hub_rows, open_rows
from care_train.data.geometry import geometry_sample
from care_train.data.images import ImageRef
from care_train.data.rows import RowFile
from care_train.data.schema import Sample, sample_digest, sample_from_row

NUM_ROWS = {"train": 12_000, "test": 2_000}
"""Rows of each split of the shipped data sets that are drawn here."""

_DRAWN = {
    "digits": (digits_sample, 4),
    "charts": (charts_sample, 3),
    "geometry": (geometry_sample, 3),
}
"""What draws a row, and the level of difficulty of the bare name."""


@dataclass(frozen=True)
class LazySamples(Sequence[Sample]):
    """A sequence that reads a row anew each time it is asked for, and holds none; slices too."""

    read: Callable[[int], Sample]
    """The sample at a place of the data set."""
    places: Sequence[int]
    """Which places of the data set, in order."""
    stored_digests: Callable[[], Sequence[str]] | None = None
    """The checksum of each place, where the files hold them; `read` then checks them."""

    def __len__(self) -> int:
        return len(self.places)

    @overload
    def __getitem__(self, index: int) -> Sample: ...
    @overload
    def __getitem__(self, index: slice) -> "LazySamples": ...
    def __getitem__(self, index: int | slice) -> "Sample | LazySamples":
        if isinstance(index, slice):
            return replace(self, places=self.places[index])
        return self.read(self.places[index])


@dataclass(frozen=True)
class PromptOrder:
    """An endless order of rows, a fresh permutation per epoch: a function of the position alone."""

    num_samples: int
    seed: int

    def take(self, position: int, count: int) -> list[int]:
        """Row indices of `count` draws from `position` on, counted from the run's start."""
        indices = []
        for draw in range(position, position + count):
            epoch, place = divmod(draw, self.num_samples)
            indices.append(permutation(self.num_samples, f"{self.seed}/epoch/{epoch}")[place])
        return indices


@lru_cache(maxsize=4)
def permutation(length: int, key: str) -> tuple[int, ...]:
    """A permutation of range(length) fixed by `key`, the same on every machine."""
    indices = list(range(length))
    random.Random(key).shuffle(indices)
    return tuple(indices)


def load_samples(
    settings: DataSettings,
    seed: int = 0,
    key: str = "data",
    given: Mapping[str, Rows] | None = None,
) -> Sequence[Sample]:
    """The samples of a data set, in its order, each read when it is asked for.

    A row's id is its `id` column, else the file's name and the row's number. Every row is read once
    to check it; those of `care-train data build` have been, and have checksums.

    Args:
        settings: where the rows are, and which.
        seed: draws the rows of `max_samples`; a larger number adds to a smaller one's.
        key: the settings' own name, for errors. Without a split, `data` and `sft.data` are the
            training split, any other key a held-out one.
        given: rows that a program hands over, by the path that stands for them.

    Raises:
        ValueError: an unknown or missing source, no rows, or rows that cannot be used, all of them
            named: those that break the schema, and those whose id another one has.
    """
    limit, source = settings.max_samples, source_of(settings.path)
    is_training = key in ("data", "sft.data")
    splits, setting = (TRAINING, f"{key}.path") if is_training else (HELD_OUT, key)
    if _is_shipped(source.path, setting):
        return _shipped_samples(source.path, source.split or splits[0], limit, seed)
    path = Path(source.path).expanduser()
    if settings.path.startswith(FROM_PYTHON):
        files = [given_rows(settings.path, given or {}, setting)]
    elif (hub_rows := open_hub_rows(source, splits, setting)) is not None:
        files = [hub_rows]
    else:
        files = open_rows(source.path, key=setting, split=source.split, default_splits=splits)
    starts = list(accumulate(map(len, files), initial=0))
    if not starts[-1]:
        raise ValueError(f"{setting}: {path} has no rows, wanted at least 1")

    def read(place: int) -> Sample:
        number = bisect_right(starts, place) - 1
        return _read(files[number], place - starts[number], path.name)

    def stored() -> Sequence[str]:
        return list(chain.from_iterable(file.built_column(DIGEST_COLUMN) for file in files))

    is_built = all(file.is_built for file in files)
    places = _choose(starts[-1], limit, seed)
    samples = LazySamples(read, places, stored if is_built else None)
    if not is_built:
        _check(samples, f"{key}: {path}")
    elif len(files) > 1:  # each has been checked by itself
        ids = chain.from_iterable(file.built_column("id") for file in files)
        first: dict[str, int] = {}
        for place, id in enumerate(ids):
            if first.setdefault(id, place) != place:
                raise ValueError(_used_twice(read(place), read(first[id])))
    return samples


def require_rationales(samples: Sequence[Sample]) -> Sequence[Sample]:
    """The samples that have a rationale, which the cold start learns from.

    Raises:
        ValueError: when none has, naming the first rows.
    """
    rows = samples_at(samples, [i for i, row in enumerate(samples) if row.rationale is not None])
    if not rows:
        shown = ", ".join(sample.where for sample in samples[:3])
        raise ValueError(
            f"rationale: got none in {len(samples)} rows ({shown}{', ...' * (len(samples) > 3)}), "
            "wanted text: add a `rationale` column, or choose other rows in sft.data"
        )
    return rows


def sample_digests(samples: Iterable[Sample]) -> Iterator[str]:
    """Each row's `sample_digest`.

    Raises:
        ValueError: a missing image file, naming the row.
    """
    if isinstance(samples, LazySamples) and samples.stored_digests is not None:
        stored = samples.stored_digests()
        return (stored[place] for place in samples.places)
    files: dict[ImageRef, str] = {}
    return (sample_digest(sample, files) for sample in samples)


def samples_at(samples: Sequence[Sample], indices: Sequence[int]) -> Sequence[Sample]:
    """The samples at these indices; where `samples` are lazy so are they, and none is read."""
    if isinstance(samples, LazySamples):
        return replace(samples, places=[samples.places[i] for i in indices])
    return [samples[index] for index in indices]


def _choose(num_rows: int, limit: int | None, seed: int) -> Sequence[int]:
    if limit is None or limit >= num_rows:
        return range(num_rows)
    return sorted(permutation(num_rows, f"{seed}/rows")[:limit])


def _read(file: RowFile, place: int, source: str) -> Sample:
    row, location = file.row(place), file.location(place)
    if file.is_built:
        return sample_of_built(row, location)
    own = row.get("id")
    id = f"{file.name}/{file.number(place)}" if own is None else str(own)
    return sample_from_row(row, location=location, base_dir=file.base_dir, id=id, source=source)


def _is_shipped(path: str, setting: str) -> bool:
    """Whether a path is one of `config.SHIPPED_DATA`.

    Raises:
        ValueError: it has a level that there is not, and nothing on this disk has that name.
    """
    kind, _, level = path.partition("-")
    if path in SHIPPED_DATA or kind not in LEVELS or not level.isdigit() or Path(path).exists():
        return path in SHIPPED_DATA
    least, most = LEVELS[kind][0], LEVELS[kind][-1]
    raise ValueError(f"{setting}: got {path}, wanted {kind}-{least} to {kind}-{most}")


def _shipped_samples(name: str, split: str, limit: int | None, seed: int) -> list[Sample]:
    if name == "easy_vqa":
        samples = easy_vqa_samples(split)
        return [samples[place] for place in _choose(len(samples), limit, seed)]
    kind, _, level = name.partition("-")
    if split not in NUM_ROWS:
        raise ValueError(f"{kind}: got split {split!r}, wanted 'train' or 'test'")
    draw, usual = _DRAWN[kind]
    places = _choose(NUM_ROWS[split], limit, seed)
    return [draw(int(level or usual), split, place + 1) for place in places]


def _check(samples: LazySamples, where: str) -> None:
    """Read every row once: all that cannot be used are named together."""
    errors: list[str] = []
    seen: dict[str, int] = {}
    for index in range(len(samples)):
        try:
            sample = samples[index]
        # A file that cannot be read on is no row's fault: that error ends the check.
        except RowError as error:
            errors.append(str(error))
            continue
        first = seen.setdefault(sample.id, index)
        if first != index:
            errors.append(_used_twice(sample, samples[first]))
    if errors:
        raise ValueError(join_errors(where, errors))


def _used_twice(sample: Sample, first: Sample) -> str:
    return (
        f"{sample.location}: id: got {sample.id!r}, already used by {first.location}: "
        "make the `id` column unique, or remove it"
    )
