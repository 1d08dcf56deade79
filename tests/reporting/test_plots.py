"""Pictures of whatever a run has logged, of the size promised; intervals by hand."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from care_train.reporting import mean_interval, proportion_interval
from care_train.reporting.charts import smoothed
from care_train.reporting.plots import plot_comparison, plot_learning_curves


def _records(steps: int, offset: float = 0.0) -> list[dict[str, Any]]:
    keys = ("reward", "accuracy", "format", "kl", "response_length", "think_length")
    groups = {"groups": 8, "groups_skipped": 2, "groups_rescued": 1, "reflection_success": 0.5}
    train = [
        {"phase": "train", "step": step, **dict.fromkeys(keys, offset + step / 100), **groups}
        for step in range(1, steps + 1)
    ]
    evaluation = {"accuracy": 0.2, "greedy_accuracy": 0.3, "format": 0.9}
    return [{"phase": "eval", "step": 0, **evaluation}, *train]


def _size(path: Path) -> tuple[int, int]:
    """Width and height of a PNG that shows something."""
    with Image.open(path) as image:
        assert image.format == "PNG"
        colors = image.convert("RGB").getcolors(maxcolors=1 << 20)
        assert colors is None or len(colors) > 10
        return image.size


def _curves(records: list[dict[str, Any]], path: Path) -> tuple[int, int]:
    """The size of their picture, which shows something."""
    plot_learning_curves(records, path)
    return _size(path)


def test_learning_curves(tmp_path: Path) -> None:
    """A whole run makes two rows of three panels, an engine with log-probs a seventh; missing names
    and nulls leave panels out, never fail."""
    path = tmp_path / "new" / "curves.png"
    assert _curves(_records(40), path) == (1890, 930)
    assert _curves([record | {"gap_mean": 1e-4} for record in _records(40)], path) == (1890, 1395)
    for little in (
        _records(1),
        _records(0),
        [{"phase": "train", "step": 1, "reward": None, "kl": 0.1}],
        [{"phase": "train", "step": step, "groups": 4.0} for step in range(30)],
        [{"phase": "sft", "step": step, "loss": 1.0 / (step + 1)} for step in range(30)],
    ):
        assert _curves(little, path)[0] >= 630, little
    with pytest.raises(ValueError, match="to plot"):
        plot_learning_curves([], path)


def test_comparison(tmp_path: Path) -> None:
    """Two algorithms, one of them with a single seed, make one picture; seeds share a step."""
    runs = {"CARE": [_records(30, 0.1), _records(28, 0.2)], "GRPO": [_records(30)]}
    for options in ({}, {"key": "greedy_accuracy", "phase": "eval"}):
        plot_comparison(runs, tmp_path / "comparison.png", **options)
        assert _size(tmp_path / "comparison.png") == (1140, 660)
    with pytest.raises(ValueError, match=r"runs\['CARE'\]"):
        plot_comparison({"CARE": [_records(3), []]}, tmp_path / "comparison.png")


def test_smoothing_keeps_constants() -> None:
    """The moving average has no edge effect on a constant, and is centred inside."""
    assert smoothed(np.ones(7), 5) == pytest.approx(np.ones(7))
    assert smoothed(np.arange(9.0), 3)[4] == 4.0
    assert math.isclose(smoothed(np.arange(3.0), 9)[1], 1.0)


def test_mean_interval() -> None:
    """1.96 s / sqrt(n), s the sample standard deviation: of 1, 2, 3 it is 1; of one seed none."""
    assert mean_interval([1.0, 2.0, 3.0]) == pytest.approx((2.0, 1.96 / math.sqrt(3)))
    assert mean_interval([0.5]) == pytest.approx((0.5, math.nan), nan_ok=True)
    with pytest.raises(ValueError, match="at least one"):
        mean_interval([])


@pytest.mark.parametrize(
    ("successes", "total", "low", "high"),
    [(8, 10, 0.4902, 0.9433), (0, 10, 0, 0.2775), (10, 10, 0.7225, 1), (50, 100, 0.4038, 0.5962)],
)
def test_proportion_interval(successes: int, total: int, low: float, high: float) -> None:
    """Wilson's interval, inside [0, 1] even for none and all; nonsense is an error."""
    assert proportion_interval(successes, total) == pytest.approx((low, high), abs=1e-4)
    with pytest.raises(ValueError, match="successes"):
        proportion_interval(total + 1, total)
    with pytest.raises(ValueError, match="total"):
        proportion_interval(0, 0)
