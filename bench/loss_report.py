"""What `bench.loss` found, as tables and as figures for its JSON line."""

import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console
from rich.table import Table

from bench.measure import Spread, describe
from bench.peers import OURS, PEERS, Contender


@dataclass
class Result:
    """One contender at one size."""

    seconds: list[float] = field(default_factory=list)
    peak: int | None = None
    """Bytes beyond the inputs."""
    note: str = ""
    """Why there is no time."""
    expected: float = 0.0
    """Seconds a call: measured, or scaled from fewer rows where it was skipped."""


@dataclass
class Cell:
    """All contenders at one size, the floor first."""

    shape: str
    rows: int
    width: int
    vocab: int
    results: dict[str, Result] = field(default_factory=dict)

    def median(self, name: str) -> float:
        """Median seconds of a contender that was timed."""
        return statistics.median(self.results[name].seconds)

    def ratio(self, name: str) -> float:
        """Its median over the floor's."""
        return self.median(name) / self.median("gemms")

    def fastest_peer(self) -> str | None:
        """Of those that were timed; None where all were skipped."""
        peers = [name for name in PEERS if name in self.results and self.results[name].seconds]
        return min(peers, key=self.median, default=None)


@dataclass
class Findings:
    """Everything measured on one device."""

    device: str
    facts: Mapping[str, Any]
    contenders: Mapping[str, Contender]
    headline: Cell
    """Whose figures lead the JSON line."""
    cells: list[Cell]
    active: dict[float, list[float]]
    """Seconds of the loss at the headline's size by fraction of active rows; may be empty."""
    temporaries: dict[int, int]
    """Bytes the loss holds beyond inputs, dX and dW, by rows; empty where not measured."""


def figures(found: Findings) -> dict[str, Any]:
    """What goes into the JSON line."""
    cell = found.headline
    fastest = cell.fastest_peer()
    against = None if fastest is None else round(cell.median("ours") / cell.median(fastest), 3)
    active = _active_ratios(found)
    return {
        "headline": {"rows": cell.rows, "width": cell.width, "vocab": cell.vocab},
        "ratio_to_gemms": round(cell.ratio("ours"), 3),
        "fastest_peer": fastest,
        "fastest_peer_ratio": against,
        "quarter_active_ratio": active.get("0.25"),
        "active_ratios": active,
        "temporaries_mib": {str(n): _mib(size) for n, size in found.temporaries.items()},
        "cells": [_cell_figures(cell) for cell in found.cells],
    }


def print_tables(found: Findings, console: Console) -> None:
    """The tables for people."""
    for cell in found.cells:
        console.print(_cell_table(cell, found))
    if found.active:
        console.print(_active_table(found))
    if found.temporaries:
        console.print(_temporaries_table(found))
    console.print(describe(found.facts), highlight=False)


def _cell_figures(cell: Cell) -> dict[str, Any]:
    contenders: dict[str, Any] = {}
    for name, result in cell.results.items():
        entry: dict[str, Any] = {"runs": len(result.seconds)}
        if result.seconds:
            entry["seconds"] = float(f"{cell.median(name):.4g}")
            entry["ratio_to_gemms"] = round(cell.ratio(name), 3)
        if result.peak is not None:
            entry["peak_mib"] = _mib(result.peak)
        if result.note:
            entry["note"] = result.note
        contenders[name] = entry
    size = {"rows": cell.rows, "width": cell.width, "vocab": cell.vocab}
    return {"shape": cell.shape} | size | {"contenders": contenders}


def _cell_table(cell: Cell, found: Findings) -> Table:
    title = f"forward + backward, {found.device}, bfloat16: "
    title += f"N={cell.rows:,}, D={cell.width:,}, V={cell.vocab:,}"
    table = Table("", title=title)
    for heading in ("seconds", "p20 - p80", "x GEMMs", "peak MiB", "runs"):
        table.add_column(heading, justify="right")
    has_notes = any(result.note for result in cell.results.values())
    if has_notes:
        table.add_column("")
    for name, result in cell.results.items():
        cells = ["-"] * 3
        if result.seconds:
            spread = Spread.of(result.seconds)
            interval = f"{spread.p20:.3f} - {spread.p80:.3f}"
            cells = [f"{spread.p50:.3f}", interval, f"{cell.ratio(name):.2f}"]
        cells.append("-" if result.peak is None else f"{_mib(result.peak):,}")
        cells.append(str(len(result.seconds)))
        cells += [result.note] if has_notes else []
        style = "bold" if name in OURS else "dim" if name == "gemms" else None
        table.add_row(found.contenders[name].label, *cells, style=style)
    return table


def _active_ratios(found: Findings) -> dict[str, float]:
    medians = {fraction: statistics.median(values) for fraction, values in found.active.items()}
    return {str(fraction): round(value / medians[1.0], 3) for fraction, value in medians.items()}


def _active_table(found: Findings) -> Table:
    headings = [f"{fraction:.0%}" for fraction in found.active]
    table = Table(f"rows with an advantage, of {found.headline.rows:,}", *headings)
    medians = [statistics.median(values) for values in found.active.values()]
    table.add_row("linear_policy_loss, seconds", *[f"{value:.3f}" for value in medians])
    table.add_row("over all rows active", *[f"{r:.2f}" for r in _active_ratios(found).values()])
    return table


def _temporaries_table(found: Findings) -> Table:
    table = Table("N", *[f"{n:,}" for n in found.temporaries])
    held = [f"{_mib(size):,}" for size in found.temporaries.values()]
    table.add_row("linear_policy_loss, MiB beyond inputs, dX and dW", *held)
    logits = [f"{_mib(4 * n * found.headline.vocab):,}" for n in found.temporaries]
    table.add_row("one [N, V] in float32, MiB", *logits, style="dim")
    return table


def _mib(size: int) -> int:
    return round(size / 2**20)
