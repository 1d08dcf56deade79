"""pass@k, majority@k, means and intervals; trainings of several seeds as one row (`table`)."""

import json
import re
from itertools import combinations
from math import sqrt
from pathlib import Path
from statistics import fmean, stdev

import pytest

from care_train.cli import main
from care_train.evaluation.table import (
    combine_runs,
    macro_average,
    majority_at_k,
    pass_at_k,
    results_markdown,
    summarize,
)
from care_train.reporting import proportion_interval


@pytest.fixture
def runs(tmp_path) -> Path:
    """Evaluations of three trainings; `again` of the first model, `other` with another seed."""
    for name, model, seed, one, two in (
        ("first", 1, 0, 0.70, 0.2),
        ("second", 2, 0, 0.74, 0.3),
        ("third", 3, 0, 0.78, 0.1),
        ("again", 1, 0, 0.70, 0.2),
        ("other", 4, 3, 0.70, 0.2),
    ):
        scores = {"mathvista": one, "mmmu": two}
        results = {
            **{"questions": {}, "decoding": {}, "seeds": [seed], "samples": 1, "weights": model},
            "benchmarks": {n: {"accuracy": v, "num_questions": 100} for n, v in scores.items()},
            "macro": {"accuracy": (one + two) / 2},
        }
        (tmp_path / name).mkdir()
        (tmp_path / name / "results.json").write_text(json.dumps(results))
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "results.json").write_text('{"benchmarks": {}}')
    return tmp_path


def test_trainings_become_one_row(runs, capsys):
    """The mean and 1.96 s / sqrt(n) of the runs' means, each one's numbers, the paper's rows."""
    three = [runs / name for name in ("first", "second", "third")]
    named = ",".join(map(str, three))
    assert main(["table", f"tiny={named}", f"single={three[0]}"]) == 0
    table = capsys.readouterr().out
    assert re.search(r"\| tiny \(n = 3\) .*\| 74\.0 ± 4\.5 \| .*\| 20\.0 ± 11\.3 \|", table)
    assert re.search(r"\| single \(n = 1\) .*\| 70\.0 \| .*\| 20\.0 \|", table)
    assert "| Qwen2.5-VL-7B + CARE | 74.7 |" in table
    assert f"|  | {' | '.join(map(str, three))} | mean |" in table
    assert "| mathvista | 70.0 | 74.0 | 78.0 | 74.0 ± 4.5 |" in table
    assert combine_runs(three)["macro"]["accuracy"] == pytest.approx(0.47)


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        (
            "x={0}/first,{0}/again",
            r"again: got the model of .*first, wanted one evaluation of each",
        ),
        ("x={0}/first,{0}/other", r"other: seeds: got \[3\], wanted \[0\] as in .*first"),
        ("x={0}/first,{0}/none", r"none: has no results.json"),
        ("x={0}/old", r"old/results.json: got no 'questions', wanted one written by this version"),
        ("{0}/first", r"got '.*/first', wanted NAME=RUN,RUN"),
    ],
)
def test_only_like_runs_are_averaged(groups, message, runs, capfd):
    """The same questions and decodes of different models; anything else is named."""
    assert main(["table", groups.format(runs)]) == 2
    assert re.search(message, capfd.readouterr().err)


@pytest.mark.parametrize("n", [1, 2, 5])
def test_pass_at_k_is_the_share_of_draws_with_a_right_one(n):
    """The estimator equals the mean over every choice of k of the n responses."""
    for correct in range(n + 1):
        flags = [1] * correct + [0] * (n - correct)
        for k in range(1, n + 1):
            share = fmean(float(any(draw)) for draw in combinations(flags, k))
            assert pass_at_k(n, correct, k) == pytest.approx(share, abs=1e-12)


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


def _records(accuracies: dict[int, list[list[float]]], groups=("even", "odd")) -> list[dict]:
    """From seed -> question -> samples' accuracies."""
    return [
        {"id": str(question), "seed": seed, "sample": sample, "group": groups[question % 2]}
        | {"accuracy": accuracy, "exact": accuracy == 1.0, "format": 1.0}
        | {"finished": sample == 0, "tokens": 10 + sample, "vote": "A" if accuracy else "B"}
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
    assert summary["pass@k"][2] == summary["majority@k"][2] == pytest.approx(5 / 6)
    assert summary["truncated"] == 0.5 and summary["tokens"] == 10.5
    assert summary["groups"]["odd"] == {"num_questions": 1, "accuracy": 0.25}
    low, high = summary["interval"]
    assert 0 <= low < summary["accuracy"] < high <= 1
    assert summarize(_records({7: [[1], [0]]}), [])["half_width"] is None
    # Versions of one problem are one draw.
    versions = summarize([record | {"problem": "7"} for record in records], [])
    assert versions["interval"] == proportion_interval(summary["accuracy"], 1)


def test_the_macro_average_is_unweighted_and_per_seed():
    """Benchmarks count alike whatever their size (Sec. 8.3); its interval is over seeds."""
    small = summarize(_records({0: [[1]], 1: [[0]]}), [])
    large = summarize(_records({0: [[0]] * 9, 1: [[1]] * 9}), [])
    macro = macro_average({"a": small, "b": large})
    assert macro["per_seed"] == [0.5, 0.5] and macro["accuracy"] == 0.5
    assert macro["half_width"] == 0.0


def test_names_in_the_results_are_shown_to_the_letter():
    """HTML, line breaks and pipes in a run's or a subject's name make no part of the page."""
    hostile = "a\n# b | <img src=x>"
    summary = summarize(_records({0: [[1], [1]]}, (hostile, "other")), [1]) | {"odd_keys": 1}
    results = {"benchmarks": {"mmmu": summary}, "macro": macro_average({"mmmu": summary})}
    results |= {"decoding": {"greedy": True}, "seeds": [0], "samples": 1}
    text = results_markdown(hostile, results)
    assert text.startswith(r"# a # b \| &lt;img src=x&gt;: accuracy, percent")
    assert r"| a # b \| &lt;img src=x&gt; | 1 | 100.0 |" in text and "<img" not in text
    assert "Keys that name no option, for the judge alone: MMMU val: 1." in text
    # The paper has no rows beside those of `eval.data`.
    own = results_markdown("own", results | {"benchmarks": {"data": summary}, "macro": None})
    assert "paper" not in own and "| data | 2 | 100.0 [" in own
