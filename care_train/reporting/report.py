"""What a finished run leaves: report.md for people, summary.json for programs."""

import shlex
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from statistics import fmean
from typing import Any

from care_train.reporting.archive import archive_files, read_archive
from care_train.reporting.charts import proportion_interval
from care_train.reporting.files import write_file, write_json
from care_train.reporting.text import fenced, markdown_table, markdown_text, printable

Row = Mapping[str, Any]
Records = Sequence[Row]

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
_ANSWER_COLUMNS = ("row_id", "prompt", "answer", "decoding", "text", "accuracy")
_MAX_QUESTIONS = 12
_MAX_EXAMPLES = 3
_GROUPS = {
    "groups": "Groups sampled",
    "groups_all_correct": "All responses correct",
    "groups_all_wrong": "All responses wrong",
    "groups_rescued": "Trained through a rescue",
    "groups_skipped": "Skipped",
}


def write_report(run_dir: Path, summary: Row, metrics: Records) -> None:
    """Write report.md: what ran and what came of it, for those without the report page at hand.

    The folder's PNGs and its archive's answers are taken in; what is missing is left out.
    """
    groups = markdown_table(("", "Count", "Share"), group_rows(metrics))
    again = "## Run it again\n\nEvery setting is in `config.yaml`."
    page = "## Curves, time, settings, every group and every evaluated answer"
    page_command = f"care-train report {shlex.quote(str(Path(*run_dir.parts[-2:])))}"
    sections = [
        f"# {markdown_text(summary.get('name', run_dir.name))}",
        _headline(summary),
        markdown_table(("", ""), fact_rows(summary)),
        _scores(summary),
        _learnt(run_dir),
        _pictures(run_dir),
        groups and f"## How the groups were used\n\n{groups}",
        f"{again}\n\n{fenced(summary['command'], 'sh')}" if "command" in summary else "",
        f"{page}\n\n{fenced(page_command, 'sh')}",
    ]
    write_file(run_dir / "report.md", "\n\n".join(filter(None, sections)) + "\n")


def write_summary(run_dir: Path, summary: Row) -> None:
    """Write summary.json, NaN and infinities as null; a kill leaves the old file or the new one."""
    run_dir.mkdir(parents=True, exist_ok=True)
    write_json(run_dir / "summary.json", summary)


def _headline(summary: Row) -> str:
    if not _known(summary, "accuracy_before", "accuracy_after"):
        return ""
    before, after = summary["accuracy_before"], summary["accuracy_after"]
    verb = "rose" if after > before else "fell" if after < before else "stayed"
    change = f"from {before:.1%} to {after:.1%}" if after != before else f"at {after:.1%}"
    return f"Accuracy {verb} {change}."


def fact_rows(summary: Row) -> list[tuple[str, str]]:
    """What ran: label and value."""
    rows = [(label, _number(summary[key])) for key, label in _FACTS.items() if key in summary]
    if _known(summary, "wall_seconds"):
        rows.append(("Wall time", str(timedelta(seconds=round(summary["wall_seconds"])))))
    return rows


def score_rows(summary: Row) -> list[tuple[str, ...]]:
    """Label, then before and after where both are known, else the single evaluation's score."""
    total = summary.get("num_questions")
    rows = [
        (label, _share(summary[f"{key}_before"], total), _share(summary[f"{key}_after"], total))
        for key, label in SCORES.items()
        if _known(summary, f"{key}_before", f"{key}_after")
    ]
    single = SCORES | {f"{key}_accuracy": SCORES[key] for key in ("greedy", "blind")}
    return rows or [(single[k], _share(summary[k], total)) for k in single if _known(summary, k)]


def _scores(summary: Row) -> str:
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


def _learnt(run_dir: Path) -> str:
    """The answers of the archive's first and last evaluation; empty where it has not both."""
    steps = sorted({file.step for file in archive_files(run_dir, "eval")})
    if len(steps) < 2:
        return ""
    first, last = (
        read_archive(
            run_dir, evaluations=True, columns=_ANSWER_COLUMNS, steps=range(step, step + 1)
        ).to_pylist()
        for step in (steps[0], steps[-1])
    )
    return compared_answers(first, last)


def compared_answers(before: Records, after: Records) -> str:
    """Markdown of two evaluations' rows of the archive: accuracy by question where few are asked of
    many images, and answers that became right."""
    decoding = "greedy" if any(row["decoding"] == "greedy" for row in after) else "sampled"
    first = {row["row_id"]: row for row in before if row["decoding"] == decoding}
    pairs = [
        (first[row["row_id"]], row)
        for row in after
        if row["decoding"] == decoding and row["row_id"] in first
    ]
    questions = sorted({row["prompt"] for row, _ in pairs})
    parts = []
    if 0 < len(questions) <= _MAX_QUESTIONS:
        lines = []
        for question in questions:
            asked = [pair for pair in pairs if pair[0]["prompt"] == question]
            shares = [f"{fmean(pair[i]['accuracy'] for pair in asked):.1%}" for i in (0, 1)]
            lines.append((markdown_text(question), f"{len(asked):,}", *shares))
        parts.append(markdown_table(("Question", "Asked", "Before", "After"), lines))
    changed = [pair for pair in pairs if pair[0]["accuracy"] == 0 and pair[1]["accuracy"] == 1]
    parts += [_example(*pair) for pair in changed[:_MAX_EXAMPLES]]
    title = f"## What it learnt\n\nHeld-out questions, {decoding} answers."
    return "\n\n".join([title, *parts]) if parts else ""


def _example(before: Row, after: Row) -> str:
    lines = {
        "question": before["prompt"],
        "reference": before["answer"],
        "before": before["text"],
        "after": after["text"],
    }
    text = "\n".join(
        f"{name + ':':<11}{printable(str(value), max_chars=400, max_lines=6)}"
        for name, value in lines.items()
    )
    return f"{markdown_text(before['row_id'])}:\n\n{fenced(text, 'text')}"


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


def _number(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else str(value)


def _known(values: Row, *keys: str) -> bool:
    return all(values.get(key) is not None for key in keys)


def _total(metrics: Records, key: str) -> float:
    return sum(r[key] for r in metrics if r["phase"] == "train" and r.get(key) is not None)
