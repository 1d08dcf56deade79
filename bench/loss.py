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
from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console

from bench.accuracy import Truth, relative_error, true_outcome
from bench.loss_report import Cell, Findings, Result, figures, print_tables
from bench.measure import devices, interleave, machine_facts, peak_memory, quieten, run_contender
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


class Bench:
    """The measurements on one device, in order; `run` does them all."""

    def __init__(self, device: str, contenders: dict[str, Contender], options: argparse.Namespace):
        self.device = device
        self.contenders = {"gemms": _FLOOR} | contenders
        self.options = options
        self.rows: list[int] = sorted({*(options.rows or _default_rows(device, options))})

    def run(self) -> Findings:
        """Measure everything the options ask for.

        Raises:
            MeasurementError: a contender failed, or our own gradient is wrong.
        """
        facts = machine_facts(self.device)
        cells: list[Cell] = []
        active: dict[float, list[float]] = {}
        temporaries: dict[int, int] = {}
        for shape, (width, vocab) in self.options.shapes.items():
            problem = make_problem(self.rows[-1], width, vocab, self.device)
            of_shape = self._time_shape(shape, problem)
            cells += of_shape
            if self.options.active and not active:
                active = self._time_active_rows(problem.first(self._headline(cells).rows))
            del problem
            if self.options.memory:
                self._measure_peaks(of_shape)
                temporaries = temporaries or self._measure_temporaries(of_shape[0])
        headline = self._headline(cells)
        return Findings(self.device, facts, self.contenders, headline, cells, active, temporaries)

    def _headline(self, cells: list[Cell]) -> Cell:
        """The usual number of rows of the first shape; its most rows where that was not asked."""
        first = [cell for cell in cells if cell.shape == cells[0].shape]
        wanted = _HEADLINE_ROWS[self.device]
        return next((cell for cell in first if cell.rows == wanted), first[-1])

    def _time_shape(self, shape: str, problem: Problem) -> list[Cell]:
        vocab, width = problem.head_weight.shape
        cells: list[Cell] = []
        for rows in self.rows:
            print(f"{shape}, {rows:,} rows on {self.device}", file=sys.stderr)
            cell = Cell(shape, rows, width, vocab)
            for name in self.contenders:
                cell.results[name] = Result()
                if cells:
                    growth = rows / cells[-1].rows
                    cell.results[name].expected = cells[-1].results[name].expected * growth
            self._time(cell, problem.first(rows))
            cells.append(cell)
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

    def _time_active_rows(self, problem: Problem) -> dict[float, list[float]]:
        run = self.contenders["ours"].run
        parts = {str(fraction): problem.with_active(fraction) for fraction in _ACTIVE_FRACTIONS}
        calls = {key: lambda part=part: run(part) for key, part in parts.items()}
        for call in calls.values():
            call()
        return {float(key): seconds for key, seconds in self._interleave(calls).items()}

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


def _default_rows(device: str, options: argparse.Namespace) -> list[int]:
    if options.quick:
        return [128]
    return _FULL_ROWS if options.full else _ROWS[device]


def _fault(outcome: Outcome, truth: Truth) -> str:
    """What is wrong with the gradients, or nothing."""
    errors = {
        "dX": relative_error(outcome.grad_hidden, truth.grad_hidden),
        "dW": relative_error(outcome.grad_weight, truth.grad_weight),
    }
    for name, error in errors.items():
        if not error <= _WRONG:  # NaN too
            return f"wrong gradient: {name} off by {error:.1%}"
    return ""


def main() -> int:
    """Measure, print the tables and the JSON line; 1 where something could not be measured."""
    options = _options()
    quieten()
    console = Console(width=120)
    found: dict[str, dict[str, Any]] = {}
    try:
        contenders = chosen_contenders(options.skip_peer)
        for device in options.devices:
            findings = Bench(device, contenders, options).run()
            print_tables(findings, console)
            found[device] = dict(findings.facts) | figures(findings)
    except MeasurementError as error:
        print(f"bench.loss: {error}", file=sys.stderr)
        return 1
    first = found[options.devices[0]]
    keys = ("headline", "ratio_to_gemms", "fastest_peer", "fastest_peer_ratio")
    headline = {key: first[key] for key in (*keys, "quarter_active_ratio")}
    print(json.dumps(headline | {"skipped": options.skip_peer, "devices": found}))
    return 0


def _options() -> argparse.Namespace:
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
    options = parser.parse_args()
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
