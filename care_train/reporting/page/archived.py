"""A run's archive for the page: groups and evaluated answers, as much as it can carry, each packed
once."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from care_train.reporting.archive import ARCHIVE, IMAGES, ArchiveFile, archive_steps, read_files
from care_train.reporting.archive_schema import group_schema
from care_train.reporting.page.groups import Decode, group_block, index_line, pack
from care_train.reporting.page.runs import Run

Json = dict[str, Any]
Row = Mapping[str, Any]
Packed = tuple[list[Json], bytes]
"""A file's lines of the index, and its groups as a block of the page."""
_MAX_QUESTIONS = 1000
_PER_BLOCK = 50


class ArchivedGroups:
    """A run's groups, packed; what is packed is kept for the next look at a run that goes on."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._packed: dict[Path, Packed] = {}
        self._decode: Decode | None = None

    def read(self, run: Run, max_bytes: int) -> tuple[dict[str, Packed], str]:
        """The packed files by name, of steps evenly spaced to `max_bytes`; what is left out."""
        steps = archive_steps(self._folder, "step")
        chosen = _spaced(steps, max_bytes)
        files = [file for step in chosen for file in step]
        if files and self._decode is None:
            self._decode = _decoder(run)
        packed = {file.path.stem: self._read(file, run) for file in files}
        found = {name: one for name, one in packed.items() if one is not None}
        is_whole = len(chosen) == len(steps)
        return found, "" if is_whole else f"{len(chosen)} of {len(steps)} steps"

    def _read(self, file: ArchiveFile, run: Run) -> Packed | None:
        if file.path not in self._packed:
            rows = read_files([file]).to_pylist()
            if not rows:
                return None
            images = self._folder / ARCHIVE / IMAGES
            block = pack(group_block(rows, images, self._decode, run.tags))
            self._packed[file.path] = [index_line(row) for row in rows], block
        return self._packed[file.path]


class ArchivedAnswers:
    """A run's evaluated answers, packed again when there is another evaluation: a line of the index
    per question and decoding, the answers of all evaluations to it in a block."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._chosen: list[list[ArchiveFile]] = []
        self._packed: dict[str, Packed] = {}
        self._note = ""

    def read(self, run: Run, max_bytes: int) -> tuple[dict[str, Packed], str]:
        """The packed questions by block, of evaluations evenly spaced to `max_bytes`; what is left
        out."""
        steps = archive_steps(self._folder, "eval")
        chosen = _spaced(steps, max_bytes)
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
        for files in evaluations:
            for row in read_files(files, evaluations=True).to_pylist():
                title = f"After {row['step']} steps" if row["step"] else "Before training"
                title = title if len(evaluations) > 1 else "Answer"
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
    lines = [
        index_line(row)
        | {
            "decoding": row["decoding"],
            "roles": [],
            "reward": row["reward"],
            "verdict": f"{row['verdict']}\n{row['format_verdict']}",
        }
        for row in rows
    ]
    return lines, pack(block)


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


def _outcome(first: float, last: float, evaluations: int) -> str:
    before, after = (
        "right" if accuracy == 1 else "wrong" if accuracy == 0 else "partly right"
        for accuracy in (first, last)
    )
    if evaluations == 1:
        return after
    return f"stayed {after}" if before == after else f"became {after}"


def _spaced(steps: Sequence[list[ArchiveFile]], max_bytes: int) -> list[list[ArchiveFile]]:
    """The last step and evenly spaced ones before it, of about so many bytes at most."""
    total = sum(file.path.stat().st_size for step in steps for file in step)
    every = max(1, -(-total // max_bytes))
    return list(reversed(steps[::-1][::every]))


def _decoder(run: Run) -> Decode | None:
    """The tokenizer of the run's own folder or its model's; None where there is none to be had."""
    from transformers import AutoTokenizer

    from care_train.models.prompts import TokenText

    checkpoints = sorted(run.folder.glob("checkpoints/*/model"), reverse=True)
    places = [run.folder / "final", run.folder / "cold_start", run.folder / "base", *checkpoints]
    for place in [*places, Path(str(run.settings.get("model.path", "")))]:
        if not (place / "tokenizer.json").is_file():
            continue
        try:
            tokenizer = AutoTokenizer.from_pretrained(
                place, trust_remote_code=False, local_files_only=True
            )
            return TokenText(tokenizer).decode
        except (OSError, ValueError):
            continue
    return None
