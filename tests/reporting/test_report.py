"""report.md and summary.json."""

import json
import math
import os
from pathlib import Path
from typing import Any

import pytest

from care_train.reporting import write_report, write_summary
from care_train.reporting.report import compared_answers

_SUMMARY: dict[str, Any] = {
    "name": "demo",
    "algorithm": "care",
    "model": "tiny|model",
    "seed": 3,
    "steps": 20,
    "num_questions": 10,
    "accuracy_before": 0.5,
    "accuracy_after": 0.8,
    "greedy_before": 0.5,
    "greedy_after": 1.0,
    "decoded_tokens": 1234567,
    "sampled_sequences": 4096,
    "trained_sequences": 2048,
    "wall_seconds": 3661.4,
    "command": "care-train train configs/care.yaml",
}
_TRAIN = {"phase": "train", "groups": 8}
_METRICS = [
    _TRAIN | {"step": 1, "groups_skipped": 2, "reflections": 4, "reflection_success": 0.5},
    _TRAIN | {"step": 2, "groups_skipped": 4, "reflections": 0},
    {"phase": "eval", "step": 2, "groups": 100},
]


def _report(run_dir: Path, summary: dict[str, Any] = _SUMMARY) -> str:
    write_report(run_dir, summary, _METRICS)
    return (run_dir / "report.md").read_text(encoding="utf-8")


def test_report_says_what_ran(tmp_path: Path) -> None:
    """The report has the facts, the scores with intervals, and the way to run it again."""
    text = _report(tmp_path)
    assert "Accuracy rose from 50.0% to 80.0%." in text
    assert "80.0% [49.0, 94.3]" in text and "100.0% [72.2, 100.0]" in text
    for shown in ("1,234,567", "4,096", "2,048", "1:01:01", r"tiny\|model"):
        assert shown in text
    assert "care-train train configs/care.yaml" in text
    assert f"care-train report {tmp_path.parent.name}/{tmp_path.name}\n" in text
    # Groups are summed over training steps, reflections weighted by how many there were.
    assert "| Groups sampled | 16 | 100.0% |" in text
    assert "| Skipped | 6 | 37.5% |" in text
    assert "| Reflections that succeeded | 2 | 50.0% |" in text


def test_a_report_has_what_there_is(tmp_path: Path) -> None:
    """Pictures by relative path, for the folder can move; a lone evaluation's one column of scores;
    of nothing a title."""
    (tmp_path / "learning_curves.png").touch()
    summary = {"num_questions": 10, "accuracy": 0.8, "greedy_accuracy": 0.5}
    text = _report(tmp_path, summary)
    assert "](learning_curves.png)" in text and str(tmp_path) not in text
    assert "| Accuracy, sampled | 80.0% [49.0, 94.3] |" in text
    assert "| Accuracy, greedy | 50.0% [" in text
    write_report(tmp_path, {}, [])
    text = (tmp_path / "report.md").read_text()
    assert text.startswith(f"# {tmp_path.name}\n") and "## Scores" not in text


def test_names_are_shown_to_the_letter(tmp_path: Path) -> None:
    """Line breaks, HTML, links and pipes in a run's name or model become no part of the page."""
    hostile = "a\n# b <img src=x onerror=alert(1)> [c](javascript:d) | *e* `f` \x1b[2J\ud800"
    text = _report(tmp_path, _SUMMARY | {"name": hostile, "model": hostile})
    shown = r"a # b &lt;img src=x onerror=alert(1)&gt; [c]\(javascript:d) \| \*e\* \`f\`"
    assert text.startswith(f"# {shown}") and f"| Model | {shown}" in text
    assert "<img" not in text and "\n# b" not in text and "\x1b" not in text


def test_summary_is_json_and_survives_a_failed_write(tmp_path: Path, monkeypatch) -> None:
    """It comes back as written, null for NaN, and leaves no temporary file; where writing stops
    half way, the old one is still whole."""
    folder = tmp_path / "run"
    write_summary(folder, {"accuracy": 0.5, "loss": math.nan, "nested": [math.inf]})
    written = {"accuracy": 0.5, "loss": None, "nested": [None]}
    assert json.loads((folder / "summary.json").read_text()) == written
    assert os.listdir(folder) == ["summary.json"]

    def killed(descriptor: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", killed)
    with pytest.raises(KeyboardInterrupt):
        write_summary(folder, {"step": 2})
    assert json.loads((folder / "summary.json").read_text()) == written


def _answers(step: int, **right: bool) -> list[dict]:
    """An evaluation of `first` and `second` by greedy answers, and of `first` by a sampled one."""
    rows = [
        {"row_id": name, "prompt": f"what is {name}?", "answer": "7", "decoding": "greedy"}
        | {"text": f"<answer>{7 if is_right else step}</answer>", "accuracy": float(is_right)}
        for name, is_right in right.items()
    ]
    return [*rows, rows[0] | {"decoding": "sampled", "accuracy": 1.0}]


def test_what_a_run_learnt_is_shown_by_question_and_by_example():
    """Of greedy answers: each question's accuracy before and after, and one that became right."""
    before, after = _answers(1, first=False, second=False), _answers(2, first=True, second=False)
    text = compared_answers(before, after)
    assert "| what is first? | 1 | 0.0% | 100.0% |" in text
    assert "| what is second? | 1 | 0.0% | 0.0% |" in text
    assert "before:    <answer>1</answer>\nafter:     <answer>7</answer>" in text
    assert "second:\n" not in text
    assert compared_answers(before[:1], []) == ""


def test_an_answer_cannot_leave_its_block():
    """Backticks in an answer do not end the block that shows it; half a character is replaced."""
    before, after = _answers(1, first=False), _answers(2, first=True)
    after[0]["text"] = "```\n# not a heading\n```` <img src=x> a\ud800b"
    text = compared_answers(before, after)
    assert "`````text\n" in text and "a\N{REPLACEMENT CHARACTER}b" in text


def test_a_runs_report_has_what_its_archive_says_it_learnt(quickstart_run: Path):
    """The first and the last evaluation of a real run, compared in its report.md."""
    text = (quickstart_run / "report.md").read_text()
    section = text.partition("## What it learnt")[2].partition("\n## ")[0]
    assert "| what color is the image? |" in section
