"""A quantity against the training step: its values, its moving average, seeds side by side."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

Records = Sequence[Mapping[str, Any]]


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
