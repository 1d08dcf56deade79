"""The groups of a run's archive for the page: as many steps as it can carry, each packed once."""

from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from care_train.reporting.archive import ARCHIVE, IMAGES, ArchiveFile, archive_files
from care_train.reporting.page.document import pack
from care_train.reporting.page.groups import Decode, group_block, index_line
from care_train.reporting.page.runs import Run

Json = dict[str, Any]
Packed = tuple[list[Json], bytes]
"""A file's lines of the index, and its groups as a block of the page."""


class ArchivedGroups:
    """A run's groups, packed; what is packed is kept for the next look at a run that goes on."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._packed: dict[Path, Packed] = {}
        self._decode: Decode | None = None

    def read(self, run: Run, max_bytes: int) -> tuple[dict[str, Packed], str]:
        """The packed files in order, by name; and what is left out, in words.

        Args:
            run: for its tags and its tokenizer.
            max_bytes: of the archive's files; evenly spaced steps are left out beyond.
        """
        steps = files_by_step(self._folder, "step")
        chosen = spaced(steps, max_bytes)
        files = [file for step in chosen for file in step]
        if files and self._decode is None:
            self._decode = _decoder(run)
        packed = {file.path.stem: self._read(file, run) for file in files}
        found = {name: one for name, one in packed.items() if one is not None}
        is_whole = len(chosen) == len(steps)
        return found, "" if is_whole else f"{len(chosen)} of {len(steps)} steps"

    def _read(self, file: ArchiveFile, run: Run) -> Packed | None:
        if file.path not in self._packed:
            rows = read_rows(file)
            if not rows:
                return None
            images = self._folder / ARCHIVE / IMAGES
            block = pack(group_block(rows, images, self._decode, run.tags))
            self._packed[file.path] = [index_line(row) for row in rows], block
        return self._packed[file.path]


def files_by_step(folder: Path, kind: str) -> list[list[ArchiveFile]]:
    """The files of a run's steps or evaluations, a list each, in order.

    Args:
        folder: the run's.
        kind: step | eval.
    """
    files = (file for file in archive_files(folder) if file.kind == kind)
    return [list(own) for _, own in groupby(files, key=lambda file: file.step)]


def read_rows(file: ArchiveFile) -> list[Json]:
    """The rows of a file; none where a run that goes on dropped it, being over its limit."""
    import pyarrow.parquet as parquet

    try:
        return parquet.read_table(file.path).to_pylist()
    except FileNotFoundError:
        return []


def spaced(steps: Sequence[list[ArchiveFile]], max_bytes: int) -> list[list[ArchiveFile]]:
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
