"""What the page says of runs, as plain data: facts, scores, charts, settings, the K' signature."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import care_train
from care_train.config import Role, dotted, role_of
from care_train.config.yaml_file import read_yaml
from care_train.reporting.archive import ARCHIVE, archive_files, read_archive
from care_train.reporting.charts import charts
from care_train.reporting.files import read_json
from care_train.reporting.metrics import METRICS_FILE, read_metrics
from care_train.reporting.report import fact_rows, group_rows, score_rows
from care_train.reporting.signature import (
    PAPER_ALPHA_R,
    PAPER_R_SQUARED,
    SIGNATURE_COLUMNS,
    Fit,
    Signature,
    k_signature,
)

Json = dict[str, Any]

_TILES = ("Accuracy, sampled", "Accuracy, greedy", "Well-formed, sampled")
_FACT_TILES = ("Steps", "Responses sampled", "Responses trained on", "Wall time")
_ASKED = ("eval.data", "eval.max_samples", "prompt.system", "prompt.suffix", "prompt.tags")
_OF_A_SEED = ("seed", "name")
_SIGNATURE_TEXT = (
    "Inside a subgroup of one anchor and K' negatives the z-score makes the anchor's advantage "
    "grow as \u221aK' and each negative's shrink as 1/\u221aK', both times an attenuation \u03b1 "
    "that the spread of the negatives' rewards sets. Points: means over the groups of one K', with "
    "95 % intervals; lines: least-squares fits of the means."
)


@dataclass(frozen=True)
class Run:
    """A run's folder, as far as the page shows it."""

    folder: Path
    name: str
    settings: Mapping[str, Any]
    """Its configuration, by dotted key; empty where it has none."""
    config_yaml: str
    summary: Mapping[str, Any]
    """Facts and scores; empty before the run has ended."""
    records: Sequence[Mapping[str, Any]]

    @property
    def tags(self) -> tuple[str, str]:
        """Names of the rationale's and the answer's tags."""
        think, answer = self.settings.get("prompt.tags") or ("think", "answer")
        return think, "answer" if answer == "boxed" else answer


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """`read_run` of each; folders of one name, as of two experiments, are told apart by their
    parents'."""
    runs = [read_run(folder) for folder in folders]
    paths, depth = {run.folder.parts for run in runs}, 1
    while len({parts[-depth:] for parts in paths}) < len(paths):
        depth += 1
    return [replace(run, name="/".join(run.folder.parts[-depth:])) for run in runs]


def read_run(folder: Path) -> Run:
    """What is there of a run, which may still be going on; a lone evaluation has no metrics.

    Raises:
        ValueError: `folder` holds no run's metrics or archive, or a file of it is damaged.
    """
    metrics = folder / METRICS_FILE
    if not (metrics.is_file() or (folder / ARCHIVE).is_dir()):
        raise ValueError(f"{folder}: got no {METRICS_FILE}, wanted the folder of a run")
    config, summary = folder / "config.yaml", folder / "summary.json"
    settings = read_yaml(config, lambda name: False) if config.is_file() else {}
    return Run(
        folder=folder.resolve(),
        name=folder.resolve().name,
        settings=dotted(settings),
        config_yaml=config.read_text(encoding="utf-8") if settings else "",
        summary=read_json(summary) if summary.is_file() else {},
        records=read_metrics(metrics) if metrics.is_file() else [],
    )


def conditions(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """`runs` that differ in their seed alone, each one curve with a band, by the curve's label."""
    found: dict[str, list[Run]] = {}
    for run in runs:
        found.setdefault(repr(_deciding(run)), []).append(run)
    labels = [_label(group) for group in found.values()]
    # Two labels alike would be one curve to a reader.
    return {
        label if labels.count(label) == 1 else f"{label} [{group[0].name}]": group
        for label, group in zip(labels, found.values(), strict=True)
    }


def differences(runs: Sequence[Run]) -> dict[str, list[Any]]:
    """The settings that are not the same in all `runs`: a value per run, None where unset."""
    keys = {key: None for run in runs for key in run.settings}
    values = {key: [run.settings.get(key) for run in runs] for key in keys}
    return {key: each for key, each in values.items() if any(one != each[0] for one in each)}


def _label(runs: Sequence[Run]) -> str:
    if len(runs) == 1:
        return runs[0].name
    name = re.sub(r"[-_. ]*(seed)?[-_. ]*\d+$", "", runs[0].name)
    steps = {max((one["step"] for one in run.records), default=0) for run in runs}
    # Their curve ends where the first of them does.
    end = f" to step {min(steps)}" if len(steps) > 1 else ""
    return f"{name or runs[0].settings.get('algorithm', 'runs')}, {len(runs)} seeds{end}"


def _deciding(run: Run) -> list[tuple[str, Any]]:
    """The settings that decide what the run computes, without those of a seed."""
    if not run.settings:
        return [("folder", str(run.folder))]
    return [
        (key, value)
        for key, value in sorted(run.settings.items())
        if key not in _OF_A_SEED and _decides(key)
    ]


def _decides(key: str) -> bool:
    try:
        return role_of(key) is not Role.FREE
    except ValueError:  # A setting of another version, or an entry of one that is a mapping.
        return True


def page_contents(runs: Sequence[Run]) -> Json:
    """All of the page but its groups and answers."""
    compared = conditions(runs)
    return {
        "made": f"care-train {care_train.__version__}, {datetime.now(UTC):%d %B %Y %H:%M} UTC",
        "conditions": list(compared),
        "tiles": _tiles(runs[0]) if len(runs) == 1 else [],
        "tables": [table for table in _tables(runs) if table["rows"]],
        "charts": charts([[run.records for run in own] for own in compared.values()]),
        "signature": _signature_contents(compared),
        "differences": _differences(runs) if len(runs) > 1 else None,
        "runs": [_run(run) for run in runs],
    }


def _tiles(run: Run) -> list[tuple[str, ...]]:
    """The run's outcome at a glance: label, value, what it was before."""
    scores = {label: values for label, *values in score_rows(run.summary)}
    facts = dict(fact_rows(run.summary))
    found: list[tuple[str, ...]] = []
    for label in _TILES:
        if label in scores:
            *before, after = (value.partition(" ")[0] for value in scores[label])
            found.append((label, after, *(f"before: {value}" for value in before)))
    return found + [(label, facts[label]) for label in _FACT_TILES if label in facts]


def _tables(runs: Sequence[Run]) -> list[Json]:
    asked = [
        [
            run.summary["num_questions"],
            *(v for k, v in run.settings.items() if k.startswith(_ASKED)),
        ]
        for run in runs
        if run.summary.get("num_questions")
    ]
    note = "Brackets: 95 % Wilson interval over the questions of the evaluation." if asked else ""
    if any(one != asked[0] for one in asked):
        note += " Not all runs were asked the same questions with the same prompt (Settings)."
    scores = _table("Scores", runs, [score_rows(run.summary) for run in runs], " → ")
    return [
        scores | {"note": note},
        _table("How the groups were used", runs, [group_rows(run.records) for run in runs], ", "),
        _table("Facts", runs, [fact_rows(run.summary) for run in runs], ""),
    ]


def _table(
    title: str, runs: Sequence[Run], columns: Sequence[Sequence[Sequence[str]]], separator: str
) -> Json:
    """A column per run, a line per label that any of them has."""
    values = [
        {label: separator.join(filter(None, cells)) for label, *cells in rows} for rows in columns
    ]
    labels = dict.fromkeys(label for column in values for label in column)
    rows = [[label, *(column.get(label, "") for column in values)] for label in labels]
    return {"title": title, "header": ["", *(run.name for run in runs)], "rows": rows}


def _differences(runs: Sequence[Run]) -> Json:
    found = differences(runs)
    return {
        "header": ["", *(run.name for run in runs)],
        "rows": [[key, *map(str, values)] for key, values in found.items() if key != "name"],
    }


def _run(run: Run) -> Json:
    versions = run.summary.get("versions", {})
    command = [("Command", str(run.summary["command"]))] if "command" in run.summary else []
    return {
        "name": run.name,
        "config": run.config_yaml,
        "facts": [*command, *((name, str(version)) for name, version in versions.items())],
        "cue": run.settings.get("care.reflection.cue")
        if "care" in run.settings.get("algorithm", "")
        else None,
    }


def _signature_contents(conditions: Mapping[str, Sequence[Run]]) -> Json | None:
    """Charts, text and table; None where no condition has anchored groups of two different K'."""
    signatures = [_signature(runs) for runs in conditions.values()]
    found = {place: one for place, one in enumerate(signatures) if one is not None}
    if not found:
        return None
    labels = list(conditions)
    negatives = "Negatives: minus mean A_raw"
    return {
        "text": _SIGNATURE_TEXT,
        "charts": [
            _means(found, "Anchor: mean A_raw", "\u221aK'", math.sqrt, "anchor"),
            _means(found, negatives, "1/\u221aK'", lambda count: count**-0.5, "negative"),
            _alphas(found),
        ],
        "table": {
            "header": ["", *(labels[place] for place in found), "paper"],
            "rows": _rows(list(found.values())),
        },
    }


def _signature(runs: Sequence[Run]) -> Signature | None:
    import pyarrow as pa

    tables = [
        read_archive(run.folder, columns=SIGNATURE_COLUMNS)
        for run in runs
        if archive_files(run.folder, "step")
    ]
    return k_signature(pa.concat_tables(tables)) if tables else None


def _means(found: Mapping[int, Signature], title: str, x_label: str, x_of: Any, role: str) -> Json:
    """Bucket means with their intervals, and the line fitted to them."""
    counts = {bucket.num_negatives for one in found.values() for bucket in one.buckets}
    x = sorted(map(x_of, counts))
    series = []
    for place, signature in found.items():
        bars = {
            x_of(one.num_negatives): (getattr(one, role), getattr(one, f"{role}_half_width"))
            for one in signature.buckets
        }
        known = [bars.get(v) for v in x]
        own = {"condition": place, "metric": 0}
        points = {
            "y": [one and one[0] for one in known],
            "low": [one and one[0] - one[1] for one in known],
            "high": [one and one[0] + one[1] for one in known],
        }
        series.append(own | {"label": "mean", "kind": "points"} | points)
        fit: Fit = getattr(signature, role)
        line = [fit.intercept + fit.slope * v for v in x]
        series.append(own | {"label": "fit", "kind": "line", "y": line})
    return _chart(title, x_label, x, series)


def _alphas(found: Mapping[int, Signature]) -> Json:
    """The theory's check: each group's A_raw[y+] / sqrt(K') against alpha-hat, and the diagonal."""
    points = sorted(
        # Groups with the same rewards are the same point.
        {
            (round(alpha, 4), place, round(scaled, 4))
            for place, signature in found.items()
            for alpha, scaled in zip(signature.alpha, signature.scaled_anchor, strict=True)
        }
    )
    x = [alpha for alpha, _, _ in points]
    series: list[Json] = [
        {
            "condition": place,
            "metric": 0,
            "label": "groups",
            "kind": "points",
            "y": [scaled if own == place else None for _, own, scaled in points],
        }
        for place in found
    ]
    diagonal = {"condition": next(iter(found)), "metric": 1, "label": "equal", "kind": "line"}
    return _chart("Anchor: A_raw / \u221aK'", "\u03b1\u0302", x, [*series, diagonal | {"y": x}])


def _chart(title: str, x_label: str, x: Sequence[float], series: Sequence[Json]) -> Json:
    shown = {"title": title, "unit": "", "note": "", "stacked": False}
    return shown | {"xLabel": x_label, "x": x, "series": series}


def _rows(signatures: Sequence[Signature]) -> list[list[str]]:
    """What is fitted, for each condition, and what the paper has."""

    def row(label: str, value: Any, paper: float | None = None) -> list[str]:
        cells = [_number(value(signature)) for signature in signatures]
        return [label, *cells, "" if paper is None else _number(paper)]

    anchor, negative = PAPER_R_SQUARED
    return [
        row("Groups counted", lambda one: sum(bucket.num_groups for bucket in one.buckets)),
        row("Anchor: slope against \u221aK'", lambda one: one.anchor.slope),
        row("Anchor: R\u00b2 of the means", lambda one: one.anchor.r_squared),
        row("Anchor: R\u00b2 over all groups", lambda one: one.anchor_groups.r_squared, anchor),
        row("Negatives: slope against 1/\u221aK'", lambda one: one.negative.slope),
        row("Negatives: R\u00b2 of the means", lambda one: one.negative.r_squared),
        row(
            "Negatives: R\u00b2 over all groups",
            lambda one: one.negative_groups.r_squared,
            negative,
        ),
        row("\u03b1\u0302 check: Pearson r", lambda one: one.alpha_r, PAPER_ALPHA_R),
    ]


def _number(value: float) -> str:
    if isinstance(value, int):
        return f"{value:,}"
    return "undefined: all are equal" if math.isnan(value) else f"{value:.3f}"
