"""`care-train data build`: the build with a progress bar, and its counts as a table."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from care_train.config import BuildSettings
from care_train.data.building import build


def build_data(settings: BuildSettings) -> dict[str, Any]:
    """Build, show the counts on standard output, and return the manifest.

    Raises:
        ValueError: as `build`.
    """
    columns = (TextColumn("rows"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    console = Console(stderr=True)
    hidden = not console.is_interactive
    with Progress(*columns, console=console, transient=True, disable=hidden) as progress:
        task = progress.add_task("rows", total=None)
        manifest = build(
            settings, lambda done, total: progress.update(task, completed=done, total=total)
        )
    _show(Path(settings.output), settings.file_name, manifest["counts"])
    return manifest


def _show(output: Path, file_name: str, counts: Mapping[str, Any]) -> None:
    console = Console()
    table = Table("source", "read", "rejected", "usable", "share", "duplicates", "kept", "share")
    for name, one in counts["sources"].items():
        rejected, duplicates = sum(one["rejected"].values()), sum(one["duplicates"].values())
        table.add_row(
            name,
            *(f"{n:,}" for n in (one["read"] - one["filtered"], rejected, one["usable"])),
            f"{one['usable_share']}%",
            f"{duplicates:,}",
            f"{one['kept']:,}",
            f"{one['kept_share']}%",
        )
    total = counts["total"]
    figures = [total["read"] - total["filtered"], total["rejected"], total["usable"]]
    table.add_row(
        "total",
        *(f"{n:,}" for n in figures),
        "",
        f"{total['duplicates']:,}",
        f"{total['kept']:,}",
        "",
    )
    console.print(table)
    for name, one in counts["sources"].items():
        if one["expected_rows"] not in (None, one["usable"]):
            console.print(
                f"{name}: {one['usable']:,} usable rows, expected {one['expected_rows']:,} "
                f"(sources.{name}.expected_rows)"
            )
    console.print(f"[bold]{output}[/bold]: {file_name}, manifest.json, quarantine.jsonl")
