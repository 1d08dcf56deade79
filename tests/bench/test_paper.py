"""`bench.paper`: experiments as data, runs found by their configuration, and their summary."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from bench.paper import __main__ as command
from bench.paper import runs
from bench.paper.experiments import CARE_PLUS, EXPERIMENTS
from bench.paper.results import read_results, summarize
from bench.paper.runs import BASE, configuration_hash
from care_train.config import configs_folder, load_config
from tests.train.runs import FastRun

RESULTS = Path(command.__file__).with_name("results")


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_variants_are_configurations_that_differ(name: str) -> None:
    """The overrides of each are valid, and no two of an experiment are the same."""
    found = EXPERIMENTS[name].variants.values()
    hashes = [configuration_hash(load_config(BASE, overrides)) for overrides in found]
    assert len(set(hashes)) == len(hashes)


def test_care_plus_is_the_shipped_preset() -> None:
    """What table2 measures as care_plus is configs/care_plus.yaml's difference to care.yaml."""
    paper, plus = (load_config(configs_folder() / f"{n}.yaml") for n in ("care", "care_plus"))
    measured = load_config(configs_folder() / "care.yaml", CARE_PLUS)
    assert plus.care == measured.care != paper.care
    assert load_config(BASE).care.credit == paper.care.credit == "regions"


def test_a_hash_names_what_decides_the_numbers() -> None:
    """Another seed or budget is another run; another folder, name or log is not. A cold start is
    shared by whatever is trained from it."""

    def of(*overrides: str, what: str = "train") -> str:
        return configuration_hash(load_config(BASE, overrides), what)

    assert of() == of("name=other", "output_dir=there")
    assert of("model.path=a/sft-1/final") == of("model.path=b/sft-1/final")
    different = [of(), of("seed=1"), of("train.steps=41"), of("care.credit=uniform")]
    assert len(set(different)) == 4
    assert of(what="sft") == of("algorithm=grpo", "train.steps=41", what="sft") != of()
    assert of(what="sft") != of("sft.steps=41", what="sft")


def test_another_task_has_results_of_its_own() -> None:
    """`--data` is all three data sets', with as many held-out rows, in a folder of its own."""
    options = command._options(["fig7", "--data", "charts"])
    found, base = (load_config(BASE, changes) for changes in (options.overrides, []))
    assert (found.data.path, found.sft.data.path) == ("charts", "charts")
    assert found.held_out == replace(base.held_out, path="charts")
    assert options.results == RESULTS / "charts"


def test_a_summary_by_hand() -> None:
    """Means over seeds, t = 12.706 for two, and gains over a variant in pairs of the same seed."""
    rows = [
        {"variant": "a", "seed": "0", "accuracy_after": "0.5", "kl": ""},
        {"variant": "a", "seed": "1", "accuracy_after": "0.7", "kl": ""},
        {"variant": "b", "seed": "0", "accuracy_after": "0.6", "kl": "0.1"},
        {"variant": "b", "seed": "1", "accuracy_after": "0.8", "kl": "0.1"},
    ]
    found = summarize(rows, ("accuracy_after", "kl"))
    assert found["a"] == {"seeds": 2, "accuracy_after": pytest.approx((0.6, 1.2706), abs=1e-4)}
    assert found["b"]["accuracy_after_gain"] == pytest.approx((0.1, 0.0))
    assert found["b"]["kl"] == pytest.approx((0.1, 0.0))
    turned = summarize(rows, ("accuracy_after",), against="b")
    assert turned["a"]["accuracy_after_gain"] == pytest.approx((-0.1, 0.0))


@pytest.mark.parametrize("path", sorted(RESULTS.rglob("*.csv")), ids=lambda path: path.stem)
def test_committed_results_say_where_they_come_from(path: Path) -> None:
    """Each row is of a variant that is still there, with its command, commit and versions."""
    name = path.stem.removesuffix("_curves")
    for row in read_results(path):
        assert row["variant"] in EXPERIMENTS[name].variants
        if path.stem == name:
            assert row["command"].startswith("care_train train --config bench/paper/base.yaml")
            assert row["commit"] and row["torch"] and row["config"]


def test_a_figure_runs_whole_and_is_found_again(tmp_path: Path, monkeypatch, capsys) -> None:
    """`--quick` makes real runs, CSV and picture; a second call makes none and says the same."""

    def run(words: list[str], **_: Any) -> SimpleNamespace:
        assert words[1:3] == ["-m", "care_train"]
        ((status, _),) = FastRun(*words[3:]).end()
        return SimpleNamespace(returncode=status)

    # Forked: a new process would import all that the trainer needs.
    monkeypatch.setattr(runs, "subprocess", SimpleNamespace(run=run))
    words = ["fig7", "--quick", "--variants", "on", "--overrides", "eval.also=[]"]
    words += ["--output", str(tmp_path), "--results", str(tmp_path / "results")]
    assert command.main(words) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    (row,) = read_results(tmp_path / "results" / "fig7.csv")
    assert float(row["steps"]) == 2 and row["commit"] and row["seed"] == "0"
    assert json.loads(last)["fig7"]["on"]["seeds"] == 1
    assert (tmp_path / "results" / "fig7.png").read_bytes().startswith(b"\x89PNG")
    made = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/summary.json")}
    assert len(made) == 2  # the cold start and the run
    assert command.main(words) == 0
    assert capsys.readouterr().out.splitlines()[-1] == last
    assert {path: path.stat().st_mtime_ns for path in made} == made
