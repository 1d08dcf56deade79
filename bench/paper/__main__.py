"""The paper's tables and figures in small, on strips of digits: real runs, then CSV and pictures.

    python -m bench.paper table2 --seeds 5
    python -m bench.paper fig8 fig11 --seeds 3
    python -m bench.paper table2 --data charts    # another task, into results/charts/
    python -m bench.paper all --quick             # everything, with two steps a run
    python -m bench.paper table2 --summarize      # from the CSV alone

Every run is `care-train train` in a process of its own; all share one cold start. Runs lie in
`runs/paper/` under a hash of their configuration: finished ones are used again, interrupted ones
gone on with. The first variant's sampled sequences, reflections included, are the budget of the
others. CSV files hold the command, the commit and the versions.
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from datetime import timedelta
from itertools import product
from pathlib import Path
from statistics import fmean

from bench.paper.experiments import EXPERIMENTS
from bench.paper.results import draw, print_table, read_results, write_results
from bench.paper.runs import Done, Run, Runner
from care_train.config import SHIPPED_DATA
from care_train.reporting.files import finite

_RESULTS = Path(__file__).with_name("results")
_DATA_PATHS = ("data.path", "sft.data.path", "eval.data")


def main(arguments: Sequence[str] | None = None) -> int:
    options = _options(arguments)
    names = list(EXPERIMENTS) if options.names == ["all"] else options.names
    found = {}
    for name in names:
        experiment = EXPERIMENTS[name]
        if not options.summarize:
            write_results(options.results, name, _make(name, options))
        rows = read_results(options.results / f"{name}.csv")
        found[name] = print_table(experiment, rows)
        print(f"{options.results / name}.csv, {draw(options.results, name)}")
    print(json.dumps(finite(found)))  # The interval of a single seed is NaN.
    return 0


def _make(name: str, options: argparse.Namespace) -> list[Done]:
    """All runs of an experiment, with progress and the time left on standard error."""
    experiment = EXPERIMENTS[name]
    variants = experiment.variants
    runner = Runner(options.output, quick=options.quick, shared=options.overrides)
    # A run of every variant with one seed, then with the next.
    pairs = product(range(1 if options.quick else options.seeds), options.variants or variants)
    runs = [Run(variant, seed, variants[variant]) for seed, variant in pairs]
    done, seconds = [], []
    for number, run in enumerate(runs, start=1):
        left = ""
        if seconds:
            estimate = fmean(seconds) * (len(runs) - number + 1)
            left = f", about {timedelta(seconds=round(estimate))} left"
        print(f"{name} {number}/{len(runs)}: {run.variant}, seed {run.seed}{left}", file=sys.stderr)
        start = time.perf_counter()
        done.append(runner.make(experiment, run))
        if (elapsed := time.perf_counter() - start) > 1:  # not those found finished
            seconds.append(elapsed)
    return done


def _options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.paper", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("names", nargs="+", choices=[*EXPERIMENTS, "all"], metavar="NAME")
    parser.add_argument("--seeds", type=int, default=3, help="seeds 0 to SEEDS - 1; default: 3")
    parser.add_argument("--variants", nargs="+", metavar="NAME", help="default: all")
    parser.add_argument("--data", choices=SHIPPED_DATA, metavar="NAME", help="default: base.yaml's")
    parser.add_argument("--overrides", nargs="*", default=[], metavar="key=value")
    parser.add_argument("--quick", action="store_true", help="one seed, two steps: is it whole?")
    parser.add_argument("--summarize", action="store_true", help="make no runs, read the CSV")
    parser.add_argument("--output", type=Path, help="runs; default: runs/paper")
    parser.add_argument(
        "--results", type=Path, help="CSV and pictures; default: bench/paper/results"
    )
    options = parser.parse_args(arguments)
    quick = Path("runs/paper-quick")
    options.output = options.output or (quick if options.quick else Path("runs/paper"))
    options.results = options.results or (quick / "results" if options.quick else _RESULTS)
    if options.data:
        options.results /= options.data
        options.overrides += [f"{key}={options.data}" for key in _DATA_PATHS]
    for name in options.names if options.variants else []:
        known = EXPERIMENTS[name].variants
        if unknown := [variant for variant in options.variants if variant not in known]:
            parser.error(f"--variants: got {unknown[0]!r}, wanted some of {', '.join(known)}")
        if options.variants[0] != next(iter(known)):
            parser.error(
                f"--variants: {next(iter(known))!r} comes first: the others get its budget"
            )
    return options


if __name__ == "__main__":
    sys.exit(main())
