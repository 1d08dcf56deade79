"""What a run learnt, by the answers of its first and last evaluation that its archive keeps."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from care_train.reporting.archive import archive_files
from care_train.reporting.archive_reader import read_archive
from care_train.reporting.markdown import fenced, markdown_table, markdown_text
from care_train.reporting.samples import printable

_MAX_QUESTIONS = 12
_MAX_EXAMPLES = 3
_COLUMNS = ("row_id", "prompt", "answer", "decoding", "text", "accuracy")

Row = Mapping[str, Any]


def learnt_section(run_dir: Path) -> str:
    """The report's section of answers before and after; empty where the archive has not both."""
    steps = sorted({file.step for file in archive_files(run_dir) if file.kind == "eval"})
    if len(steps) < 2:
        return ""
    first, last = (
        read_archive(
            run_dir, evaluations=True, columns=_COLUMNS, steps=range(step, step + 1)
        ).to_pylist()
        for step in (steps[0], steps[-1])
    )
    return compared_answers(first, last)


def compared_answers(before: Sequence[Row], after: Sequence[Row]) -> str:
    """Markdown: accuracy by question where few questions are asked of many images, and answers that
    became right.

    Args:
        before: rows of an evaluation: `row_id`, `prompt`, `answer`, `decoding`, `text`, `accuracy`.
        after: those of a later one of the same questions.
    """
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
