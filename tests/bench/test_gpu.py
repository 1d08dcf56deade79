"""`python -m bench.gpu`: its dry run, its runner when sections fail, its page."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bench.gpu import __main__ as command
from bench.gpu.measuring import at_most, attempt
from bench.gpu.page import PageError, page_of, problems_of, summary_of, write_page
from bench.gpu.runner import Run, Section, run_sections
from bench.gpu.section import Bench, Record


def sample_results(**changes: Any) -> dict[str, Any]:
    """What `gpu.json` holds after a run on an imaginary device."""
    machine = {
        "device": "Imaginary GPU",
        "python": "3.12.0",
        "torch": "0.1",
        "cuda": "0.2",
        "versions": {"triton": "0.3", "liger-kernel": "0.8.5", "trl": None},
        "peers": {"liger-kernel": "yes", "trl": "ModuleNotFoundError"},
        "memory_gib": 1.5,
        "multiprocessors": 7,
    }
    timed = {"ms": 2.0, "p20": 1.9, "p80": 2.1, "rounds": 5, "tflop_s": 3.0, "of_floor": 1.0}
    table = {
        "three bare GEMMs": timed | {"peak_mib": 10},
        "linear_policy_loss": timed | {"ms": 2.2, "of_floor": 1.1, "log_prob_rms": 4e-6},
        "Liger GRPO": {"note": "wrong gradient", "d_weight": 0.5},
    }
    checks = {"clip": {"worst": 0.5}, "k3": {"worst": 0.9}}
    update = {"loss": -0.5, "gradient_norm": 2.0, "ms": 300.0}
    update["peak_mib_beyond_weights_and_states"] = 5000
    figures = {
        "facts": {"machine": machine, "ceilings": {"copy_tb_s": 1.0, "product_tflop_s": 2.0}},
        "correct": {"cases": checks, "kernel_tests": {"counts": {"passed": 3}, "failed": []}},
        "headline": {"7b N=8192": table, "missing": {"TRL": "trl is not installed"}},
        "profile": {
            "loss": {
                "ms": 2.2,
                "kernels": [{"kernel": "gemm", "ms": 2.0, "share": 0.9, "launches": 3}],
            },
            "overhead_us": 200,
        },
        "sweep": {"tiles, training": {"a tile (shipped)": {"ms": 1.0, "tflop_s": 9.0}}},
        "deep": {"many logits": {"log_prob_max": 1e-6, "ok": True}},
        "model": {"model": {"parameters": 10**9, "tokens": 8192}, "updates": {"care": update}},
    }
    sections = {
        name: {"status": "ok", "seconds": 1.0, "figures": found} for name, found in figures.items()
    }
    return {"dry": False, "date": "2020-01-02", "seconds": 9.0, "sections": sections} | changes


def test_a_dry_run_of_some_sections(tmp_path: Path) -> None:
    """Tiny problems in the interpreter: figures on disk, one JSON line last, no page."""
    arguments = ["--dry", "--only", "deep", "--out", str(tmp_path)]
    result = subprocess.run(
        [sys.executable, "-m", "bench.gpu", *arguments], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.startswith("A dry run on a CPU")
    last = json.loads(result.stdout.splitlines()[-1])
    assert last["sections"] == {"deep": "ok"} and last["problems"] == []
    saved = json.loads((tmp_path / "gpu.json").read_text())
    assert saved["dry"]
    deep = saved["sections"]["deep"]["figures"]
    assert all(figures["ok"] for figures in deep.values())
    assert (tmp_path / "deep.log").read_text()
    assert not list(tmp_path.glob("*.md"))


def test_failing_sections_cost_no_other_its_results(tmp_path: Path) -> None:
    """A crash, a hang and a signal leave what was recorded, before and after."""
    sources = {
        "dies": "bench.record.put('before', 3); import os; os.kill(os.getpid(), 11)",
        "hangs": "bench.record.put('before', 2); import time; time.sleep(600)",
        "crashes": "bench.record.put('before', 1); raise ValueError('no luck')",
        "good": "bench.record.put('part', {str(bench.part): bench.parts})",
    }
    for name, source in sources.items():
        (tmp_path / f"{name}.py").write_text(f"def run(bench):\n    {source}\n")
    sections = [
        Section(name, f"{name}:run", 8 if name == "hangs" else 60, 2 if name == "good" else 1)
        for name in sources
    ]
    said: list[str] = []
    run = Run(tmp_path / "out", 200.0, dry=False, site=tmp_path)
    results = run_sections(sections, run, said.append)
    found = results["sections"]
    assert [section["status"] for section in found.values()] == [
        "crashed",
        "timed out",
        "crashed",
        "ok",
    ]
    assert [found[name]["figures"].get("before") for name in found] == [3, 2, 1, None]
    assert found["good"]["figures"]["part"] == {"0": 2, "1": 2}
    assert any("no luck" in text for text in said)
    assert json.loads((tmp_path / "out" / "gpu.json").read_text()) == results
    assert len(problems_of(results)) == 3
    without_time = run_sections(sections[:1], Run(tmp_path, 0.0, dry=True), said.append)
    assert problems_of(without_time) == ["dies: left out"]


@pytest.mark.parametrize("failure", ("crashed", "timed out"))
def test_the_command_fails_where_a_section_failed(
    failure: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """What could not be measured makes the exit status 1 and is named."""
    section = {"status": failure, "seconds": 1.0, "figures": {}}
    results = sample_results(dry=True, sections={"deep": section})
    monkeypatch.setattr(command, "run_sections", lambda *_: results)
    assert command.main(["--dry", "--only", "deep", "--out", str(tmp_path)]) == 1
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["problems"] == [f"deep: {failure}"]


def test_an_unknown_section_is_refused(capsys: Any) -> None:
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
    figures["correct"]["cases"]["k3"]["worst"] = 1.5
    figures["correct"]["kernel_tests"]["failed"] = ["test_x"]
    figures["deep"]["many logits"]["ok"] = False
    figures["model"]["failed"] = {"care_loss": "OutOfMemoryError"}
    assert [problem.split(":")[0] for problem in problems_of(results)] == [
        "correct",
        "kernel tests",
        "deep",
        "model",
    ]
    assert summary_of(results)["checks"] == {"passed": 1, "of": 2}


def test_the_page_names_device_versions_and_date(tmp_path: Path, capsys: Any) -> None:
    """Every section's figures are on it, written from the saved results alone."""
    (tmp_path / "gpu.json").write_text(json.dumps(sample_results()))
    page = tmp_path / "docs" / "gpu.md"
    assert command.main(["--out", str(tmp_path), "--page", str(page)]) == 0
    text = page.read_text()
    for expected in (
        "on 2020-01-02: one Imaginary GPU (1.5 GiB, 7 multiprocessors)",
        "Python 3.12.0, torch 0.1, triton 0.3, CUDA 0.2",
        "liger-kernel 0.8.5, trl not installed",
        "## Head of Qwen2.5-VL-7B, 8,192 rows",
        "| **linear_policy_loss** | 2.20 | 1.90-2.10 | 1.10 | 3 |  | 4.0e-06 |",
        "| Liger GRPO (wrong gradient) |",
        "2 of 2 checks",
        "3 passed",
        "| care | 300 | 5,000 | -0.5 | 2 |",
        "| `gemm` | 2.0 | 90.0 % | 3 |",
        "| a tile (shipped) | 1.0 | 9.0 |",
        "- headline: TRL: trl is not installed",
    ):
        assert expected in text, expected


def test_no_page_of_a_dry_run_or_of_nothing(tmp_path: Path, capsys: Any) -> None:
    """Figures of a CPU never become a page about a GPU."""
    with pytest.raises(PageError, match="dry run"):
        write_page(sample_results(dry=True), tmp_path / "gpu.md")
    with pytest.raises(PageError, match="name no GPU"):
        page_of(sample_results(sections={}))
    assert command.main(["--out", str(tmp_path), "--page", str(tmp_path / "x.md")]) == 1
    assert "gpu.json" in capsys.readouterr().err


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
