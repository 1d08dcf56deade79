"""The whole training step, tokens per second and where they go, beside TRL's GRPOTrainer.

    python -m bench.step                    # quickstart size, then by group size, length and ranks
    python -m bench.step --no-scaling       # quickstart size alone
    python -m bench.step --ours care-transformers --rounds 12

All start from the same cold-started tiny Qwen2.5-VL and get the same easy-VQA images and prompts,
group size, response length (EOS is out of reach, so all sample equally many tokens), verifier,
learning rate and KL term, one optimiser step per batch, float32. Steps are taken in turns in one
process: TRL, ours, TRL, ours. The ratio is that of tokens per second, reflections' tokens counted
as sampled, in the same round; its median over the rounds is reported. TRL generates with
transformers: its vLLM mode starts on a CPU but stops at the first weight sync ("'Parameter' object
has no attribute 'weight_loader'": vLLM's CPU backend has packed the weights away by then).

Where other processes keep the cores busy, OpenMP threads wait for each other and steps take many
times as long; OMP_NUM_THREADS=1 then gives steadier ratios.

`overhead` is the share of our CARE step that is neither generation nor a forward or backward. The
last line is one JSON object; the exit code is 1 where something could not be measured.
"""

import argparse
import gc
import json
import statistics
import sys
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from care_train.cli import quiet_libraries

quiet_libraries()

from rich.console import Console  # noqa: E402
from rich.progress import Progress  # noqa: E402

from bench.measure import describe, machine_facts, numbers_table  # noqa: E402
from bench.step_ours import (  # noqa: E402
    Case,
    OurTrainer,
    Setup,
    StepFigures,
    measure_ranks,
    prepare,
    threads_of,
)
from care_train.training.timer import MODEL_PARTS  # noqa: E402

OURS = {
    "care-transformers": ("algorithm=care", "rollout.engine=transformers"),
    "grpo-transformers": ("algorithm=grpo", "rollout.engine=transformers"),
    "care-vllm": ("algorithm=care", "rollout.engine=vllm"),
    "grpo-vllm": ("algorithm=grpo", "rollout.engine=vllm"),
}
"""Our contenders by name, as overrides of the quickstart."""

WARM_UP = 2
"""Steps of each that do not count."""


@dataclass(frozen=True)
class Result:
    """What one contender's steps came to."""

    ratio: float | None
    """Of its tokens per second to TRL's in the same round, median; None for TRL."""
    ratios: list[float]
    tokens_per_second: float
    seconds: float
    trained_sequences: float
    shares: dict[str, float]
    """Of the step by part, from the sums over all steps."""

    @property
    def overhead(self) -> float:
        """The share that no model computes in."""
        return 1 - sum(self.shares.get(part, 0.0) for part in MODEL_PARTS)

    def figures(self) -> dict[str, Any]:
        """What goes into the JSON line."""
        return {
            "ratio_to_trl": None if self.ratio is None else round(self.ratio, 3),
            "ratios": [round(ratio, 2) for ratio in self.ratios],
            "tokens_per_second": round(self.tokens_per_second),
            "seconds": round(self.seconds, 3),
            "trained_sequences": round(self.trained_sequences, 1),
            "overhead": round(self.overhead, 4),
            "shares": {part: round(share, 4) for part, share in self.shares.items()},
        }


def compare(setup: Setup, case: Case, ours: Sequence[str], rounds: int) -> dict[str, Result]:
    """Take `rounds` counted steps of TRL and each of ours, in turns.

    Args:
        setup: policy and rows.
        case: sizes.
        ours: names in `OURS`.
        rounds: steps that count.
    """
    trainers = {name: OurTrainer(setup, case, OURS[name]) for name in ours}
    taken: dict[str, list[StepFigures]] = {name: [] for name in ("trl", *ours)}
    total = rounds + WARM_UP

    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(f"{case.group_size} x {case.length} tokens", total=total)

        def turn(theirs: StepFigures) -> None:
            taken["trl"].append(theirs)
            shift = progress.tasks[0].completed % max(len(ours), 1)
            # As a run of ours does (`few_collections`); TRL's runs leave Python's defaults.
            gc.freeze()
            for name in [*ours[int(shift) :], *ours[: int(shift)]]:
                taken[name].append(trainers[name].run())
            gc.unfreeze()
            progress.advance(task)

        with warnings.catch_warnings():
            # TRL asks for another vLLM release, which it is not told to use.
            warnings.filterwarnings("ignore", message="TRL currently supports vLLM")
            from bench.step_trl import run_trl
        with tempfile.TemporaryDirectory() as folder:
            run_trl(setup, case, total, folder, turn)
    counted = {name: figures[WARM_UP:] for name, figures in taken.items()}
    return {name: summarize(name, figures, counted) for name, figures in counted.items()}


def summarize(
    name: str, figures: Sequence[StepFigures], counted: dict[str, list[StepFigures]]
) -> Result:
    """Medians of one contender's steps, and its ratios to TRL's among those `counted`."""
    seconds = sum(f.seconds for f in figures)
    parts = {part for f in figures for part in f.parts}
    ratios = [
        own.tokens_per_second / theirs.tokens_per_second
        for own, theirs in zip(figures, counted.get("trl", []), strict=False)
    ]
    return Result(
        None if name == "trl" or not ratios else statistics.median(ratios),
        ratios if name != "trl" else [],
        statistics.median(f.tokens_per_second for f in figures),
        statistics.median(f.seconds for f in figures),
        statistics.mean(f.trained_sequences for f in figures),
        {part: sum(f.parts.get(part, 0.0) for f in figures) / seconds for part in sorted(parts)},
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print the tables and one JSON line."""
    options = _options(arguments)
    facts = machine_facts("cpu")
    print(describe(facts))
    case = Case(options.prompts, options.group_size, options.length, options.micro_batch)
    with tempfile.TemporaryDirectory(prefix="care-bench-step-") as temporary:
        folder = Path(temporary) if options.folder is None else options.folder
        try:
            figures = _measure(prepare(folder, options.cold_steps), case, options)
        except (ImportError, RuntimeError, ValueError) as error:
            print(f"bench.step: could not measure: {error}", file=sys.stderr)
            return 1
    print(json.dumps(figures | {"case": vars(case), "machine": facts}))
    return 0


def _measure(setup: Setup, case: Case, options: argparse.Namespace) -> dict[str, Any]:
    results = compare(setup, case, options.ours, options.rounds)
    _print_results(results, case)
    contenders = {name: result.figures() for name, result in results.items()}
    contenders["trl"]["overhead"] = None  # its parts are others
    leading = contenders[options.ours[0]]
    figures = {key: leading[key] for key in ("ratio_to_trl", "overhead", "shares")}
    if "grpo-transformers" in contenders:
        figures["grpo_ratio_to_trl"] = contenders["grpo-transformers"]["ratio_to_trl"]
    figures["contenders"] = contenders
    if options.scaling:
        figures["scaling"] = _scaling(setup, case, options, results[options.ours[0]])
    return figures


def _scaling(
    setup: Setup, case: Case, options: argparse.Namespace, base: Result
) -> list[dict[str, Any]]:
    """How the step's cost grows from `base`, the case's own: group size, length, ranks."""
    name = options.ours[0]
    grown = {
        "half the group": replace(case, group_size=case.group_size // 2),
        "twice the group": replace(case, group_size=2 * case.group_size),
        "twice the length": replace(case, length=2 * case.length),
        "four times the length": replace(case, length=4 * case.length),
    }
    rows = [_row("the step above", case, 1, base)]
    for label, larger in grown.items():
        result = compare(setup, larger, [name], options.scaling_rounds)[name]
        rows.append(_row(label, larger, 1, result))
    for ranks in options.ranks:
        taken = measure_ranks(setup, case, OURS[name], ranks, WARM_UP + options.scaling_rounds)
        label = f"ranks: {ranks}, threads of each: {threads_of(ranks)}"
        rows.append(_row(label, case, ranks, summarize(name, taken[WARM_UP:], {})))
    headings = ("group", "length", "ranks", "seconds", "tokens/s", "x TRL")
    table = numbers_table(f"How a step's cost grows ({name})", headings)
    for row in rows:
        ratio = "" if row["ratio_to_trl"] is None else f"{row['ratio_to_trl']:.2f}"
        cells = (row["group_size"], row["length"], row["ranks"])
        times = (f"{row['seconds']:.2f}", f"{row['tokens_per_second']:,}")
        table.add_row(row["case"], *map(str, cells), *times, ratio)
    Console(width=100).print(table)
    return rows


def _row(label: str, case: Case, ranks: int, result: Result) -> dict[str, Any]:
    size = {"group_size": case.group_size, "length": case.length, "ranks": ranks}
    figures = result.figures()
    kept = ("seconds", "tokens_per_second", "ratio_to_trl")
    return {"case": label} | size | {key: figures[key] for key in kept}


def _print_results(results: dict[str, Result], case: Case) -> None:
    """What steps cost, then where it goes."""
    title = f"One step: {case.prompts} prompts x {case.group_size} rollouts x {case.length} tokens"
    costs = numbers_table(title, ("tokens/s", "x TRL", "seconds", "sequences trained", "overhead"))
    for name, r in results.items():
        ratio = "" if r.ratio is None else f"{r.ratio:.2f}"
        overhead = "" if name == "trl" else f"{r.overhead:.1%}"
        cells = (f"{r.tokens_per_second:,.0f}", ratio, f"{r.seconds:.2f}")
        costs.add_row(name, *cells, f"{r.trained_sequences:.0f}", overhead)
    shares = numbers_table("Share of the step, in percent", results)
    for part in sorted({part for r in results.values() for part in r.shares}):
        found = [r.shares.get(part) for r in results.values()]
        shares.add_row(part, *("" if share is None else f"{100 * share:.1f}" for share in found))
    Console(width=100).print(costs, shares, sep="\n")


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.step", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--ours", nargs="+", choices=OURS, default=list(OURS)[:3])
    parser.add_argument("--rounds", type=int, default=10, help="steps of each that count")
    parser.add_argument("--scaling-rounds", type=int, default=3)
    parser.add_argument("--no-scaling", dest="scaling", action="store_false")
    parser.add_argument("--ranks", type=int, nargs="*", default=[1, 2])
    parser.add_argument("--cold-steps", type=int, default=100, help="the quickstart's")
    parser.add_argument("--folder", type=Path, help="keep the cold-started model here")
    for key in ("prompts", "group_size", "length", "micro_batch"):
        name = f"--{key.replace('_', '-')}"
        parser.add_argument(name, type=int, default=getattr(Case(), key))
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
