"""Results of runs as CSV, and what is said and drawn of them: from the CSV alone."""

import csv
import importlib.metadata
import math
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import pyarrow as pa
import scipy.stats
from rich.console import Console
from rich.table import Table

from bench.paper.experiments import EXPERIMENTS, SIGNATURE, Experiment
from bench.paper.runs import Done, configuration_hash
from care_train.config import load_config
from care_train.reporting import (
    SIGNATURE_COLUMNS,
    k_signature,
    read_archive,
    read_metrics,
)
from care_train.reporting.plots import plot_comparison, plot_signature
from care_train.reporting.signature import Signature

_SUMMARY = (
    *("steps", "sampled_sequences", "trained_sequences", "decoded_tokens"),
    *("accuracy_before", "accuracy_after", "greedy_before", "greedy_after"),
    *("format_before", "format_after", "wall_seconds"),
)
_MEANS = (
    *("reflection_success", "num_negatives", "anchor_raw_advantage", "negative_raw_advantage"),
    *("clipped_low", "clipped_high", "groups_all_wrong", "groups_rescued"),
)
"""Of the training's metrics, means over its steps."""
_ENDS = ("accuracy", "reward", "kl", "think_length", "response_length")
"""Means over its last third, of rollouts: far more responses than the held-out questions."""
_CURVES = ("reward", "accuracy", "format", "kl", "think_length")
_EVERY = 5
"""Steps to a point of a curve."""

Row = Mapping[str, Any]


def write_results(folder: Path, name: str, runs: Sequence[Done]) -> None:
    """Write `NAME.csv`, a row per run, and `NAME_curves.csv`, a row per five steps of each."""
    folder.mkdir(parents=True, exist_ok=True)
    is_signature = EXPERIMENTS[name].measures == SIGNATURE
    rows, curves = [], []
    for done in runs:
        records = read_metrics(done.folder / "metrics.jsonl")
        steps = [record for record in records if record["phase"] == "train"]
        rows.append(_row(done, steps) | (_signature_columns(done) if is_signature else {}))
        curves += _curve(done, steps)
    _write(folder / f"{name}.csv", rows)
    _write(folder / f"{name}_curves.csv", curves)
    if is_signature and (found := _signature(runs)) is not None:
        plot_signature(found, _picture(folder, name))


def _signature(runs: Sequence[Done]) -> Signature | None:
    """Figure 2 over all groups of the runs."""
    groups = [read_archive(done.folder, columns=SIGNATURE_COLUMNS) for done in runs]
    return k_signature(pa.concat_tables(groups))


def _signature_columns(done: Done) -> dict[str, float | str]:
    if (found := _signature([done])) is None:
        return dict.fromkeys(SIGNATURE, "")
    fits = {"anchor": (found.anchor, found.anchor_groups)}
    fits["negative"] = (found.negative, found.negative_groups)
    columns: dict[str, float] = {"alpha_r": found.alpha_r}
    for name, (means, groups) in fits.items():
        columns |= {f"{name}_slope": means.slope, f"{name}_r2": means.r_squared}
        columns[f"{name}_groups_r2"] = groups.r_squared
    return {key: round(value, 5) for key, value in columns.items()}


def _row(done: Done, steps: Sequence[Row]) -> dict[str, Any]:
    row: dict[str, Any] = {"variant": done.run.variant, "seed": done.run.seed}
    row |= {key: done.summary.get(key, "") for key in _SUMMARY}
    row |= {key: _mean(steps, key) for key in _MEANS}
    row |= {key: _mean(steps[-max(len(steps) // 3, 1) :], key) for key in _ENDS}
    config = configuration_hash(load_config(done.folder / "config.yaml"))
    versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers")}
    return row | {"config": config, "commit": _commit(), **versions, "command": done.command}


def _curve(done: Done, steps: Sequence[Row]) -> list[dict[str, Any]]:
    points, tokens = [], 0.0
    for start in range(0, len(steps), _EVERY):
        part = steps[start : start + _EVERY]
        tokens += sum(record["decoded_tokens"] for record in part)
        point = {"variant": done.run.variant, "seed": done.run.seed, "step": part[-1]["step"]}
        points.append(
            point | {"decoded_tokens": round(tokens)} | {k: _mean(part, k) for k in _CURVES}
        )
    return points


def _mean(records: Sequence[Row], key: str) -> float | str:
    values = [record[key] for record in records if record.get(key) is not None]
    return round(fmean(values), 5) if values else ""


def _commit() -> str:
    done = subprocess.run(
        ("git", "describe", "--always", "--dirty"), capture_output=True, text=True
    )
    return done.stdout.strip()


def _write(path: Path, rows: Sequence[Row]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def read_results(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV file."""
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def summarize(
    rows: Sequence[Row], measures: Sequence[str], against: str = ""
) -> dict[str, dict[str, Any]]:
    """By variant: how many seeds, and mean and half width of the 95 % interval of each measure.

    Beside them the difference to the variant `against`, or the first, paired by seed, as
    `MEASURE_gain`. Intervals are Student's t, which few seeds need.
    """
    by_variant: dict[str, dict[int, Row]] = {}
    for row in rows:
        by_variant.setdefault(row["variant"], {})[int(row["seed"])] = row
    reference = by_variant.get(against) or next(iter(by_variant.values()))
    found: dict[str, dict[str, Any]] = {}
    for variant, seeds in by_variant.items():
        found[variant] = {"seeds": len(seeds)}
        for measure in measures:
            values, base = _values(seeds, measure), _values(reference, measure)
            if not values:
                continue
            found[variant][measure] = _interval(list(values.values()))
            gains = [value - base[seed] for seed, value in values.items() if seed in base]
            if gains and seeds is not reference:
                found[variant][f"{measure}_gain"] = _interval(gains)
    return found


def _interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean, and half width of its 95 % interval; NaN for one value."""
    count = len(values)
    if count == 1:
        return values[0], math.nan
    quantile = float(scipy.stats.t.ppf(0.975, count - 1))
    return fmean(values), quantile * stdev(values) / math.sqrt(count)


def _values(seeds: Mapping[int, Row], measure: str) -> dict[int, float]:
    """By seed, where it was measured."""
    return {seed: float(row[measure]) for seed, row in seeds.items() if row[measure] != ""}


def print_table(experiment: Experiment, rows: Sequence[Row]) -> dict[str, dict[str, Any]]:
    """Print `summarize`, and return it."""
    found = summarize(rows, experiment.measures, experiment.against)
    title = f"{experiment.title}: mean and 95 % interval over seeds; below it the gain"
    table = Table("variant", "seeds", *experiment.measures, title=title)
    for variant, values in found.items():
        cells = [
            "\n".join(_cell(values[key]) for key in (measure, f"{measure}_gain") if key in values)
            for measure in experiment.measures
        ]
        table.add_row(variant, str(values["seeds"]), *cells)
    Console(width=140).print(table)
    return found


def _cell(value: tuple[float, float]) -> str:
    mean, half_width = value
    return f"{mean:.4f}" + ("" if math.isnan(half_width) else f" ± {half_width:.4f}")


def draw(folder: Path, name: str) -> Path:
    """Draw `NAME.png` from `NAME_curves.csv`: accuracy, or in fig3 the reward, against the step.

    Figure 2's is made with its CSV, from the groups of its runs.
    """
    path = _picture(folder, name)
    if EXPERIMENTS[name].measures == SIGNATURE:
        return path
    curves: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for point in read_results(folder / f"{name}_curves.csv"):
        numbers = {k: float(v) for k, v in point.items() if k != "variant" and v != ""}
        record = numbers | {"phase": "train", "step": int(point["step"])}
        curves.setdefault(point["variant"], {}).setdefault(point["seed"], []).append(record)
    shared = {variant: list(seeds.values()) for variant, seeds in curves.items()}
    plot_comparison(shared, path, "reward" if name == "fig3" else "accuracy")
    return path


def _picture(folder: Path, name: str) -> Path:
    return folder / f"{name}.png"
