"""A run's scores on standard output."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table


def show_summary(run_dir: Path, summary: Mapping[str, Any]) -> None:
    """Scores before and after on standard output, and where everything is."""
    console = Console()
    if "accuracy_before" in summary:
        table = Table("held-out questions", "before", "after", "change", title_justify="left")
        for name in ("accuracy", "format", "greedy", "greedy_format"):
            if f"{name}_before" in summary:
                before, after = summary[f"{name}_before"], summary[f"{name}_after"]
                change = f"{100 * (after - before):+.1f} points"
                table.add_row(name, f"{before:.1%}", f"{after:.1%}", change)
        console.print(table)
    elif "benchmarks" in summary:
        table = Table("benchmark", "accuracy")
        for name, accuracy in summary["benchmarks"].items():
            table.add_row(name, f"{accuracy:.1%}")
        if "macro_accuracy" in summary:
            table.add_row("macro average", f"{summary['macro_accuracy']:.1%}")
        console.print(table)
    elif "accuracy" in summary:
        console.print(f"accuracy {summary['accuracy']:.1%}, format {summary['format']:.1%}")
    elif "eval_loss" in summary:
        console.print(f"loss {summary['loss']:.3f}, on held-out rows {summary['eval_loss']:.3f}")
    names = ("results.md", "results.json", "report.md", "summary.json", "metrics.jsonl", "final")
    written = ", ".join(name for name in names if (run_dir / name).exists())
    console.print(f"[bold]{run_dir}[/bold]: {written}")
