"""The run's last word: report.md for people, summary.json for programs."""

import shlex
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

from care_train.reporting.files import write_file, write_json
from care_train.reporting.interval import proportion_interval
from care_train.reporting.learnt import learnt_section
from care_train.reporting.markdown import fenced, markdown_table, markdown_text

Records = Sequence[Mapping[str, Any]]

_FACTS = {
    "algorithm": "Algorithm",
    "preset": "Preset",
    "model": "Model",
    "seed": "Seed",
    "steps": "Steps",
    "ended_early": "Ended early, as",
    "num_questions": "Evaluation questions",
    "sampled_sequences": "Responses sampled",
    "trained_sequences": "Responses trained on",
    "decoded_tokens": "Tokens decoded",
}
SCORES = {
    "accuracy": "Accuracy, sampled",
    "greedy": "Accuracy, greedy",
    "blind": "Accuracy, sampled, blank images",
    "format": "Well-formed, sampled",
    "greedy_format": "Well-formed, greedy",
}
"""What summary.json's scores are called; each has a value before and after."""
_GROUPS = {
    "groups": "Groups sampled",
    "groups_all_correct": "All responses correct",
    "groups_all_wrong": "All responses wrong",
    "groups_rescued": "Trained through a rescue",
    "groups_skipped": "Skipped",
}


def write_report(run_dir: Path, summary: Mapping[str, Any], metrics: Records) -> None:
    """Write report.md: what ran and what came of it, for those without the report page at hand.

    Args:
        run_dir: the run's folder; its PNGs and its archive's answers are taken in.
        summary: the run's facts and scores; missing ones are left out.
        metrics: the run's records.
    """
    sections = [
        f"# {markdown_text(summary.get('name', run_dir.name))}",
        _headline(summary),
        markdown_table(("", ""), fact_rows(summary)),
        _scores(summary),
        learnt_section(run_dir),
        _pictures(run_dir),
        _group_use(metrics),
        _command(summary),
        _page(run_dir),
    ]
    write_file(run_dir / "report.md", "\n\n".join(filter(None, sections)) + "\n")


def write_summary(run_dir: Path, summary: Mapping[str, Any]) -> None:
    """Write summary.json; a kill leaves the old file or the new one, never half of one.

    Args:
        run_dir: the run's folder; created.
        summary: JSON values; NaN and infinities become null.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    write_json(run_dir / "summary.json", summary)


def _headline(summary: Mapping[str, Any]) -> str:
    if not _known(summary, "accuracy_before", "accuracy_after"):
        return ""
    before, after = summary["accuracy_before"], summary["accuracy_after"]
    verb = "rose" if after > before else "fell" if after < before else "stayed"
    change = f"from {before:.1%} to {after:.1%}" if after != before else f"at {after:.1%}"
    return f"Accuracy {verb} {change}."


def fact_rows(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What ran: label and value."""
    rows = [(label, _number(summary[key])) for key, label in _FACTS.items() if key in summary]
    if _known(summary, "wall_seconds"):
        rows.append(("Wall time", str(timedelta(seconds=round(summary["wall_seconds"])))))
    return rows


def score_rows(summary: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Label, then before and after where both are known, else the single evaluation's score."""
    total = summary.get("num_questions")
    rows = [
        (label, _share(summary[f"{key}_before"], total), _share(summary[f"{key}_after"], total))
        for key, label in SCORES.items()
        if _known(summary, f"{key}_before", f"{key}_after")
    ]
    single = SCORES | {f"{key}_accuracy": SCORES[key] for key in ("greedy", "blind")}
    return rows or [(single[k], _share(summary[k], total)) for k in single if _known(summary, k)]


def _scores(summary: Mapping[str, Any]) -> str:
    rows, total = score_rows(summary), summary.get("num_questions")
    if not rows:
        return ""
    header = ("", "Before", "After") if len(rows[0]) == 3 else ("", "Score")
    note = f"\n\nBrackets: 95% Wilson interval over {total:,} questions." if total else ""
    return f"## Scores\n\n{markdown_table(header, rows)}{note}"


def _share(value: float, total: int | None) -> str:
    if not total:
        return f"{value:.1%}"
    low, high = proportion_interval(value * total, total)
    return f"{value:.1%} [{100 * low:.1f}, {100 * high:.1f}]"


def _pictures(run_dir: Path) -> str:
    images = [
        f"![{path.stem.replace('_', ' ')}]({path.name})" for path in sorted(run_dir.glob("*.png"))
    ]
    return "\n\n".join(["## Curves", *images]) if images else ""


def group_rows(metrics: Records) -> list[tuple[str, str, str]]:
    """How a run's groups were used: label, count and share."""
    groups = _total(metrics, "groups")
    if not groups:
        return []
    rows = [
        (label, f"{_total(metrics, key):,.0f}", f"{_total(metrics, key) / groups:.1%}")
        for key, label in _GROUPS.items()
    ]
    reflections = _total(metrics, "reflections")
    if reflections:
        weighted = sum(
            record["reflection_success"] * record["reflections"]
            for record in metrics
            if _known(record, "reflection_success", "reflections")
        )
        rows.append(("Reflections", f"{reflections:,.0f}", ""))
        rows.append(
            ("Reflections that succeeded", f"{weighted:,.0f}", f"{weighted / reflections:.1%}")
        )
    return rows


def _group_use(metrics: Records) -> str:
    table = markdown_table(("", "Count", "Share"), group_rows(metrics))
    return f"## How the groups were used\n\n{table}" if table else ""


def _command(summary: Mapping[str, Any]) -> str:
    if "command" not in summary:
        return ""
    shown = fenced(str(summary["command"]), "sh")
    return f"## Run it again\n\nEvery setting is in `config.yaml`.\n\n{shown}"


def _page(run_dir: Path) -> str:
    """What makes the page of all that is not said here."""
    command = f"care-train report {shlex.quote(str(Path(*run_dir.parts[-2:])))}"
    shown = fenced(command, "sh")
    return f"## Curves, time, settings, every group and every evaluated answer\n\n{shown}"


def _number(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else str(value)


def _known(values: Mapping[str, Any], *keys: str) -> bool:
    return all(values.get(key) is not None for key in keys)


def _total(metrics: Records, key: str) -> float:
    return sum(r[key] for r in metrics if r["phase"] == "train" and r.get(key) is not None)
