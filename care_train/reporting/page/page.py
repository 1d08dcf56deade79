"""A page of runs: its blocks of data, each packed once, and the file that carries them."""

from collections.abc import Sequence
from pathlib import Path

from care_train.reporting.files import write_file
from care_train.reporting.page.contents import page_contents
from care_train.reporting.page.document import pack, render
from care_train.reporting.page.runs import Run, read_run

_MAX_TITLE = 60


class Page:
    """The page of some runs, built from what their folders hold now."""

    def __init__(self, folders: Sequence[Path]) -> None:
        """Read the runs.

        Raises:
            ValueError: a folder is not a run's.
        """
        runs = [read_run(folder) for folder in folders]
        self.title = _title(runs)
        contents = page_contents(runs)
        contents |= {"numGroups": 0, "noGroups": "No archive."}
        self.blocks = {"page": pack(contents)}

    def html(self) -> str:
        """The page with all of its data."""
        return render(self.title, self.blocks)


def write_page(folders: Sequence[Path], path: Path) -> None:
    """Write the page of some runs as one file.

    Args:
        folders: the runs'.
        path: the HTML file.

    Raises:
        ValueError: a folder is not a run's.
    """
    write_file(path, Page(folders).html())


def _title(runs: Sequence[Run]) -> str:
    title = ", ".join(run.name for run in runs)
    return title if len(title) <= _MAX_TITLE else f"{title[:_MAX_TITLE]}…"
