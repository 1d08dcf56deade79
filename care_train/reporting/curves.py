"""Quantities against the training step: values, moving averages, seeds side by side, intervals."""

import math
from collections.abc import Mapping, Sequence
from statistics import fmean, stdev
from typing import Any

import numpy as np

Records = Sequence[Mapping[str, Any]]
_Z = 1.96


def seed_curves(
    seeds: Sequence[Records], phase: str, key: str
) -> tuple[np.ndarray, list[np.ndarray]]:
    """The steps every seed has a value of `key` at, and each seed's values there; maybe none."""
    values = [
        {one["step"]: float(one[key]) for one in records if _has(one, phase, key)}
        for records in seeds
    ]
    steps = sorted(set.intersection(*(set(one) for one in values))) if values else []
    return np.array(steps), [np.array([one[step] for step in steps]) for one in values]


def _has(record: Mapping[str, Any], phase: str, key: str) -> bool:
    return record["phase"] == phase and record.get(key) is not None


def average_window(count: int) -> int:
    """An odd number of points, about a twentieth of them."""
    return 1 if count < 10 else 2 * (count // 40 + 1) + 1


def smoothed(values: np.ndarray, window: int) -> np.ndarray:
    """Moving average over an odd number of points around each; at the ends over those there are."""
    kernel = np.ones(min(window, 2 * len(values) - 1))
    half = len(kernel) // 2
    weights = np.convolve(np.ones(len(values)), kernel)[half : half + len(values)]
    return np.convolve(values, kernel)[half : half + len(values)] / weights


def mean_interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean over seeds and the half width of its 95 % interval, as the paper reports them.

    That is 1.96 s / sqrt(n), s the sample standard deviation; NaN for one seed, which says nothing
    about the spread. No seed is a ValueError.
    """
    if not values:
        raise ValueError("values: got none, wanted at least one seed")
    if len(values) == 1:
        return float(values[0]), math.nan
    return fmean(values), _Z * stdev(values) / math.sqrt(len(values))


def proportion_interval(successes: float, total: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a binomial share: unlike 1.96 sigma, it stays inside [0, 1].

    Successes may be fractions (partial credit); those outside [0, total] are a ValueError.
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
