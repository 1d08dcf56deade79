"""Intervals against values computed by hand."""

import math

import pytest

from care_train.reporting import mean_interval, proportion_interval


def test_mean_interval() -> None:
    """1.96 s / sqrt(n), s the sample standard deviation: of 1, 2, 3 it is 1."""
    mean, half = mean_interval([1.0, 2.0, 3.0])
    assert mean == 2.0
    assert half == pytest.approx(1.96 / math.sqrt(3))


def test_mean_of_one_seed_has_no_interval() -> None:
    """One seed says nothing about the spread; no seed is an error."""
    mean, half = mean_interval([0.5])
    assert mean == 0.5 and math.isnan(half)
    with pytest.raises(ValueError, match="at least one"):
        mean_interval([])


@pytest.mark.parametrize(
    ("successes", "total", "low", "high"),
    [
        (8, 10, 0.4902, 0.9433),
        (0, 10, 0.0, 0.2775),
        (10, 10, 0.7225, 1.0),
        (50, 100, 0.4038, 0.5962),
    ],
)
def test_proportion_interval(successes: int, total: int, low: float, high: float) -> None:
    """Wilson's interval, inside [0, 1] even for none and all."""
    assert proportion_interval(successes, total) == pytest.approx((low, high), abs=1e-4)


def test_proportion_interval_refuses_nonsense() -> None:
    """More successes than trials, or no trials, are errors."""
    with pytest.raises(ValueError, match="successes"):
        proportion_interval(11, 10)
    with pytest.raises(ValueError, match="total"):
        proportion_interval(0, 0)
