"""Interleaving, percentiles and the measurement of peak memory."""

import pytest

from bench.measure import Spread, interleave, peak_memory
from bench.peers import MeasurementError, make_problem


def test_rounds_rotate_so_that_nobody_is_always_first() -> None:
    order: list[str] = []
    calls = {name: (lambda name=name: order.append(name)) for name in "abc"}
    seconds = interleave(calls, 3, 10.0, "cpu")
    assert order == list("abc" + "bca" + "cab")
    assert {name: len(values) for name, values in seconds.items()} == {"a": 3, "b": 3, "c": 3}


def test_a_call_over_its_budget_still_runs_once() -> None:
    counts = {"slow": 0, "fast": 0}

    def count(name: str) -> None:
        counts[name] += 1

    calls = {name: (lambda name=name: count(name)) for name in counts}
    interleave({"slow": calls["slow"]}, 4, 0.0, "cpu")
    interleave({"fast": calls["fast"]}, 4, 10.0, "cpu")
    assert counts == {"slow": 1, "fast": 4}


def test_spread_orders_its_percentiles() -> None:
    assert Spread.of([5.0, 1.0, 3.0, 2.0, 4.0, 6.0]) == Spread(2.0, 3.5, 5.0)
    assert Spread.of([2.0]) == Spread(2.0, 2.0, 2.0)


def test_peak_memory_counts_results_and_logits() -> None:
    rows, width, vocab = 64, 256, 32_000
    peaks = peak_memory("torch", [rows // 2, rows], width, vocab, device="cpu")
    results = vocab * width * 2
    logits = rows * vocab * (2 + 4)
    assert results + logits / 2 < peaks[rows] < 4 * (results + logits)
    assert peaks[rows // 2] < peaks[rows]


def test_what_cannot_be_measured_is_named() -> None:
    with pytest.raises(MeasurementError, match="peak memory of nobody"):
        peak_memory("nobody", [4], 8, 16, device="cpu")


@pytest.mark.parametrize("fraction", [0.25, 0.5, 0.75, 1.0])
def test_active_rows_are_the_asked_fraction(fraction: float) -> None:
    problem = make_problem(64, 8, 100)
    assert (problem.with_active(fraction).advantages != 0).sum() == 64 * fraction
