"""What the page says of runs, as plain data: facts, scores, charts, settings."""

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import care_train
from care_train.reporting.page.charts import charts
from care_train.reporting.page.diagnostics import signature_contents
from care_train.reporting.page.runs import Run, conditions, differences
from care_train.reporting.report import fact_rows, group_rows, score_rows

Json = dict[str, Any]

_TILES = ("Accuracy, sampled", "Accuracy, greedy", "Well-formed, sampled")
_FACT_TILES = ("Steps", "Responses sampled", "Responses trained on", "Wall time")


def page_contents(runs: Sequence[Run]) -> Json:
    """All of the page but its groups.

    Args:
        runs: in the order to show them.
    """
    compared = conditions(runs)
    return {
        "made": f"care-train {care_train.__version__}, {datetime.now(UTC):%d %B %Y %H:%M} UTC",
        "conditions": [condition.label for condition in compared],
        "tiles": _tiles(runs[0]) if len(runs) == 1 else [],
        "tables": [table for table in _tables(runs) if table["rows"]],
        "charts": charts(compared),
        "signature": signature_contents(compared),
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
    names = ["", *(run.name for run in runs)]
    scores = [_joined(score_rows(run.summary), " → ") for run in runs]
    total = {run.summary.get("num_questions") for run in runs} - {None}
    note = "Brackets: 95 % Wilson interval over the questions of the evaluation." if total else ""
    use = [_joined(group_rows(run.records), ", ") for run in runs]
    facts = [_joined(fact_rows(run.summary), "") for run in runs]
    return [
        {"title": "Scores", "header": names, "rows": _side_by_side(scores), "note": note},
        {"title": "How the groups were used", "header": names, "rows": _side_by_side(use)},
        {"title": "Facts", "header": names, "rows": _side_by_side(facts)},
    ]


def _joined(rows: Sequence[Sequence[str]], separator: str) -> dict[str, str]:
    return {label: separator.join(filter(None, values)) for label, *values in rows}


def _side_by_side(columns: Sequence[Mapping[str, str]]) -> list[list[str]]:
    labels = dict.fromkeys(label for column in columns for label in column)
    return [[label, *(column.get(label, "") for column in columns)] for label in labels]


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
