"""A cold start, then CARE, then the six benchmarks: from three configs, on fixtures."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from bench.protocol_fixtures import write_benchmarks, write_training
from care_train.cli import main
from care_train.evaluation.benchmarks import BENCHMARKS
from care_train.training.distributed import own_environment

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "configs" / "protocol"


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


def test_the_protocol_in_miniature(tmp_path, monkeypatch):
    """The three configs as they are, with fewer steps and questions."""
    monkeypatch.chdir(tmp_path)
    write_training(Path("runs/fixtures"), count=32)
    write_benchmarks(Path("runs/fixtures"))
    quiet = ("logging.progress=false", "logging.tensorboard=false", "logging.samples_every=0")
    stages = (
        ("sft", "cold_start", "sft.steps=40", "sft.batch_size=16"),
        ("train", "care", "train.steps=2", "train.prompts_per_step=4", "eval.greedy=false"),
        ("eval", "eval", "eval.max_questions=2", "eval.seeds=[0]"),
    )
    for command, config, *overrides in stages:
        arguments = [command, "--config", str(CONFIGS / f"{config}.yaml"), *overrides, *quiet]
        assert main(arguments) == 0
    _check(tmp_path / "runs", questions=2 * len(BENCHMARKS))


@pytest.mark.slow
def test_the_documented_commands_run(tmp_path):
    """README.md's block to the letter, in an empty folder with the configs."""
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    pattern = r"```bash\n(python -m bench\.protocol_fixtures .*?)```"
    block = re.search(pattern, (ROOT / "README.md").read_text(), re.DOTALL)
    assert block is not None
    environment = own_environment() | {"OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), environment.get("PYTHONPATH", "")])
    for line in block[1].splitlines():
        command = shlex.split(line)
        launcher = {"python": [], "care-train": ["-m", "care_train"]}[command[0]]
        done = subprocess.run(
            [sys.executable, *launcher, *command[1:]],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            timeout=600,
        )
        assert done.returncode == 0, done.stderr
    _check(tmp_path / "runs", questions=4 + 3 + 3 + 8 + 4 + 4)
    results = json.loads((tmp_path / "runs" / "protocol-eval" / "results.json").read_text())
    # It has learnt colours: an untrained model has no answer span at all.
    assert results["macro"]["accuracy"] > 0.05
