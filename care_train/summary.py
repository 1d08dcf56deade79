"""What a run came to: summary.json, the plots, report.md, and the upload of its model."""

import platform
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

import care_train
from care_train.config import Config
from care_train.distributed import is_main
from care_train.publishing import publish
from care_train.reporting import (
    ARCHIVE,
    SIGNATURE_COLUMNS,
    k_signature,
    read_archive,
    read_metrics,
    write_report,
    write_summary,
)
from care_train.training.session import Given

Summary = dict[str, Any]


def before_and_after(before: Mapping[str, float], after: Mapping[str, float]) -> Summary:
    """The scores of two evaluations side by side."""
    names = {
        "accuracy": "accuracy",
        "format": "format",
        "greedy": "greedy_accuracy",
        "blind": "blind_accuracy",
        "greedy_format": "greedy_format",
    }
    summary: Summary = {"num_questions": int(before["num_questions"])}
    for short, key in names.items():
        if key in before:
            summary |= {f"{short}_before": before[key], f"{short}_after": after[key]}
    return summary


def run_facts(config: Config, given: Given) -> Summary:
    """What ran: name, method, seed, model, versions, and the command where there was one."""
    # A notebook's is no command that anybody could repeat.
    command = {"command": shlex.join(["care-train", *sys.argv[1:]])}
    return ({} if given.in_program else command) | {
        "name": config.name,
        "algorithm": config.algorithm,
        "preset": config.preset,
        "seed": config.seed,
        "model": config.model.path,
        "versions": {
            "care-rl": care_train.__version__,
            "python": platform.python_version(),
            **{name: version(name) for name in ("torch", "transformers", "deepspeed", "triton")},
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        },
    }


def finish(run_dir: Path, config: Config, summary: Summary, start: float) -> Summary:
    """Write summary, plots and report; the wall time is the whole command's."""
    summary = summary | {"wall_seconds": round(time.perf_counter() - start, 1)}
    if is_main():
        path = run_dir / "metrics.jsonl"
        metrics = read_metrics(path) if path.is_file() else []
        draw_plots(run_dir, config.algorithm, metrics)
        write_summary(run_dir, summary)
        write_report(run_dir, summary, metrics)
        if config.hub.push_to and (run_dir / "final").is_dir():
            print(publish(run_dir, config, summary), file=sys.stderr)
    return summary


def draw_plots(run_dir: Path, algorithm: str, metrics: Sequence[Mapping[str, Any]]) -> None:
    """learning_curves.png of what was logged; of an archived CARE run signature.png too."""
    # Matplotlib takes half a second to load, which a run's start need not wait for.
    from care_train.reporting.plots import plot_learning_curves, plot_signature

    if metrics:
        plot_learning_curves(metrics, run_dir / "learning_curves.png")
    if algorithm == "care" and (run_dir / ARCHIVE).is_dir():
        signature = k_signature(read_archive(run_dir, columns=SIGNATURE_COLUMNS))
        if signature is not None:
            plot_signature(signature, run_dir / "signature.png")
