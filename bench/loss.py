"""Time and peak memory of the policy loss, forward and backward, against everything else.

    python -m bench.loss                        # the head of Qwen2.5-VL-3B at 256 and 512 rows
    python -m bench.loss --quick                # 128 rows, three rounds
    python -m bench.loss --shape both --full    # both heads, 256 to 4,096 rows: an hour and more
    python -m bench.loss --floor --shape 7b --rows 2048    # ours beside the bare products alone

The floor is three bare matrix products of the same shapes (logits, dX, dW), taken in turns with the
contenders in the same process. Every gradient is checked first; one that is off by more than 5 %
gets no time. Peak memory is counted beyond the inputs, on the CPU in a process of its own. Also:
the time when only 75, 50 or 25 % of the rows have an advantage, and what the loss holds besides dX
and dW by number of rows. The last line is one JSON object with the figures.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from bench.accuracy import Truth, relative_error, true_outcome
from bench.measure import (
    Spread,
    describe,
    devices,
    interleave,
    machine_facts,
    numbers_table,
    peak_memory,
    quieten,
    run_contender,
)
from bench.peers import (
    OURS,
    PEERS,
    Contender,
    MeasurementError,
    Outcome,
    Problem,
    chosen_contenders,
    gemms,
    make_problem,
)

# Hidden size and vocabulary of Qwen2.5-VL's heads.
SHAPES = {"3b": (2048, 151_936), "7b": (3584, 152_064)}
_ROWS = {"cpu": [256, 512], "cuda": [512, 4096]}
_FULL_ROWS = [256, 512, 1024, 2048, 4096]
_HEADLINE_ROWS = {"cpu": 512, "cuda": 4096}
_TEMPORARIES_ROWS = [1024, 2048]
_ACTIVE_FRACTIONS = (1.0, 0.75, 0.5, 0.25)
_WRONG = 0.05
# Calls this long are not repeated just to warm up.
_SLOW_SECONDS = 5.0
_FLOOR = Contender(gemms, "torch", "three bare GEMMs")


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
    results: dict[str, Result]

    @property
    def size(self) -> dict[str, int]:
        """For the JSON line."""
        return {"rows": self.rows, "width": self.width, "vocab": self.vocab}

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


class Bench:
    """What is measured on one device: `run` does it, `print_tables` and `figures` say it."""

    def __init__(self, device: str, contenders: dict[str, Contender], options: argparse.Namespace):
        self.device = device
        self.contenders = {"gemms": _FLOOR} | contenders
        self.options = options
        usual = [128] if options.quick else _FULL_ROWS if options.full else _ROWS[device]
        self.rows: list[int] = sorted({*(options.rows or usual)})
        self.facts = machine_facts(device)
        self.cells: list[Cell] = []
        self.active: dict[str, float] = {}
        """Median seconds of the loss at the headline's size by fraction of active rows."""
        self.temporaries: dict[int, int] = {}
        """Bytes the loss holds beyond inputs, dX and dW, by rows; empty where not measured."""

    def run(self) -> None:
        """Measure everything the options ask for.

        Raises:
            MeasurementError: a contender failed, or our own gradient is wrong.
        """
        for shape, (width, vocab) in self.options.shapes.items():
            problem = make_problem(self.rows[-1], width, vocab, self.device)
            cells = self._time_shape(shape, problem)
            self.cells += cells
            if self.options.active and not self.active:
                self._time_active_rows(problem.first(self.headline.rows))
            del problem
            if self.options.memory:
                self._measure_peaks(cells)
                self.temporaries = self.temporaries or self._measure_temporaries(cells[0])

    @property
    def headline(self) -> Cell:
        """The usual number of rows of the first shape; its most rows where that was not asked."""
        first = [cell for cell in self.cells if cell.shape == self.cells[0].shape]
        wanted = _HEADLINE_ROWS[self.device]
        return next((cell for cell in first if cell.rows == wanted), first[-1])

    def _time_shape(self, shape: str, problem: Problem) -> list[Cell]:
        vocab, width = problem.head_weight.shape
        cells: list[Cell] = []
        for rows in self.rows:
            print(f"{shape}, {rows:,} rows on {self.device}", file=sys.stderr)
            results = {name: Result() for name in self.contenders}
            for name in results if cells else ():
                results[name].expected = cells[-1].results[name].expected * rows / cells[-1].rows
            cells.append(Cell(shape, rows, width, vocab, results))
            self._time(cells[-1], problem.first(rows))
        return cells

    def _time(self, cell: Cell, problem: Problem) -> None:
        calls: dict[str, Callable[[], Outcome]] = {}
        truth = true_outcome(problem, torch.float64 if self.device == "cuda" else torch.float32)
        for name, contender in self.contenders.items():
            result = cell.results[name]
            if name in PEERS and result.expected > self.options.budget:
                result.note = f"skipped: about {result.expected:.0f} s a call"
                continue
            # Also the warm-up, in which compilers compile.
            outcome = run_contender(name, contender.run, problem)
            result.note = "" if name == "gemms" else _fault(outcome, truth)
            del outcome
            if name in OURS and result.note:
                raise MeasurementError(f"{name} at {cell.rows} rows: {result.note}")
            if not result.note:
                calls[name] = lambda run=contender.run: run(problem)
        del truth
        for name, seconds in self._interleave(calls).items():
            cell.results[name].seconds = seconds
            cell.results[name].expected = statistics.median(seconds)

    def _time_active_rows(self, problem: Problem) -> None:
        run = self.contenders["ours"].run
        parts = {str(fraction): problem.with_active(fraction) for fraction in _ACTIVE_FRACTIONS}
        calls = {key: lambda part=part: run(part) for key, part in parts.items()}
        for call in calls.values():
            call()
        times = self._interleave(calls).items()
        self.active = {key: statistics.median(seconds) for key, seconds in times}

    def _interleave(self, calls: dict[str, Callable[[], Outcome]]) -> dict[str, list[float]]:
        return interleave(calls, self.options.repeats, self.options.budget, self.device)

    def _measure_peaks(self, cells: list[Cell]) -> None:
        for name in self.contenders:
            timed = [cell for cell in cells if cell.results[name].seconds]
            if timed:
                rows = [cell.rows for cell in timed]
                is_slow = timed[-1].results[name].expected > _SLOW_SECONDS
                peaks = self._peaks(name, rows, cells[0], runs=1 if is_slow else 2)
                for cell in timed:
                    cell.results[name].peak = peaks[cell.rows]

    def _measure_temporaries(self, cell: Cell) -> dict[int, int]:
        extra = [] if self.options.quick or self.options.size else _TEMPORARIES_ROWS
        peaks = self._peaks("ours", sorted({*self.rows, *extra}), cell, runs=2)
        row_bytes = cell.width * torch.bfloat16.itemsize
        return {n: max(peak - (n + cell.vocab) * row_bytes, 0) for n, peak in peaks.items()}

    def _peaks(self, name: str, rows: list[int], cell: Cell, runs: int) -> dict[int, int]:
        return peak_memory(name, rows, cell.width, cell.vocab, device=self.device, runs=runs)

    def figures(self) -> dict[str, Any]:
        """What goes into the JSON line."""
        cell = self.headline
        fastest = cell.fastest_peer()
        against = None if fastest is None else round(cell.median("ours") / cell.median(fastest), 3)
        active = self._active_ratios()
        return {
            "headline": cell.size,
            "ratio_to_gemms": round(cell.ratio("ours"), 3),
            "fastest_peer": fastest,
            "fastest_peer_ratio": against,
            "quarter_active_ratio": active.get("0.25"),
            "active_ratios": active,
            "temporaries_mib": {str(n): _mib(size) for n, size in self.temporaries.items()},
            "cells": [_cell_figures(cell) for cell in self.cells],
        }

    def print_tables(self) -> None:
        """The tables for people."""
        console = Console(width=120)
        for cell in self.cells:
            console.print(self._cell_table(cell))
        if self.active:
            fractions = [f"{float(fraction):.0%}" for fraction in self.active]
            table = Table(f"rows with an advantage, of {self.headline.rows:,}", *fractions)
            seconds, ratios = self.active.values(), self._active_ratios().values()
            table.add_row("linear_policy_loss, seconds", *[f"{one:.3f}" for one in seconds])
            table.add_row("over all rows active", *[f"{ratio:.2f}" for ratio in ratios])
            console.print(table)
        if self.temporaries:
            table = Table("N", *[f"{n:,}" for n in self.temporaries])
            held = [f"{_mib(size):,}" for size in self.temporaries.values()]
            table.add_row("linear_policy_loss, MiB beyond inputs, dX and dW", *held)
            logits = [f"{_mib(4 * n * self.headline.vocab):,}" for n in self.temporaries]
            table.add_row("one [N, V] in float32, MiB", *logits, style="dim")
            console.print(table)
        console.print(describe(self.facts), highlight=False)

    def _active_ratios(self) -> dict[str, float]:
        return {key: round(one / self.active["1.0"], 3) for key, one in self.active.items()}

    def _cell_table(self, cell: Cell) -> Table:
        title = f"forward + backward, {self.device}, bfloat16: "
        title += f"N={cell.rows:,}, D={cell.width:,}, V={cell.vocab:,}"
        table = numbers_table(title, ("seconds", "p20 - p80", "x GEMMs", "peak MiB", "runs"))
        table.add_column("")  # notes
        for name, result in cell.results.items():
            cells = ["-"] * 3
            if result.seconds:
                spread = Spread.of(result.seconds)
                interval = f"{spread.p20:.3f} - {spread.p80:.3f}"
                cells = [f"{spread.p50:.3f}", interval, f"{cell.ratio(name):.2f}"]
            cells.append("-" if result.peak is None else f"{_mib(result.peak):,}")
            cells += [str(len(result.seconds)), result.note]
            style = "bold" if name in OURS else "dim" if name == "gemms" else None
            table.add_row(self.contenders[name].label, *cells, style=style)
        return table


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
    return {"shape": cell.shape} | cell.size | {"contenders": contenders}


def _fault(outcome: Outcome, truth: Truth) -> str:
    """What is wrong with the gradients, or nothing."""
    errors = {
        "dX": relative_error(outcome.grad_hidden, truth.grad_hidden),
        "dW": relative_error(outcome.grad_weight, truth.grad_weight),
    }
    wrong = [f"{name} off by {x:.1%}" for name, x in errors.items() if not x <= _WRONG]  # NaN too
    return f"wrong gradient: {', '.join(wrong)}" if wrong else ""


def _mib(size: int) -> int:
    return round(size / 2**20)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print the tables and the JSON line; 1 where something could not be measured."""
    options = _options(arguments)
    quieten()
    found: dict[str, dict[str, Any]] = {}
    try:
        contenders = chosen_contenders(options.skip_peer)
        for device in options.devices:
            bench = Bench(device, contenders, options)
            bench.run()
            bench.print_tables()
            found[device] = bench.facts | bench.figures()
    except MeasurementError as error:
        print(f"bench.loss: {error}", file=sys.stderr)
        return 1
    first = found[options.devices[0]]
    keys = ("headline", "ratio_to_gemms", "fastest_peer", "fastest_peer_ratio")
    headline = {key: first[key] for key in (*keys, "quarter_active_ratio")}
    print(json.dumps(headline | {"skipped": options.skip_peer, "devices": found}))
    return 0


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.loss", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--shape", choices=[*SHAPES, "both"], default="3b")
    parser.add_argument("--size", nargs=2, type=int, metavar=("D", "V"), help="another head")
    parser.add_argument("--rows", nargs="+", type=int, metavar="N", help="sampled tokens")
    parser.add_argument("--repeats", type=int, help="rounds; default 5")
    parser.add_argument("--quick", action="store_true", help="128 rows, three rounds")
    parser.add_argument("--full", action="store_true", help="256 to 4,096 rows, seven rounds")
    budget = (
        "of each contender at each size; it limits its rounds, and skips it where one call is more"
    )
    parser.add_argument("--budget", type=float, default=20.0, metavar="SECONDS", help=budget)
    parser.add_argument("--no-memory", dest="memory", action="store_false")
    floor = "no peers, no memory, all rows active; --budget is then ten minutes"
    parser.add_argument("--floor", action="store_true", help=floor)
    parser.add_argument("--skip-peer", nargs="+", default=[], choices=PEERS, metavar="PEER")
    parser.add_argument("--devices", nargs="+", default=devices(), choices=devices())
    options = parser.parse_args(arguments)
    options.active = not options.floor
    if options.floor:
        options.skip_peer, options.memory, options.budget = list(PEERS), False, 600.0
    options.repeats = options.repeats or (3 if options.quick else 7 if options.full else 5)
    options.shapes = SHAPES if options.shape == "both" else {options.shape: SHAPES[options.shape]}
    if options.size:
        options.shapes = {"custom": tuple(options.size)}
    return options


if __name__ == "__main__":
    sys.exit(main())
