"""A cold start, then CARE, then the six benchmarks: from three configs, on fixtures."""

import json
import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest

from bench.protocol_fixtures import write_training
from care_train.cli import main
from care_train.config import load_build_settings, load_config
from care_train.evaluation.benchmarks import BENCHMARKS

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "configs" / "protocol"
QUIET = ("logging.progress=false", "logging.report_to=[]", "logging.samples_every=0")


def _check(runs: Path, questions: int) -> None:
    """Each stage began with the one before, and the last one scored everything."""
    cold, care, last = (
        json.loads((runs / f"protocol-{name}" / "summary.json").read_text())
        for name in ("cold-start", "care", "eval")
    )
    assert cold["eval_loss"] > 0 and cold["rows_without_rationale"] == 0
    assert care["model"].endswith("protocol-cold-start/final") and care["trained_sequences"] > 0
    assert last["model"].endswith("protocol-care/final")
    assert set(last["benchmarks"]) == set(BENCHMARKS)
    results = json.loads((runs / "protocol-eval" / "results.json").read_text())
    counts = [summary["num_questions"] for summary in results["benchmarks"].values()]
    assert sum(counts) == questions


# What the documented commands get besides: fewer steps and questions.
LESS = {
    "sft": ("sft.steps=40", "sft.batch_size=16"),
    "train": ("train.steps=2", "train.prompts_per_step=4", "eval.greedy=false"),
    "eval": ("eval.max_samples=2", "eval.seeds=[0]"),
}


@pytest.mark.parametrize("whole", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_the_documented_commands_run(whole, tmp_path, monkeypatch):
    """README.md's block in an empty folder with the configs, to the letter or on less."""
    monkeypatch.chdir(tmp_path)
    Path("configs").symlink_to(ROOT / "configs")
    pattern = r"```bash\n(python -m bench\.protocol_fixtures .*?)```"
    block = re.search(pattern, (ROOT / "README.md").read_text(), re.DOTALL)
    assert block is not None
    fixtures, *commands = map(shlex.split, block[1].splitlines())
    monkeypatch.setattr(sys, "argv", fixtures[2:])
    runpy.run_module(fixtures[2], run_name="__main__")
    for program, command, *arguments in commands:
        assert program == "care-train"
        assert main([command, *arguments, *(() if whole else (*LESS[command], *QUIET))]) == 0
    _check(tmp_path / "runs", questions=4 + 3 + 3 + 8 + 4 + 4 if whole else 2 * len(BENCHMARKS))
    if whole:
        results = json.loads(Path("runs/protocol-eval/results.json").read_text())
        # It has learnt colours: an untrained model has no answer span at all.
        assert results["macro"]["accuracy"] > 0.05


def test_built_data_goes_through_both_stages(tmp_path, monkeypatch):
    """`care-train data build` on the fixtures, whose schemas are the published ones: what it writes
    is what the cold start learns and CARE trains on."""
    monkeypatch.chdir(tmp_path)
    write_training(Path("raw"), count=32)
    sources = {"cold": ("vision_r1_cold", "cold_start.json"), "rl": ("rows", "train.jsonl")}
    for name, (adapter, file) in sources.items():
        source = {"name": name, "adapter": adapter, "path": f"raw/{file}"}
        config = {"output": name, "workers": 1, "sources": [source]}
        Path(f"{name}.yaml").write_text(json.dumps(config))
        assert main(["data", "build", "--config", f"{name}.yaml"]) == 0
        counts = json.loads(Path(name, "manifest.json").read_text())["counts"]["total"]
        assert counts["read"] == counts["kept"] == 24
    built = ["sft.data.path=cold/train.parquet", "data.path=rl/train.parquet"]
    built += ["eval.data=raw/test.jsonl", *QUIET]
    for command, config, *overrides in (
        ("sft", "cold_start", "sft.steps=2", "sft.eval_data=null"),
        ("train", "care", "train.steps=1", "train.prompts_per_step=4", "eval.greedy=false"),
    ):
        arguments = [command, "--config", str(CONFIGS / f"{config}.yaml"), *built, *overrides]
        assert main(arguments) == 0
    summary = json.loads(Path("runs/protocol-cold-start/summary.json").read_text())
    assert summary["rows"] == 24 and summary["rows_without_rationale"] == 0


def test_the_full_size_configurations_fit_together():
    """Where the builds write is where the cold start reads, and all stages share tags."""
    build = load_build_settings(ROOT / "configs" / "data" / "cold_start.yaml")
    cold, care, last = (
        load_config(ROOT / "configs" / f"{name}.yaml") for name in ("cold_start", "care", "eval")
    )
    assert cold.sft.data.path == f"{build.output}/train.parquet"
    assert cold.prompt.think_tag == care.prompt.think_tag == last.prompt.think_tag
    assert cold.prompt.system == care.prompt.system == last.prompt.system
