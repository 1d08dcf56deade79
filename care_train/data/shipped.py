"""The data sets that come with the installation, by the names that take a path's place."""

from collections.abc import Callable, Sequence
from pathlib import Path

from care_train.config import LEVELS, SHIPPED_DATA
from care_train.data.charts import charts_sample
from care_train.data.digits import digits_sample
from care_train.data.easy_vqa import easy_vqa_samples
from care_train.data.geometry import geometry_sample
from care_train.data.schema import Sample

NUM_ROWS = {"train": 12_000, "test": 2_000}
"""Rows of each split of those that are made: each row when it is asked for."""

_MADE = {
    "digits": (digits_sample, 4),
    "charts": (charts_sample, 3),
    "geometry": (geometry_sample, 3),
}
"""What makes a row, and the level of difficulty of the bare name."""


def is_shipped(path: str, setting: str) -> bool:
    """Whether a path is one of `config.SHIPPED_DATA`.

    Raises:
        ValueError: it has a level that there is not, and nothing on this disk has that name.
    """
    kind, _, level = path.partition("-")
    if path in SHIPPED_DATA or kind not in LEVELS or not level.isdigit() or Path(path).exists():
        return path in SHIPPED_DATA
    least, most = LEVELS[kind][0], LEVELS[kind][-1]
    raise ValueError(f"{setting}: got {path}, wanted {kind}-{least} to {kind}-{most}")


def shipped_samples(name: str, split: str, choose: Callable[[int], Sequence[int]]) -> list[Sample]:
    """Rows of one of `config.SHIPPED_DATA`.

    Args:
        name: with a level of difficulty behind a dash, if not the usual one.
        split: `train` or `test`.
        choose: places to take, of so many rows.

    Raises:
        ValueError: another split.
    """
    if name == "easy_vqa":
        samples = easy_vqa_samples(split)
        return [samples[place] for place in choose(len(samples))]
    kind, _, level = name.partition("-")
    if split not in NUM_ROWS:
        raise ValueError(f"{kind}: got split {split!r}, wanted 'train' or 'test'")
    make, usual = _MADE[kind]
    return [make(int(level or usual), split, place + 1) for place in choose(NUM_ROWS[split])]
