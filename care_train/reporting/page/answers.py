"""The answers of a run's evaluations for the page: a line per question and decoding in the index,
the answers of all evaluations to it in a block."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from care_train.reporting.archive import ARCHIVE, IMAGES, ArchiveFile
from care_train.reporting.archive_schema import group_schema
from care_train.reporting.page.archived import Packed, files_by_step, read_rows, spaced
from care_train.reporting.page.document import pack
from care_train.reporting.page.groups import group_block, index_line
from care_train.reporting.page.runs import Run

Json = dict[str, Any]
Row = Mapping[str, Any]

_MAX_QUESTIONS = 1000
_PER_BLOCK = 50


class ArchivedAnswers:
    """A run's evaluated answers, packed again when there is another evaluation."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._chosen: list[list[ArchiveFile]] = []
        self._packed: dict[str, Packed] = {}
        self._note = ""

    def read(self, run: Run, max_bytes: int) -> tuple[dict[str, Packed], str]:
        """The packed questions in order, by block; and what is left out, in words.

        Args:
            run: for its tags.
            max_bytes: of the archive's files; evenly spaced evaluations are left out beyond.
        """
        steps = files_by_step(self._folder, "eval")
        chosen = spaced(steps, max_bytes)
        if chosen != self._chosen:
            shown, total = self._pack(chosen, run.tags)
            self._chosen = chosen
            counts = ((len(chosen), len(steps), "evaluations"), (shown, total, "questions"))
            self._note = ", ".join(f"{a} of {b} {what}" for a, b, what in counts if a < b)
        return self._packed, self._note

    def _pack(
        self, evaluations: Sequence[Sequence[ArchiveFile]], tags: tuple[str, str]
    ) -> tuple[int, int]:
        """How many questions are packed, and how many there are."""
        answers: dict[str, dict[str, list[Json]]] = {}
        for file in (file for files in evaluations for file in files):
            for row in read_rows(file):
                title = _title(row["step"]) if len(evaluations) > 1 else "Answer"
                by_decoding = answers.setdefault(row["row_id"], {})
                by_decoding.setdefault(row["decoding"], []).append(row | {"role": title})
        every = max(1, -(-len(answers) // _MAX_QUESTIONS))
        shown = list(answers.values())[::every]
        self._packed = {
            f"answers-{place}": _packed(
                shown[place : place + _PER_BLOCK], self._folder / ARCHIVE / IMAGES, tags
            )
            for place in range(0, len(shown), _PER_BLOCK)
        }
        return len(shown), len(answers)


def _packed(
    questions: Sequence[Mapping[str, list[Json]]], images: Path, tags: tuple[str, str]
) -> Packed:
    rows = [_as_group(answers) for each in questions for answers in each.values()]
    block = group_block(rows, images, None, tags)
    for group, row in zip(block["groups"], rows, strict=True):
        group["decoding"] = row["decoding"]
    return [_line(row) for row in rows], pack(block)


def _as_group(answers: Sequence[Json]) -> Json:
    """The answers of all evaluations to a question, as a group's row of the archive."""
    nothing = dict.fromkeys(group_schema().field("rollouts").type.value_type.names)
    return answers[-1] | {
        "outcome": _outcome(answers[0]["accuracy"], answers[-1]["accuracy"], len(answers)),
        "reason": "",
        "num_correct": sum(answer["accuracy"] == 1 for answer in answers),
        "reflection": "none",
        "rollouts": [nothing | answer for answer in answers],
    }


def _line(row: Row) -> Json:
    last = row["rollouts"][-1]
    return index_line(row) | {
        "decoding": row["decoding"],
        "roles": [],
        "reward": last["reward"],
        "verdict": f"{last['verdict']}\n{last['format_verdict']}",
    }


def _outcome(first: float, last: float, evaluations: int) -> str:
    before, after = (
        "right" if accuracy == 1 else "wrong" if accuracy == 0 else "partly right"
        for accuracy in (first, last)
    )
    if evaluations == 1:
        return after
    return f"stayed {after}" if before == after else f"became {after}"


def _title(step: int) -> str:
    return f"After {step} steps" if step else "Before training"
