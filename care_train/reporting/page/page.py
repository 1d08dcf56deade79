"""A page of runs: its blocks of data, each packed once, and the file that carries them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from care_train.reporting.files import write_file
from care_train.reporting.page.answers import ArchivedAnswers
from care_train.reporting.page.archived import ArchivedGroups
from care_train.reporting.page.contents import page_contents
from care_train.reporting.page.document import pack, render
from care_train.reporting.page.runs import Run, read_run

MAX_MIB = 64
"""How much of the archives' files a page carries unless asked otherwise."""
_MIB = 1 << 20
_MAX_TITLE = 60


class Page:
    """The page of some runs; `refresh` takes in what a run that goes on has added."""

    def __init__(self, folders: Sequence[Path], max_mib: int = MAX_MIB) -> None:
        """Read the runs.

        Args:
            folders: the runs'.
            max_mib: how much of their archives' files the page carries.

        Raises:
            ValueError: a folder is not a run's.
        """
        self._groups = [(ArchivedGroups(folder), ArchivedAnswers(folder)) for folder in folders]
        self._folders = folders
        self._max_bytes = max_mib * _MIB // len(folders)
        self.title = ""
        self.blocks: dict[str, bytes] = {}
        self.refresh()

    def refresh(self) -> None:
        """Read the runs again.

        Raises:
            ValueError: as at first.
        """
        runs = [read_run(folder) for folder in self._folders]
        contents: dict[str, Any] = page_contents(runs)
        blocks: dict[str, bytes] = {}
        for kind, found in zip(("groups", "answers"), zip(*self._groups, strict=True), strict=True):
            index: list[dict[str, Any]] = []
            notes = []
            for place, (run, archived) in enumerate(zip(runs, found, strict=True)):
                packed, note = archived.read(run, self._max_bytes)
                notes += [f"{run.name}: {note}, evenly spaced."] if note else []
                for name, (lines, block) in packed.items():
                    # A page that looks on finds the same groups, or questions, under the name.
                    where = {"run": place, "block": f"{place}-{name}"}
                    blocks[where["block"]] = block
                    index += [{**line, **where, "at": at} for at, line in enumerate(lines)]
            contents[kind] = {"count": len(index), "note": " ".join(notes)}
            blocks[kind] = pack(index)
        self.title = _title(runs)
        self.blocks = {"page": pack(contents), **blocks}

    def html(self, *, live: bool = False) -> str:
        """The page with all of its data; or live, to fetch its blocks."""
        return render(self.title, {} if live else self.blocks, live=live)


def write_page(folders: Sequence[Path], path: Path, max_mib: int = MAX_MIB) -> None:
    """Write the page of some runs as one file.

    Args:
        folders: the runs'.
        path: the HTML file.
        max_mib: how much of the archives' groups it carries, and how much of their answers; evenly
            spaced steps and evaluations are left out beyond.

    Raises:
        ValueError: a folder is not a run's.
    """
    write_file(path, Page(folders, max_mib).html())


def _title(runs: Sequence[Run]) -> str:
    title = ", ".join(run.name for run in runs)
    return title if len(title) <= _MAX_TITLE else f"{title[:_MAX_TITLE]}…"
