"""A page of runs: its blocks of data, each packed once, and the file that carries them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from care_train.reporting.files import write_file
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
        self._groups = [ArchivedGroups(folder) for folder in folders]
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
        blocks: dict[str, bytes] = {}
        index: list[dict[str, Any]] = []
        notes = []
        for place, (run, groups) in enumerate(zip(runs, self._groups, strict=True)):
            packed, shown, total = groups.read(run, self._max_bytes)
            if shown < total:
                notes.append(f"{run.name}: {shown} of {total} steps, evenly spaced.")
            for file, (lines, block) in packed.items():
                # Named by what it holds: a page that looks on finds the same under the name.
                where = {"run": place, "block": f"{place}-{file}"}
                blocks[where["block"]] = block
                index += [{**line, **where, "at": at} for at, line in enumerate(lines)]
        contents = page_contents(runs)
        contents |= {"numGroups": len(index), "groupNote": " ".join(notes)}
        self.title = _title(runs)
        self.blocks = {"page": pack(contents), "index": pack(index), **blocks}

    def html(self, *, live: bool = False) -> str:
        """The page with all of its data; or live, to fetch its blocks."""
        return render(self.title, {} if live else self.blocks, live=live)


def write_page(folders: Sequence[Path], path: Path, max_mib: int = MAX_MIB) -> None:
    """Write the page of some runs as one file.

    Args:
        folders: the runs'.
        path: the HTML file.
        max_mib: how much of the runs' archives it carries; evenly spaced steps are left out beyond.

    Raises:
        ValueError: a folder is not a run's.
    """
    write_file(path, Page(folders, max_mib).html())


def _title(runs: Sequence[Run]) -> str:
    title = ", ".join(run.name for run in runs)
    return title if len(title) <= _MAX_TITLE else f"{title[:_MAX_TITLE]}…"
