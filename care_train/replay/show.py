"""A replay for people and programs: a table, and files of JSON, CSV or PNG."""

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from care_train.replay.compare import Replay
from care_train.reporting.files import write_json

FORMATS = (".json", ".csv", ".png")


def show_replay(replayed: Replay, console: Console | None = None) -> None:
    """Print the totals beside the run's own."""
    console = console or Console()
    summary = replayed.summary()
    changes = ", ".join(f"{key}={new}" for key, (_, new) in replayed.changes.items())
    console.print(Text(f"{replayed.run}: {changes or 'its own settings'}"), soft_wrap=True)
    table = Table("", "the run", "replayed")
    sides = summary["recorded"], summary["replayed"]
    outcomes = dict.fromkeys([*sides[0]["outcomes"], *sides[1]["outcomes"]])
    for name in outcomes:
        table.add_row(f"groups {name}", *(f"{s['outcomes'].get(name, 0):,}" for s in sides))
    table.add_row("sequences trained", *(f"{s['trained_sequences']:,}" for s in sides))
    for name in ("advantage_mean", "advantage_std", "advantage_min", "advantage_max"):
        table.add_row(name.replace("_", " "), *(_number(s[name], "{:+.4f}") for s in sides))
    for name, label in (
        ("positive_share", "advantages above 0"),
        ("signal_share", "sampled tokens with an advantage"),
    ):
        table.add_row(label, *(_number(side[name], "{:.1%}") for side in sides))
    console.print(table)
    console.print(
        f"{summary['groups']:,} groups compared: the same rollouts train in "
        f"{summary['groups_with_same_chosen']:,}, the sets overlap by "
        f"{_number(summary['mean_overlap'], '{:.1%}')} on average; advantages differ by at most "
        f"{summary['max_advantage_difference']:.4g} per sequence, "
        f"{summary['max_token_difference']:.4g} per token",
        soft_wrap=True,
    )
    for reason, count in replayed.unknown.items():
        console.print(f"{count:,} groups left out: {reason}", soft_wrap=True)


def check_outputs(paths: Sequence[Path]) -> None:
    """Refuse, before the work, what `write_replay` cannot write.

    Raises:
        ValueError: another ending than `FORMATS`.
    """
    for path in paths:
        if path.suffix not in FORMATS:
            raise ValueError(f"--out: got {path}, wanted a name that ends in {', '.join(FORMATS)}")


def write_replay(replayed: Replay, path: Path) -> None:
    """Write totals and groups (.json), the groups (.csv) or a picture (.png)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".json":
        write_json(path, replayed.summary() | {"per_group": replayed.rows()})
    elif path.suffix == ".csv":
        rows = replayed.rows()
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(map(_flat, rows))
    else:
        from care_train.reporting.plots import plot_replay

        overlaps = [group.overlap for group in replayed.groups]
        plot_replay(replayed.recorded.advantages, replayed.replayed.advantages, overlaps, path)


def _flat(row: dict[str, Any]) -> dict[str, Any]:
    """Sets of places as text: `0 3 5`."""
    return {k: " ".join(map(str, v)) if isinstance(v, tuple) else v for k, v in row.items()}


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)
