"""Pictures: written, of the size promised, and whatever a run has logged."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from care_train.reporting.curves import smoothed
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


def test_learning_curves(tmp_path: Path) -> None:
    """A whole run makes two rows of three panels."""
    plot_learning_curves(_records(40), tmp_path / "new" / "curves.png")
    assert _size(tmp_path / "new" / "curves.png") == (1890, 930)


def test_an_engine_with_log_probs_gets_a_panel(tmp_path: Path) -> None:
    """The gap between trainer and rollouts is a seventh panel, in a third row."""
    records = [record | {"gap_mean": 1e-4} for record in _records(40)]
    plot_learning_curves(records, tmp_path / "curves.png")
    assert _size(tmp_path / "curves.png") == (1890, 1395)


@pytest.mark.parametrize(
    "records",
    [
        _records(1),
        _records(0),
        [{"phase": "train", "step": 1, "reward": None, "kl": 0.1}],
        [{"phase": "train", "step": step, "groups": 4.0} for step in range(30)],
        [{"phase": "sft", "step": step, "loss": 1.0 / (step + 1)} for step in range(30)],
    ],
    ids=["one step", "evaluations alone", "nulls", "groups alone", "cold start alone"],
)
def test_learning_curves_of_little(tmp_path: Path, records: list[dict[str, Any]]) -> None:
    """Missing names and nulls leave panels out, never fail."""
    plot_learning_curves(records, tmp_path / "curves.png")
    assert _size(tmp_path / "curves.png")[0] >= 630


def test_nothing_to_plot_is_an_error(tmp_path: Path) -> None:
    """An empty run has no picture, and says so."""
    with pytest.raises(ValueError, match="to plot"):
        plot_learning_curves([], tmp_path / "curves.png")


def test_comparison(tmp_path: Path) -> None:
    """Two algorithms, one of them with a single seed, make one picture."""
    runs = {"CARE": [_records(30, 0.1), _records(28, 0.2)], "GRPO": [_records(30)]}
    plot_comparison(runs, tmp_path / "comparison.png")
    assert _size(tmp_path / "comparison.png") == (1140, 660)
    plot_comparison(runs, tmp_path / "greedy.png", key="greedy_accuracy", phase="eval")
    assert _size(tmp_path / "greedy.png") == (1140, 660)


def test_comparison_needs_shared_steps(tmp_path: Path) -> None:
    """A label whose seeds share no step is an error that names it."""
    with pytest.raises(ValueError, match=r"runs\['CARE'\]"):
        plot_comparison({"CARE": [_records(3), []]}, tmp_path / "comparison.png")


def test_smoothing_keeps_constants() -> None:
    """The moving average has no edge effect on a constant, and is centred inside."""
    assert smoothed(np.ones(7), 5) == pytest.approx(np.ones(7))
    assert smoothed(np.arange(9.0), 3)[4] == 4.0
    assert math.isclose(smoothed(np.arange(3.0), 9)[1], 1.0)
