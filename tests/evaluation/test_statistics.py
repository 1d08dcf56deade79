"""pass@k, majority@k, intervals and the macro average."""

from itertools import combinations
from math import sqrt
from statistics import fmean, stdev

import pytest

from care_train.evaluation.table import (
    macro_average,
    majority_at_k,
    pass_at_k,
    summarize,
)


@pytest.mark.parametrize("n", [1, 2, 5, 8])
def test_pass_at_k_is_the_share_of_draws_with_a_right_one(n):
    """The estimator equals the mean over every choice of k of the n responses."""
    for correct in range(n + 1):
        flags = [1] * correct + [0] * (n - correct)
        for k in range(1, n + 1):
            share = fmean(float(any(draw)) for draw in combinations(flags, k))
            assert pass_at_k(n, correct, k) == pytest.approx(share, abs=1e-12)


@pytest.mark.parametrize(("n", "c", "k"), [(4, 2, 5), (4, 5, 1), (4, 2, 0), (4, -1, 1)])
def test_pass_at_k_wants_possible_counts(n, c, k):
    """More draws than responses, or more right ones, is an error."""
    with pytest.raises(ValueError, match="pass_at_k"):
        pass_at_k(n, c, k)


@pytest.mark.parametrize(
    ("votes", "accuracies", "k", "wanted"),
    [
        ("AAB", (1, 1, 0), 3, 1.0),
        ("ABB", (1, 0, 0), 3, 0.0),
        ("AB", (1, 0), 2, 1.0),  # a tie: the first given
        ("BA", (0, 1), 2, 0.0),
        (["", "", "A"], (0, 0, 1), 3, 1.0),  # no answer is no vote
        (["", ""], (0, 0), 2, 0.0),
        ("AABB", (1, 1, 0, 0), 2, 0.5),  # a mean over blocks of k
        ("AAB", (1, 1, 0), 2, 1.0),  # the rest is left out
    ],
)
def test_majority_at_k(votes, accuracies, k, wanted):
    """The commonest answer's accuracy."""
    assert majority_at_k(list(votes), accuracies, k) == wanted


def _records(accuracies: dict[int, list[list[float]]]) -> list[dict]:
    """From seed -> question -> samples' accuracies."""
    return [
        {
            "id": str(question),
            "seed": seed,
            "sample": sample,
            "group": "even" if question % 2 == 0 else "odd",
            "accuracy": accuracy,
            "exact": accuracy == 1.0,
            "format": 1.0,
            "finished": sample == 0,
            "tokens": 10 + sample,
            "vote": "A" if accuracy else "B",
        }
        for seed, questions in accuracies.items()
        for question, samples in enumerate(questions)
        for sample, accuracy in enumerate(samples)
    ]


def test_a_summary_is_means_over_seeds_questions_and_samples():
    """Accuracy per seed, the paper's interval over seeds, groups, and both @k numbers."""
    records = _records({0: [[1, 0], [0, 0], [1, 1]], 1: [[1, 1], [1, 0], [1, 1]]})
    summary = summarize(records, [1, 2])
    assert summary["per_seed"] == [0.5, 5 / 6]
    assert summary["accuracy"] == pytest.approx(fmean([0.5, 5 / 6]))
    assert summary["half_width"] == pytest.approx(1.96 * stdev([0.5, 5 / 6]) / sqrt(2))
    assert summary["num_questions"] == 3
    assert summary["pass@k"][1] == pytest.approx(summary["accuracy"])
    assert summary["pass@k"][2] == pytest.approx(5 / 6)
    assert summary["majority@k"][2] == pytest.approx(5 / 6)
    assert summary["truncated"] == 0.5 and summary["tokens"] == 10.5
    assert summary["groups"]["odd"] == {"num_questions": 1, "accuracy": 0.25}
    low, high = summary["interval"]
    assert 0 <= low < summary["accuracy"] < high <= 1


def test_one_seed_has_no_interval_over_seeds():
    """It says nothing about the spread."""
    assert summarize(_records({7: [[1], [0]]}), [])["half_width"] is None


def test_the_macro_average_is_unweighted_and_per_seed():
    """Benchmarks count alike whatever their size (Sec. 8.3); its interval is over seeds."""
    small = summarize(_records({0: [[1]], 1: [[0]]}), [])
    large = summarize(_records({0: [[0]] * 9, 1: [[1]] * 9}), [])
    macro = macro_average({"a": small, "b": large})
    assert macro["per_seed"] == [0.5, 0.5] and macro["accuracy"] == 0.5
    assert macro["half_width"] == 0.0
