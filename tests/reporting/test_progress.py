"""Bars on a terminal, plain lines in a log, groups and names to the letter."""

import io
import time
from dataclasses import replace
from itertools import count
from pathlib import Path

import pytest
from rich.console import Console

from care_train.reporting import SampleRecord, TrainProgress, show_group, show_summary, track
from care_train.reporting.text import printable

_VALUES = {"reward": 0.5, "accuracy": 0.25, "kl": 0.01, "tokens_per_second": 12345.6}


def _log() -> Console:
    return Console(file=io.StringIO(), width=100)


def _terminal() -> Console:
    file = io.StringIO()
    return Console(file=file, width=100, force_terminal=True, force_interactive=True, _environ={})


def _written(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


@pytest.mark.parametrize(
    ("step_seconds", "shown"), [(12.0, range(4, 41)), (4.0, [*range(4, 41, 3)]), (0.1, [4, 40])]
)
def test_a_log_gets_a_line_per_step_or_every_ten_seconds(step_seconds, shown, monkeypatch) -> None:
    """Without a terminal there is no redrawing; a resumed run goes on counting.

    A cold start follows its loss; reinforcement learning, whose loss means little, does not.
    """
    clock = count(step=step_seconds)
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    console = _log()
    with TrainProgress(40, description="care", start_step=3, console=console) as progress:
        progress.update(4, {"loss": 2.5})
        for step in range(5, 41):
            progress.update(step, _VALUES | {"loss": 2.5})
    lines = _written(console).splitlines()
    assert [line.split()[1] for line in lines] == [f"{step}/40" for step in shown]
    for value in ("reward 0.500", "accuracy 25.0%", "KL 0.0100", "tokens/s 12,346"):
        assert value in lines[-1]
    assert "loss 2.500" in lines[0] and "loss" not in lines[-1]
    assert "format" not in lines[-1] and "\x1b" not in lines[-1]


def test_terminal_gets_a_bar_and_evaluations_nest_in_it() -> None:
    """The bar shows the step and the numbers below it; a second bar may run inside the first."""
    console = _terminal()
    with TrainProgress(4, description="care", console=console) as progress:
        assert list(track(range(3), "evaluate", console=console)) == [0, 1, 2]
        progress.update(3, _VALUES)
    text = _written(console)
    assert all(shown in text for shown in ("3/4", "12,346", "ETA", "evaluate"))


@pytest.mark.parametrize("console", [_terminal(), _log()], ids=["terminal", "log"])
def test_disabled_progress_is_silent(console: Console) -> None:
    """Other ranks neither draw nor print."""
    with TrainProgress(4, enabled=False, console=console) as progress:
        progress.update(4, _VALUES)
        progress.print("hello")
    assert list(track([1, 2], "work", enabled=False, console=console)) == [1, 2]
    assert _written(console) == ""


def test_track_in_a_log() -> None:
    """Long work tells its end in a log; without a known length, its start."""
    console = _log()
    assert list(track(range(30), "evaluate", console=console)) == list(range(30))
    assert list(track(iter("ab"), "generate", console=console)) == ["a", "b"]
    assert "evaluate 30/30" in _written(console) and "generate ..." in _written(console)


_MARKUP = "[red]x[/red] [/bold] [link=http://a]b[/link] :smile:"


def test_markup_is_literal(tmp_path: Path) -> None:
    """rich's markup in model output, a run's name or a description does nothing, nor raises."""
    console = _log()
    record = SampleRecord(3, _MARKUP, _MARKUP, _MARKUP, 1.1, "anchor")
    show_group(console, _MARKUP, [record, replace(record, role="hard_negative", reward=0.1)])
    assert _written(console).count(_MARKUP) == 5
    for shown in ("step 3 · [red]x", "anchor", "+1.10", "hard negative", "+0.10"):
        assert shown in _written(console)
    console = _log()
    TrainProgress(4, console=console).print("a[/b] [red]c")
    list(track([1], _MARKUP, console=console))
    show_summary(tmp_path / "[red]run[/bold]\x1b[2J", {"accuracy": 0.5, "format": 1.0}, console)
    for shown in ("a[/b] [red]c", f"{_MARKUP} 1/1", "[red]run[/bold]", "accuracy 50.0%"):
        assert shown in _written(console)
    assert "\x1b" not in _written(console)


@pytest.mark.parametrize(
    ("summary", "shown"),
    [
        ({"accuracy_before": 0.5, "accuracy_after": 0.75}, ("50.0%", "75.0%", "+25.0 points")),
        ({"benchmarks": {"mmmu": 0.5}, "macro_accuracy": 0.25}, ("mmmu", "macro average", "25.0%")),
        ({"benchmarks": {"data": 0.5}}, ("data", "50.0%")),
        ({"loss": 1.0, "eval_loss": 2.0}, ("loss 1.000, on held-out rows 2.000",)),
        ({}, ("report.md, metrics.jsonl",)),
    ],
)
def test_a_run_ends_with_its_scores(summary: dict, shown: tuple, tmp_path: Path) -> None:
    """What there is of scores and files, and nothing else."""
    for name in ("report.md", "metrics.jsonl"):
        (tmp_path / name).touch()
    console = _log()
    show_summary(tmp_path, summary, console)
    assert all(text in _written(console) for text in shown)


def test_a_completion_cannot_drive_or_fill_the_terminal() -> None:
    """Control characters never reach it; however long the completions are, their panel is not, and
    their ends, which hold the answers, are kept."""
    console = _terminal()
    hostile = "a\x1b]0;title\x07\x9b2Jb\rc\u202ed"
    show_group(console, hostile, [SampleRecord(1, "q", hostile, "d", 0.0, "negative")])
    assert "]0;title" in _written(console)
    assert not any(c in _written(console) for c in ("\x1b]0", "\x07", "\x9b", "\r", "\u202e"))
    for text in ("word " * 100_000, "\n" * 100_000, "x" * 100_000):
        console = _log()
        record = SampleRecord(1, text, text + "THE END", text, 0.0, "negative")
        show_group(console, text, [record] * 3)
        assert len(_written(console).splitlines()) < 60
        assert _written(console).count("THE END") == 3


@pytest.mark.parametrize(
    ("text", "max_chars", "max_lines", "wanted"),
    [
        ("línea\n\t日本語\u3000🙂", 100, 5, "línea\n\t日本語\u3000🙂"),
        ("a" * 50 + "z" * 50, 20, 5, "a" * 7 + " […] " + "z" * 8),
        ("\n".join("abcdefgh"), 100, 4, "a\nb\n[…]\nh"),
        ("a\nb", 100, 1, "[…]"),
    ],
)
def test_printable_keeps_both_ends(text: str, max_chars: int, max_lines: int, wanted: str) -> None:
    """Short text is unchanged whatever its script; a cut takes the middle, within the bounds."""
    assert printable(text, max_chars, max_lines) == wanted
