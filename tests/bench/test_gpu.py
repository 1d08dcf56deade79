"""`python -m bench.gpu`: its dry run, its runner when sections fail, its page; and
`bench.gpu_experiment`: its rows by hand, its budget, and the whole of it on a tiny model."""

import json
import re
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bench import gpu_experiment
from bench.gpu import __main__ as command
from bench.gpu.measuring import at_most, attempt
from bench.gpu.page import problems_of
from bench.gpu.section import Bench, Record, Run, Section, run_sections
from bench.gpu_experiment import Budget, arithmetic_rows, derive
from tests.train.runs import python


def sample_results(**changes: Any) -> dict[str, Any]:
    """What `gpu.json` holds after a run on an imaginary device."""
    machine = {
        **{"device": "Imaginary GPU", "python": "3.12.0", "torch": "0.1", "cuda": "0.2"},
        "versions": {"triton": "0.3", "liger-kernel": "0.8.5", "trl": None},
        "peers": {"liger-kernel": "yes", "trl": "ModuleNotFoundError"},
        **{"memory_gib": 1.5, "multiprocessors": 7},
    }
    table = {
        "linear_policy_loss": {"ms": 2.2, "of_floor": 1.1, "log_prob_rms": 4e-6},
        "Liger GRPO": {"note": "wrong gradient", "d_weight": 0.5},
    }
    kernels = [{"kernel": "gemm", "ms": 2.0, "share": 0.9, "launches": 3}]
    figures = {
        "facts": {"machine": machine, "ceilings": {"copy_tb_s": 1.0}},
        "correct": {"kernel_tests": {"counts": {"passed": 3}, "failed": []}},
        "headline": {"7b N=8192": table, "missing": {"TRL": "trl is not installed"}},
        "profile": {"loss": {"ms": 2.2, "kernels": kernels}, "overhead_us": 200},
        "deep": {"many logits": {"log_prob_max": 1e-6, "ok": True}},
        "model": {"updates": {"care": {"loss": -0.5, "ms": 300.0, "peak_mib": 5000}}},
    }
    sections = {
        name: {"status": "ok", "seconds": 1.0, "figures": found} for name, found in figures.items()
    }
    return {"dry": False, "date": "2020-01-02", "seconds": 9.0, "sections": sections} | changes


def test_a_dry_run_of_some_sections(tmp_path: Path) -> None:
    """Tiny problems in the interpreter: figures on disk, one JSON line last, no page."""
    said = python("-m", "bench.gpu", "--dry", "--only=deep", "--out", tmp_path).stdout
    assert said.startswith("A dry run on a CPU")
    last = json.loads(said.splitlines()[-1])
    assert last["sections"] == {"deep": "ok"} and last["problems"] == []
    saved = json.loads((tmp_path / "gpu.json").read_text())
    assert saved["dry"]
    assert all(figures["ok"] for figures in saved["sections"]["deep"]["figures"].values())
    assert (tmp_path / "deep.log").read_text()
    assert not list(tmp_path.glob("*.md"))


def test_failing_sections_cost_no_other_its_results(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """A crash, a hang and a signal leave what was recorded, before and after; the command names
    them and ends with 1."""
    sources = {
        "dies": "bench.record.put('before', 3); import os; os.kill(os.getpid(), 11)",
        "hangs": "bench.record.put('before', 2); import time; time.sleep(600)",
        "crashes": "bench.record.put('before', 1); raise ValueError('no luck')",
        "good": "bench.record.put('before', 0)",
    }
    for name, source in sources.items():
        (tmp_path / f"{name}.py").write_text(f"def run(bench):\n    {source}\n")
    sections = [Section(name, f"{name}:run", 4 if name == "hangs" else 60) for name in sources]
    run = Run(tmp_path / "out", 200.0, dry=False, site=tmp_path)
    results = run_sections(sections, run)
    found = results["sections"]
    statuses = ["crashed", "timed out", "crashed", "ok"]
    assert [section["status"] for section in found.values()] == statuses
    assert [found[name]["figures"]["before"] for name in found] == [3, 2, 1, 0]
    assert "no luck" in capsys.readouterr().out
    assert json.loads((tmp_path / "out" / "gpu.json").read_text()) == results
    without_time = run_sections(sections[:1], Run(tmp_path, 0.0, dry=True))
    assert problems_of(without_time) == ["dies: left out"]
    monkeypatch.setattr(command, "run_sections", lambda *_: results | {"dry": True})
    assert command.main(["--dry", "--only", "deep", "--out", str(tmp_path)]) == 1
    problems = json.loads(capsys.readouterr().out.splitlines()[-1])["problems"]
    assert problems == ["dies: crashed", "hangs: timed out", "crashes: crashed"]
    with pytest.raises(SystemExit):
        command.main(["--only", "facts,nonsense"])
    assert "got nonsense; wanted some of facts, correct" in capsys.readouterr().err


def test_what_is_not_right_is_a_problem() -> None:
    """Errors over their tolerance and failed tests count; a failing peer does not."""
    results = sample_results()
    assert problems_of(results) == []
    figures = {name: section["figures"] for name, section in results["sections"].items()}
    figures["headline"]["peers_failed"] = {"7b: Liger": "OutOfMemoryError"}
    assert problems_of(results) == []
    figures["headline"]["7b N=8192"]["linear_policy_loss"]["note"] = "wrong gradient"
    figures["correct"]["kernel_tests"]["failed"] = ["test_x"]
    figures["deep"]["many logits"]["ok"] = False
    figures["model"]["failed"] = {"care_loss": "OutOfMemoryError"}
    kinds = [problem.split(":")[0] for problem in problems_of(results)]
    assert kinds == ["kernel tests", "deep", "7b N=8192", "model"]


def test_the_page_is_of_a_gpu_that_was_measured(tmp_path: Path, capsys: Any) -> None:
    """Every section's figures are on it, written from the saved results alone, with device,
    versions and date; a dry run's figures never become a page, nor does nothing."""
    page = tmp_path / "docs" / "gpu.md"
    words = ["--out", str(tmp_path), "--page", str(page)]
    nothing = {"facts": {"status": "crashed", "figures": {}}}
    for results, why in (
        (sample_results(dry=True), "dry run"),
        (sample_results(sections=nothing), "name no GPU"),
        (None, "gpu.json"),
    ):
        (tmp_path / "gpu.json").unlink(missing_ok=True)
        if results is not None:
            (tmp_path / "gpu.json").write_text(json.dumps(results))
        assert command.main(words) == 1 and not page.exists()
        assert why in capsys.readouterr().err
    (tmp_path / "gpu.json").write_text(json.dumps(sample_results()))
    assert command.main(words) == 0
    for expected in (
        "on 2020-01-02: one Imaginary GPU (1.5 GiB, 7 multiprocessors)",
        "Python 3.12.0, torch 0.1, triton 0.3, CUDA 0.2",
        "liger-kernel 0.8.5, trl not installed",
        "| 7b N=8192 | ms | of_floor | log_prob_rms | note | d_weight |",
        "| **linear_policy_loss** | 2.2 | 1.1 | 4e-06 |  |  |",
        "| Liger GRPO |  |  |  | wrong gradient | 0.5 |",
        "kernel_tests: counts passed 3",
        "| care | -0.5 | 300 | 5,000 |",
        "| `gemm` | 2 | 0.9 | 3 |",
        "- many logits: log_prob_max 1e-06, ok True",
        "- headline: TRL: trl is not installed",
    ):
        assert expected in page.read_text(), expected


def test_calls_of_other_packages_are_bounded(tmp_path: Path) -> None:
    """A compiler that takes too long is stopped, and the section goes on."""

    def compile_for_ever() -> None:
        with at_most(0.2):
            while True:
                pass

    bench = Bench(dry=True, record=Record(tmp_path / "record.json"), until=0.0)
    assert attempt(bench, "compiling", compile_for_ever, key="peers_failed") is None
    assert "TimeoutError: took more than" in bench.record.figures["peers_failed"]["compiling"]
    assert attempt(bench, "well", lambda: 3) == 3


def test_derivation_by_hand():
    """Two steps; a slip in the first one is gone on from."""
    assert derive([17, 25, 50], ["+", "-"], (0, 0)) == ("17 + 25 = 42, 42 - 50 = -8", "-8")
    assert derive([17, 25, 50], ["+", "-"], (10, 0)) == ("17 + 25 = 52, 52 - 50 = 2", "2")


def test_rows_hold_together():
    """The answer is the question's, one step of the failed rationale is off, splits are apart."""
    seen = {}
    for split in ("train", "test"):
        rows = arithmetic_rows(300, split)
        assert rows == arithmetic_rows(301, split)[:300]
        for row in rows:
            expression = re.fullmatch(r"What is ([\d +-]+)\?", row["prompt"])
            assert expression is not None
            first, *terms = re.findall(r"[+-]? ?\d+", expression[1])
            value = int(first) + sum(int(term.replace(" ", "")) for term in terms)
            assert value == int(row["answer"]) != int(row["failed_answer"])
            assert row["rationale"].endswith(f"= {row['answer']}")
            assert row["failed_rationale"].endswith(f"= {row['failed_answer']}")
        seen[split] = {tuple(re.findall(r"\d+", row["prompt"])) for row in rows}
    assert not seen["train"] & seen["test"]


@pytest.mark.parametrize(
    ("seconds", "sequences", "stops"),
    ((60, None, [False, False, False]), (-1, None, [True]), (60, 20, [False, True])),
)
def test_a_budget_ends_training(seconds: float, sequences: int | None, stops: list[bool]):
    """At its time, or with the step that has sampled enough."""
    budget = Budget(time.monotonic() + seconds, sequences)
    for stop in stops:
        control = SimpleNamespace(should_training_stop=False)
        budget.on_log(None, None, control, logs={"sampled_sequences": 10.0})
        assert control.should_training_stop == stop


def test_it_runs_whole(tmp_path, capsys, monkeypatch):
    """Both algorithms from one cold start, GRPO with CARE's budget; the last line is JSON.

    Without a GPU and --quick it says how to try it, and measures nothing.
    """
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu_experiment.main([]) == 1
    assert "--quick" in capsys.readouterr().err
    words = ["--quick", "--model", "tiny-qwen2", "--output", str(tmp_path)]
    assert gpu_experiment.main([*words, "--overrides", "rollout.max_new_tokens=8"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["matched"] and found["quick"] and found["versions"]["device"]
    assert found["care"]["accuracy_before"] == found["grpo"]["accuracy_before"]
    assert found["care"]["steps"] == 2 and found["care"]["decoded_tokens"] > 0
    assert 0 <= found["grpo"]["sampled_sequences"] - found["care"]["sampled_sequences"] < 8
