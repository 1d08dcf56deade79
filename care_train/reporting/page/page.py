"""A page of runs: one HTML file with style, scripts and data, which asks nothing of a network."""

import base64
import hashlib
import re
from collections.abc import Mapping, Sequence
from functools import cache
from html import escape
from pathlib import Path
from typing import Any

from care_train.reporting.files import write_file
from care_train.reporting.page.archived import ArchivedAnswers, ArchivedGroups
from care_train.reporting.page.contents import page_contents
from care_train.reporting.page.groups import pack
from care_train.reporting.page.runs import read_run

MAX_MIB = 64
"""How much of the archives' files a page carries unless asked otherwise."""
_MIB = 1 << 20
_MAX_TITLE = 60
_ASSETS = Path(__file__).parent / "assets"
_SCRIPTS = ("base.js", "charts.js", "group.js", "browser.js", "main.js")
"""In order of use: what a script imports stands before it."""
_OF_MODULES = re.compile(r"^(import [^;]*;|export (?=(async )?(function|const|let|class) ))", re.M)


class Page:
    """The page of some runs; `refresh` takes in what a run that goes on has added."""

    def __init__(self, folders: Sequence[Path], max_mib: int = MAX_MIB) -> None:
        """Read the runs in `folders`; the page carries so much of their archives' files.

        Raises:
            ValueError: a folder is not a run's.
        """
        self._groups = [ArchivedGroups(folder) for folder in folders]
        self._answers = [ArchivedAnswers(folder) for folder in folders]
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
        for kind, found in (("groups", self._groups), ("answers", self._answers)):
            index: list[dict[str, Any]] = []
            notes = []
            for place, (run, archived) in enumerate(zip(runs, found, strict=True)):
                packed, note = archived.read(run, self._max_bytes)
                notes += [f"{run.name}: {note}, evenly spaced."] if note else []
                for name, (lines, block) in packed.items():
                    # A page that watches finds the same groups under a name after a refresh.
                    where = {"run": place, "block": f"{place}-{name}"}
                    blocks[where["block"]] = block
                    index += [{**line, **where, "at": at} for at, line in enumerate(lines)]
            contents[kind] = {"count": len(index), "note": " ".join(notes)}
            blocks[kind] = pack(index)
        title = ", ".join(run.name for run in runs)
        self.title = title if len(title) <= _MAX_TITLE else f"{title[:_MAX_TITLE]}…"
        self.blocks = {"page": pack(contents), **blocks}

    def html(self, *, live: bool = False) -> str:
        """The page with all of its data; or live, to fetch its blocks."""
        return _render(self.title, {} if live else self.blocks, live=live)


def write_page(folders: Sequence[Path], path: Path, max_mib: int = MAX_MIB) -> None:
    """Write the page of some runs as one HTML file.

    Args:
        folders: the runs'.
        path: the file.
        max_mib: how much of the archives' groups it carries, and how much of their answers; evenly
            spaced steps and evaluations are left out beyond.

    Raises:
        ValueError: a folder is not a run's.
    """
    html = Page(folders, max_mib).html()
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, html)


def _render(title: str, blocks: Mapping[str, bytes], *, live: bool) -> str:
    """The page's HTML with its blocks; a live page fetches them, and looks for newer ones."""
    style = _asset("uplot/uPlot.min.css") + _asset("style.css")
    library = _asset("uplot/uPlot.iife.min.js")
    # The modules as one: an inline module cannot import another one.
    script = "\n".join(_OF_MODULES.sub("", _asset(name)) for name in _SCRIPTS)
    policy = "; ".join(
        (
            "default-src 'none'",
            f"script-src {_hash(library)} {_hash(script)}",
            f"style-src {_hash(style)}",
            "img-src data:",
            "connect-src 'self'" if live else "connect-src 'none'",
            "base-uri 'none'",
            "form-action 'none'",
            "require-trusted-types-for 'script'",
            "trusted-types 'none'",
        )
    )
    data = "\n".join(
        f'<script type="application/gzip+base64" id="block-{escape(name)}">'
        f"{base64.b64encode(content).decode()}</script>"
        for name, content in blocks.items()
    )
    parts = {
        "title": escape(title),
        "policy": escape(policy),
        "live": "true" if live else "false",
        "style": style,
        "library": library,
        "script": script,
        "data": data,
    }
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], _asset("index.html"))


def _hash(content: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"


@cache
def _asset(name: str) -> str:
    return (_ASSETS / name).read_text(encoding="utf-8")
