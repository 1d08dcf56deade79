"""pass@k, majority@k, means and intervals; trainings of several seeds as one row (`table`)."""

import json
import re
from itertools import combinations
from math import sqrt
from pathlib import Path
from statistics import fmean, stdev

import pytest

from bench.protocol_fixtures import math_vision_rows, mathverse_rows, write_parquet
from care_train.cli import main
from care_train.evaluation.table import (
    combine_runs,
    macro_average,
    majority_at_k,
    pass_at_k,
    results_markdown,
    summarize,
    trainings_markdown,
)
from care_train.models.tiny import build_tiny_model

RUNS = {"one": 1, "two": 2, "again": 1}


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """Two trainings' evaluations, one of them done twice, and one with other decodes."""
    out = tmp_path_factory.mktemp("runs")
    rows = {"math_vision": math_vision_rows(), "mathverse": mathverse_rows()}
    sources = {n: str(write_parquet(n, r, out / f"{n}.parquet")) for n, r in rows.items()}
    for seed in (1, 2):
        build_tiny_model("tiny-qwen2.5-vl", out / f"model-{seed}", seed=seed, hidden_size=32)
    for name, seed in (*RUNS.items(), ("other", 2)):
        arguments = ["eval", "--benchmarks", ",".join(rows), f"eval.sources={json.dumps(sources)}"]
        arguments += [f"model.path={out / f'model-{seed}'}", f"output_dir={out}", f"name={name}"]
        arguments += ["rollout.max_new_tokens=4", "prompt.system=null", "logging.progress=false"]
        decodes = "eval.seeds=[3]" if name == "other" else "eval.seeds=[0,1]"
        assert main([*arguments, decodes]) == 0
    return out


def test_trainings_become_one_row(runs, capsys):
    """Real runs of two models: their row, each one's numbers, the paper's rows."""
    assert main(["table", f"tiny={runs / 'one'},{runs / 'two'}", f"single={runs / 'one'}"]) == 0
    table = capsys.readouterr().out
    assert "| tiny (n = 2) | — | 0.0 ± 0.0 | 0.0 ± 0.0 | — |" in table
    assert "| single (n = 1) | — | 0.0 | 0.0 | — |" in table
    assert "| Qwen2.5-VL-7B + CARE | 74.7 |" in table
    assert f"|  | {runs / 'one'} | {runs / 'two'} | mean |" in table


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ("x={0}/one,{0}/again", r"again: got the model of .*one, wanted one evaluation of each"),
        ("x={0}/one,{0}/other", r"other: seeds: got \[3\], wanted \[0, 1\] as in .*one"),
        ("x={0}/one,{0}/none", r"none: has no results.json"),
        ("{0}/one", r"got '.*/one', wanted NAME=RUN,RUN"),
    ],
)
def test_only_like_runs_are_averaged(groups, message, runs, capfd):
    """The same questions and decodes of different models; anything else is named."""
    assert main(["table", groups.format(runs)]) == 2
    assert re.search(message, capfd.readouterr().err)


def test_the_interval_is_over_trainings(tmp_path):
    """Mean and 1.96 s / sqrt(n) of the runs' means, of benchmarks and of their macro average."""
    shared = {"questions": {}, "decoding": {}, "seeds": [0], "samples": 1}
    for number, (one, two) in enumerate([(0.70, 0.2), (0.74, 0.3), (0.78, 0.1)]):
        benchmarks = {
            name: {"accuracy": value, "num_questions": 100}
            for name, value in (("mathvista", one), ("mmmu", two))
        }
        found = shared | {"weights": number, "benchmarks": benchmarks}
        folder = tmp_path / str(number)
        folder.mkdir()
        text = json.dumps(found | {"macro": {"accuracy": (one + two) / 2}})
        (folder / "results.json").write_text(text)
    combined = combine_runs([tmp_path / str(number) for number in range(3)])
    assert combined["benchmarks"]["mathvista"]["accuracy"] == pytest.approx(0.74)
    assert combined["benchmarks"]["mathvista"]["half_width"] == pytest.approx(1.96 * 0.04 / 3**0.5)
    assert combined["macro"]["accuracy"] == pytest.approx(0.47)
    assert "| mathvista | 70.0 | 74.0 | 78.0 | 74.0 ± 4.5 |" in trainings_markdown({"x": combined})


@pytest.mark.parametrize("n", [1, 2, 5, 8])
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
        {
            "id": str(question),
            "seed": seed,
            "sample": sample,
            "group": groups[question % 2],
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
    assert summary["pass@k"][2] == summary["majority@k"][2] == pytest.approx(5 / 6)
    assert summary["truncated"] == 0.5 and summary["tokens"] == 10.5
    assert summary["groups"]["odd"] == {"num_questions": 1, "accuracy": 0.25}
    low, high = summary["interval"]
    assert 0 <= low < summary["accuracy"] < high <= 1
    assert summarize(_records({7: [[1], [0]]}), [])["half_width"] is None


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
