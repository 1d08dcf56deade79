"""What a run shows on a terminal or in a log: bars or plain lines, groups, its scores."""

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from datetime import timedelta
from pathlib import Path
from typing import Any, Self, TypeVar

from rich.console import Console, Group
from rich.panel import Panel
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from care_train.reporting.archive import ARCHIVE
from care_train.reporting.text import SampleRecord, printable

Item = TypeVar("Item")

_SHOWN = {
    "reward": ("reward", "{:.3f}"),
    "accuracy": ("accuracy", "{:.1%}"),
    "format": ("format", "{:.1%}"),
    "kl": ("KL", "{:.4f}"),
    "loss": ("loss", "{:.3f}"),
    "tokens_per_second": ("tokens/s", "{:,.0f}"),
}
_PLAIN_SECONDS = 10.0
"""At least, between two lines of a log."""

_WHOLE_RUN = 30 * 24 * 3600.0
"""Seconds of history the ETA looks at. rich's default, 30, is shorter than one step can be."""

# One console, because rich nests live displays (an evaluation inside a run) only within one.
_CONSOLE = Console(stderr=True)


class TrainProgress:
    """A training run's bar with its latest numbers below, in a log a line per step, of short ones
    every ten seconds; use it as a context manager."""

    def __init__(
        self,
        total_steps: int,
        enabled: bool = True,
        description: str = "Training",
        *,
        start_step: int = 0,
        console: Console | None = None,
    ) -> None:
        """Set up; `with` starts the display, on standard error by default.

        Of the `total_steps` of the whole run `start_step` were done before it was resumed. Without
        `enabled` (on every rank but the first) nothing is shown or printed.
        """
        self._console = console or _CONSOLE
        self._enabled = enabled
        is_live = enabled and self._console.is_interactive
        self._lines = None
        if enabled and not is_live:
            self._lines = _PlainLines(self._console, total_steps, description, start_step)
        self._bar = _TrainBar(self._console, disable=not is_live)
        self._task = self._bar.add_task(description, total=total_steps, completed=start_step)

    def update(self, step: int, values: Mapping[str, Any]) -> None:
        """Show how many steps are done, and those of the last one's numbers that are known here."""
        self._bar.values = _shown(values)
        self._bar.update(self._task, completed=step)
        if self._lines is not None:
            self._lines.update(step, self._bar.values)

    def print(self, *objects: Any) -> None:
        """Print above the bar; strings to the letter, for they may hold a model's words."""
        if self._enabled:
            self._console.print(*objects, markup=False, highlight=False)

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.stop()


def track(
    iterable: Iterable[Item],
    description: str,
    enabled: bool = True,
    *,
    console: Console | None = None,
) -> Iterator[Item]:
    """Yield the items of `iterable` and show how far that has come, on standard error by default;
    in a log, without a length, that it has begun."""
    console = console or _CONSOLE
    if not enabled:
        yield from iterable
    elif console.is_interactive:
        with Progress(*_columns(), console=console, transient=True) as bar:
            yield from bar.track(iterable, description=description)
    elif isinstance(iterable, Sized):
        lines = _PlainLines(console, len(iterable), description)
        for done, item in enumerate(iterable, start=1):
            yield item
            lines.update(done, {})
    else:
        console.print(Text(f"{description} ..."), soft_wrap=True)
        yield from iterable


def show_group(
    target: Console | TrainProgress, outcome: str, records: Sequence[SampleRecord]
) -> None:
    """Print completions of one prompt in a panel, at least one, on a console or above a bar.

    Their texts, which may be a model's, are shown to the letter and bounded in length.
    """
    first = records[0]
    rows = Table.grid(padding=(0, 1))
    rows.add_column(style="dim", justify="right")
    rows.add_column(overflow="fold")
    rows.add_row("prompt", Text(printable(first.prompt, max_chars=400, max_lines=6)))
    rows.add_row("reference", Text(printable(first.answer, max_chars=200, max_lines=3)))
    for record in records:
        role = printable(record.role.replace("_", " "), max_chars=40, max_lines=1)
        text = Text(printable(record.completion, max_chars=1000, max_lines=12))
        rows.add_row(Text(f"{role}\n{record.reward:+.2f}"), text)
    title = Text(f"step {first.step} · {printable(outcome, max_chars=80, max_lines=1)}")
    target.print(Panel(rows, title=title, title_align="left", border_style="dim"))


def show_summary(run_dir: Path, summary: Mapping[str, Any], console: Console | None = None) -> None:
    """Print a run's scores (what summary.json holds), and where everything is, to the letter."""
    console = console or Console()
    if "accuracy_before" in summary:
        table = Table("held-out questions", "before", "after", "change", title_justify="left")
        for name in ("accuracy", "format", "greedy", "greedy_format", "blind"):
            if f"{name}_before" in summary:
                before, after = summary[f"{name}_before"], summary[f"{name}_after"]
                change = f"{100 * (after - before):+.1f} points"
                table.add_row(name, f"{before:.1%}", f"{after:.1%}", change)
        console.print(table)
    elif "benchmarks" in summary:
        table = Table("benchmark", "accuracy")
        macro = {"macro average": summary.get("macro_accuracy")}
        for name, accuracy in (summary["benchmarks"] | macro).items():
            if accuracy is not None:
                table.add_row(name, f"{accuracy:.1%}")
        console.print(table)
    elif "accuracy" in summary:
        console.print(f"accuracy {summary['accuracy']:.1%}, format {summary['format']:.1%}")
    elif "eval_loss" in summary:
        console.print(f"loss {summary['loss']:.3f}, on held-out rows {summary['eval_loss']:.3f}")
    names = ("results.md", "results.json", "report.md", "summary.json", "metrics.jsonl", "final")
    written = ", ".join(name for name in names if (run_dir / name).exists())
    folder = Text(printable(str(run_dir), max_chars=4000, max_lines=1), style="bold")
    line = folder.copy().append(f": {written}", style="not bold")
    console.print(line, soft_wrap=True)
    if (run_dir / ARCHIVE).is_dir():
        hint = Text("its curves and groups on one page: care-train report ").append(folder)
        console.print(hint, soft_wrap=True)


def _shown(values: Mapping[str, Any]) -> dict[str, str]:
    """The numbers that a person follows, formatted, by their label.

    A loss is shown where there is no reward: that of a policy gradient says nothing.
    """
    return {
        label: form.format(float(values[key]))
        for key, (label, form) in _SHOWN.items()
        if values.get(key) is not None and not (key == "loss" and "reward" in values)
    }


def _columns() -> tuple[ProgressColumn, ...]:
    return (
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=None),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("ETA", style="dim"),
        TimeRemainingColumn(),
    )


class _TrainBar(Progress):
    """Two lines: beside the bar, the numbers would not fit a terminal of 80 columns."""

    def __init__(self, console: Console, disable: bool) -> None:
        self.values: dict[str, str] = {}
        super().__init__(
            *_columns(),
            console=console,
            expand=True,
            speed_estimate_period=_WHOLE_RUN,
            disable=disable,
        )

    def get_renderables(self) -> Iterator[Group]:
        numbers = Text("  ")
        for label, value in self.values.items():
            numbers.append(f"{label} ", style="dim").append(f"{value}  ")
        yield Group(self.make_tasks_table(self.tasks), numbers)


class _PlainLines:
    """A line now and then: a log keeps every redraw of a bar."""

    def __init__(self, console: Console, total: int, description: str, start_step: int = 0) -> None:
        self._console = console
        self._total, self._first = total, start_step
        self._description = description
        self._started = time.monotonic()
        self._printed: float | None = None

    def update(self, step: int, values: Mapping[str, str]) -> None:
        """Print the first step, the last one, and what comes late enough after the line before."""
        now = time.monotonic()
        soon = self._printed is not None and now - self._printed < _PLAIN_SECONDS
        if soon and step < self._total:
            return
        self._printed = now
        elapsed, done = now - self._started, step - self._first
        parts = [f"{self._description} {step}/{self._total}"]
        parts += [f"{label} {value}" for label, value in values.items()]
        parts += [f"elapsed {timedelta(seconds=round(elapsed))}"]
        if done > 0 and step < self._total:
            left = elapsed / done * (self._total - step)
            parts.append(f"ETA {timedelta(seconds=round(left))}")
        self._console.print(Text("  ".join(parts)), soft_wrap=True)
