"""The quickstart over algorithms and seeds: means, 95 % intervals, and the README's picture.

    python -m bench.seeds
    python -m bench.seeds --config configs/easy_vqa.yaml --output runs/easy_vqa
    python -m bench.seeds --algorithms care grpo --seeds 0 1 2 --picture docs/learning_curves.png

Every run is `care-train quickstart` in a process of its own, from the same cold start. The first
algorithm's sampled sequences, reflections included, are the budget of the others: they get as many
steps as it takes to sample at least as many. Finished runs in the output folder are reused.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
from collections import Counter, defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import fmean
from typing import Any

from rich.console import Console
from rich.table import Table

from bench.paper.runs import steps_to_sample
from care_train.commands import load_held_out
from care_train.config import Config, configs_folder, load_config
from care_train.data import load_samples
from care_train.reporting import mean_interval, read_metrics
from care_train.reporting.files import finite
from care_train.reporting.plots import plot_comparison
from care_train.training.session import Given

_SCORES = ("accuracy_before", "accuracy_after", "format_before", "format_after", "greedy_after")
_COLLAPSED_FORMAT = 0.7
QUICKSTART = configs_folder() / "quickstart.yaml"


def main() -> int:
    options = _options()
    figures: dict[str, dict[str, Any]] = {}
    steps: list[str] = []
    for algorithm in options.algorithms:
        with ThreadPoolExecutor(options.jobs) as pool:
            tasks = [pool.submit(_run, algorithm, seed, steps, options) for seed in options.seeds]
            summaries = [task.result() for task in tasks]
        figures[algorithm] = _figures(summaries)
        if not steps:
            sampled = fmean(summary["sampled_sequences"] for summary in summaries)
            config = load_config(options.config, options.overrides)
            steps = [f"train.steps={steps_to_sample(sampled, config)}"]
    _print_table(figures, len(options.seeds))
    if options.picture is not None:
        curves = {
            algorithm: [
                read_metrics(_folder(algorithm, seed, options) / "metrics.jsonl")
                for seed in options.seeds
            ]
            for algorithm in options.algorithms
        }
        plot_comparison(curves, options.picture)
    guesser = round(_text_only_accuracy(load_config(options.config, options.overrides)), 4)
    print(f"A guesser who never sees an image scores {guesser:.1%}.")
    facts = {"seeds": options.seeds, "overrides": options.overrides, "text_only": guesser}
    print(json.dumps(finite(facts | figures)))  # the interval of a single seed is NaN
    return 0


def _text_only_accuracy(config: Config) -> float:
    """Test accuracy of each question's commonest training answer: what the images must beat."""
    answers: dict[str, Counter[str]] = defaultdict(Counter)
    for sample in load_samples(config.data):
        answers[sample.prompt][sample.answer] += 1
    test = load_held_out(config, Given())
    guesses = [answers[sample.prompt].most_common(1) for sample in test]
    right = [g[0][0] == s.answer for g, s in zip(guesses, test, strict=True) if g]
    return sum(right) / len(test)


def _run(
    algorithm: str, seed: int, steps: Sequence[str], options: argparse.Namespace
) -> dict[str, Any]:
    folder = _folder(algorithm, seed, options)
    arguments = ["quickstart", "--config", str(options.config), f"algorithm={algorithm}"]
    arguments += [f"seed={seed}", f"name={folder.name}", f"output_dir={folder.parent}"]
    arguments += [*options.overrides, *steps]
    if not _is_finished(folder, arguments):
        command = [sys.executable, "-m", "care_train", *arguments]
        threads = max((os.cpu_count() or 1) // options.jobs, 1)
        environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
        subprocess.run(command, check=True, env=environment)
    return json.loads((folder / "summary.json").read_text())


def _is_finished(folder: Path, arguments: Sequence[str]) -> bool:
    """Whether the folder holds this very run: a changed override or budget runs anew."""
    path = folder / "summary.json"
    if not path.is_file():
        return False
    return json.loads(path.read_text())["command"] == shlex.join(["care-train", *arguments])


def _folder(algorithm: str, seed: int, options: argparse.Namespace) -> Path:
    return options.output / f"{algorithm}-{seed}"


def _figures(summaries: Sequence[dict[str, Any]]) -> dict[str, Any]:
    figures: dict[str, Any] = {}
    for key in _SCORES:
        mean, half_width = mean_interval([summary[key] for summary in summaries])
        figures[key] = {"mean": round(mean, 4), "interval": round(half_width, 4)}
    figures["accuracy_after_by_seed"] = [summary["accuracy_after"] for summary in summaries]
    figures["format_after_by_seed"] = [summary["format_after"] for summary in summaries]
    figures["collapsed_seeds"] = [
        summary["seed"]
        for summary in summaries
        if summary["format_after"] < _COLLAPSED_FORMAT
        or summary["accuracy_after"] < summary["accuracy_before"]
    ]
    for key in ("sampled_sequences", "trained_sequences", "decoded_tokens", "wall_seconds"):
        figures[key] = round(fmean(summary[key] for summary in summaries))
    return figures


def _print_table(figures: dict[str, dict[str, Any]], num_seeds: int) -> None:
    title = f"mean and 95 % interval over {num_seeds} seeds, in percent"
    table = Table("algorithm", *[key.replace("_", " ") for key in _SCORES], title=title)
    table.add_column("sampled")
    table.add_column("trained")
    for algorithm, values in figures.items():
        scores = [
            f"{100 * values[key]['mean']:.1f} ± {100 * values[key]['interval']:.1f}"
            for key in _SCORES
        ]
        counts = [f"{values[key]:,}" for key in ("sampled_sequences", "trained_sequences")]
        table.add_row(algorithm, *scores, *counts)
    Console(width=120).print(table)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.seeds", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--algorithms", nargs="+", default=["care", "grpo"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--config", type=Path, default=QUICKSTART, help="default: the quickstart's")
    parser.add_argument("--output", type=Path, default=Path("runs/seeds"))
    parser.add_argument("--picture", type=Path, help="write the learning curves here")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time; they share the cores")
    parser.add_argument("--overrides", nargs="*", default=[], metavar="key=value")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
