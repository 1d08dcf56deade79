"""Quantities against the training step: values, moving averages, seeds side by side, intervals."""

import math
from collections.abc import Mapping, Sequence
from statistics import fmean, stdev
from typing import Any

import numpy as np

Records = Sequence[Mapping[str, Any]]
_Z = 1.96


def series(records: Records, phase: str, key: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of `key`, where a record of `phase` has one, by step.

    Args:
        records: of a metrics.jsonl.
        phase: train | eval | sft.
        key: the quantity's name.
    """
    points = sorted(
        (record["step"], float(record[key]))
        for record in records
        if record["phase"] == phase and record.get(key) is not None
    )
    return np.array([step for step, _ in points]), np.array([value for _, value in points])


def seed_curves(
    seeds: Sequence[Records], phase: str, key: str
) -> tuple[np.ndarray, list[np.ndarray]]:
    """The steps every seed has a value of `key` at, and each seed's values there; maybe none."""
    values = [dict(zip(*series(records, phase, key), strict=True)) for records in seeds]
    steps = sorted(set.intersection(*(set(one) for one in values))) if values else []
    return np.array(steps), [np.array([one[step] for step in steps]) for one in values]


def average_window(count: int) -> int:
    """An odd number of points, about a twentieth of them."""
    return 1 if count < 10 else 2 * (count // 40 + 1) + 1


def smoothed(values: np.ndarray, window: int) -> np.ndarray:
    """Centred moving average; towards the ends over the points there are.

    Args:
        values: at least one.
        window: an odd number of points.
    """
    kernel = np.ones(min(window, 2 * len(values) - 1))
    half = len(kernel) // 2
    weights = np.convolve(np.ones(len(values)), kernel)[half : half + len(values)]
    return np.convolve(values, kernel)[half : half + len(values)] / weights


def mean_interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean over seeds and the half width of its 95 % interval, as the paper reports them.

    Args:
        values: one number per seed.

    Returns:
        The mean, and 1.96 s / sqrt(n) with s the sample standard deviation; NaN for one seed,
        which says nothing about the spread.

    Raises:
        ValueError: there are no values.
    """
    if not values:
        raise ValueError("values: got none, wanted at least one seed")
    if len(values) == 1:
        return float(values[0]), math.nan
    return fmean(values), _Z * stdev(values) / math.sqrt(len(values))


def proportion_interval(successes: float, total: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a binomial share: unlike 1.96 sigma, it stays inside [0, 1].

    Args:
        successes: how many of `total` succeeded; fractions (partial credit) are fine.
        total: how many there were.

    Returns:
        The lower and the upper end.

    Raises:
        ValueError: `total` is not positive, or `successes` outside [0, total].
    """
    if total < 1:
        raise ValueError(f"total: got {total}, wanted at least 1")
    if not 0 <= successes <= total:
        raise ValueError(f"successes: got {successes}, wanted 0 to {total}")
    share = successes / total
    scale = 1 + _Z**2 / total
    centre = (share + _Z**2 / (2 * total)) / scale
    half = _Z * math.sqrt(share * (1 - share) / total + _Z**2 / (4 * total**2)) / scale
    return max(0.0, centre - half), min(1.0, centre + half)
