"""A cold start, then CARE, then the six benchmarks: from three configs, on fixtures."""

import json
import re
import shlex
import sys
from pathlib import Path

from bench import protocol_fixtures
from care_train.cli import main
from care_train.config import load_build_settings, load_config
from care_train.evaluation.benchmarks import BENCHMARKS
from tests.train.runs import ROOT, summary

CONFIGS = ROOT / "configs" / "protocol"
QUIET = ("logging.report_to=[]", "logging.samples_every=0")


def test_the_documented_commands_run(tmp_path, monkeypatch):
    """README.md's block to the letter, in an empty folder with the configs: each stage begins with
    the one before, and the last one scores everything."""
    monkeypatch.chdir(tmp_path)
    Path("configs").symlink_to(ROOT / "configs")
    pattern = r"```bash\n(python -m bench\.protocol_fixtures .*?)```"
    block = re.search(pattern, (ROOT / "README.md").read_text(), re.DOTALL)
    assert block is not None
    fixtures, *commands = map(shlex.split, block[1].splitlines())
    monkeypatch.setattr(sys, "argv", fixtures[2:])
    protocol_fixtures.main()
    for program, *arguments in commands:
        assert program == "care-train" and main(arguments) == 0
    cold, care, last = (
        summary(Path(f"runs/protocol-{name}")) for name in ("cold-start", "care", "eval")
    )
    assert cold["eval_loss"] > 0 and cold["rows_without_rationale"] == 0
    assert care["model"].endswith("protocol-cold-start/final") and care["trained_sequences"] > 0
    assert last["model"].endswith("protocol-care/final")
    assert set(last["benchmarks"]) == set(BENCHMARKS)
    results = json.loads(Path("runs/protocol-eval/results.json").read_text())
    counts = [one["num_questions"] for one in results["benchmarks"].values()]
    assert sum(counts) == 4 + 3 + 3 + 8 + 4 + 4
    # It has learnt colours: an untrained model has no answer span at all.
    assert results["macro"]["accuracy"] > 0.05


def test_built_data_goes_through_both_stages(tmp_path, monkeypatch):
    """`care-train data build` on the fixtures, whose schemas are the published ones: what it writes
    is what the cold start learns and CARE trains on."""
    monkeypatch.chdir(tmp_path)
    protocol_fixtures.write_training(Path("raw"), count=32)
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
        ("train", "care", "train.steps=1", "train.prompts_per_step=4", "eval.also=[]"),
    ):
        arguments = [command, "--config", str(CONFIGS / f"{config}.yaml"), *built, *overrides]
        assert main(arguments) == 0
    facts = summary(Path("runs/protocol-cold-start"))
    assert facts["rows"] == 24 and facts["rows_without_rationale"] == 0


def test_the_full_size_configurations_fit_together():
    """Where the builds write is where the cold start reads, and all stages share tags."""
    build = load_build_settings(ROOT / "configs" / "data" / "cold_start.yaml")
    cold, care, last = (
        load_config(ROOT / "configs" / f"{name}.yaml") for name in ("cold_start", "care", "eval")
    )
    assert cold.sft.data.path == f"{build.output}/train.parquet"
    assert cold.prompt.think_tag == care.prompt.think_tag == last.prompt.think_tag
    assert cold.prompt.system == care.prompt.system == last.prompt.system
