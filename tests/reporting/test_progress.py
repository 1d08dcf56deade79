"""Bars on a terminal, plain lines in a log, samples to the letter."""

import io

import pytest
from rich.console import Console

from care_train.reporting import TrainProgress, show_sample, track
from care_train.reporting.samples import printable

_VALUES = {"reward": 0.5, "accuracy": 0.25, "kl": 0.01, "tokens_per_second": 12345.6}


def _log() -> Console:
    return Console(file=io.StringIO(), width=100)


def _terminal() -> Console:
    return Console(
        file=io.StringIO(), width=100, force_terminal=True, force_interactive=True, _environ={}
    )


def _written(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_log_gets_about_ten_lines() -> None:
    """Without a terminal there is no redrawing: a plain line per tenth, first and last included."""
    console = _log()
    with TrainProgress(200, description="care", console=console) as progress:
        for step in range(1, 201):
            progress.update(step, _VALUES)
    lines = _written(console).splitlines()
    assert 10 <= len(lines) <= 11
    assert lines[0].startswith("care 1/200") and lines[-1].startswith("care 200/200")
    for shown in ("reward 0.500", "accuracy 25.0%", "KL 0.0100", "tokens/s 12,346"):
        assert shown in lines[-1]
    assert "format" not in lines[-1] and "\x1b" not in lines[-1]


def test_loss_is_shown_without_a_reward() -> None:
    """A cold start follows its loss; reinforcement learning, whose loss means little, does not."""
    console = _log()
    with TrainProgress(2, console=console) as progress:
        progress.update(1, {"loss": 2.5})
        progress.update(2, {"loss": 2.5, "reward": 1.0})
    first, last = _written(console).splitlines()
    assert "loss 2.500" in first and "loss" not in last


def test_terminal_gets_a_bar() -> None:
    """On a terminal the bar shows the step and the numbers below it."""
    console = _terminal()
    with TrainProgress(4, description="care", console=console) as progress:
        progress.update(3, _VALUES)
    text = _written(console)
    assert "3/4" in text and "12,346" in text and "ETA" in text


def test_disabled_progress_is_silent() -> None:
    """Other ranks neither draw nor print."""
    for console in (_log(), _terminal()):
        with TrainProgress(4, enabled=False, console=console) as progress:
            progress.update(4, _VALUES)
            progress.print("hello")
        assert list(track([1, 2], "work", enabled=False, console=console)) == [1, 2]
        assert _written(console) == ""


def test_evaluation_nests_in_a_run() -> None:
    """A second bar may run inside the first."""
    console = _terminal()
    with TrainProgress(4, description="care", console=console) as progress:
        assert list(track(range(3), "evaluate", console=console)) == [0, 1, 2]
        progress.update(1, _VALUES)
    assert "evaluate" in _written(console)


def test_track_in_a_log() -> None:
    """Long work tells its end in a log; without a known length, its start."""
    console = _log()
    assert list(track(range(30), "evaluate", console=console)) == list(range(30))
    assert "evaluate 30/30" in _written(console)
    assert list(track(iter("ab"), "generate", console=console)) == ["a", "b"]
    assert "generate ..." in _written(console)


def test_markup_in_a_completion_is_literal() -> None:
    """Model output is shown to the letter: rich's markup in it does nothing, nor raises."""
    console = _log()
    hostile = "[red]x[/red] [/bold] [link=http://a]b[/link] :smile:"
    show_sample(console, 3, hostile, hostile, hostile, 1.1, hostile)
    text = _written(console)
    assert text.count("[red]x[/red] [/bold] [link=http://a]b[/link] :smile:") == 3
    assert "step 3 · [red]x" in text and "+1.10" in text


def test_progress_prints_strings_literally() -> None:
    """Brackets in a printed string are not markup."""
    console = _log()
    TrainProgress(4, console=console).print("a[/b] [red]c")
    assert "a[/b] [red]c" in _written(console)


def test_completion_cannot_drive_the_terminal() -> None:
    """Escape sequences and other control characters never reach the terminal."""
    console = _terminal()
    show_sample(console, 1, "q", "a\x1b]0;title\x07\x9b2Jb\rc\u202ed", "d", 0.0, "negative")
    assert "]0;title" in _written(console)
    for control in ("\x1b]0", "\x07", "\x9b", "\r", "\u202e"):
        assert control not in _written(console)


@pytest.mark.parametrize("text", ["word " * 100_000, "\n" * 100_000, "x" * 100_000])
def test_huge_completion_stays_small(text: str) -> None:
    """However long a completion is, its panel is not; its end, the answer, is kept."""
    console = _log()
    show_sample(console, 1, text, text + "THE END", text, 0.0, "negative")
    assert len(_written(console).splitlines()) < 50
    assert "THE END" in _written(console)


def test_printable_keeps_short_text() -> None:
    """Text within the bounds is unchanged, whatever its script."""
    text = "línea\n\t日本語\u3000🙂"
    assert printable(text, max_chars=100, max_lines=5) == text


def test_printable_keeps_both_ends() -> None:
    """A cut takes the middle, in characters and in lines, and stays within the bounds."""
    cut = printable("a" * 50 + "z" * 50, max_chars=20, max_lines=5)
    assert len(cut) == 20 and cut.startswith("aa") and cut.endswith("zz")
    lines = printable("\n".join("abcdefgh"), max_chars=100, max_lines=4).split("\n")
    assert lines == ["a", "b", "[…]", "h"]
    assert printable("a\nb", max_chars=100, max_lines=1) == "[…]"
