"""`care-train report`: a page of runs, as one HTML file with style, scripts and data that asks
nothing of a network, or, while the runs go on, served to this machine's browsers."""

import base64
import hashlib
import re
import secrets
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import cache
from html import escape
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from care_train.reporting.archive import ARCHIVE
from care_train.reporting.files import write_file
from care_train.reporting.metrics import METRICS_FILE
from care_train.reporting.page.contents import page_contents, read_runs
from care_train.reporting.page.groups import PackedArchive, pack

MAX_MIB = 64
"""How much of the archives' files a page carries unless asked otherwise."""
_MIB = 1 << 20
_MAX_TITLE = 60
_ASSETS = Path(__file__).parent / "assets"
_SCRIPTS = ("base.js", "charts.js", "group.js", "browser.js", "main.js")
"""In order of use: what a script imports stands before it."""
_LOOPBACK = "127.0.0.1"
_OWN_NAMES = (_LOOPBACK, "localhost")
_OF_MODULES = re.compile(r"^(import [^;]*;|export (?=(async )?(function|const|let|class) ))", re.M)


class Page:
    """The page of some runs; `refresh` takes in what a run that goes on has added."""

    def __init__(self, folders: Sequence[Path], max_mib: int = MAX_MIB) -> None:
        """Read the runs in `folders`; the page carries so much of their archives' files.

        Raises:
            ValueError: a folder is not a run's.
        """
        self._archives = [PackedArchive() for _ in folders]
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
        runs = read_runs(self._folders)
        contents: dict[str, Any] = page_contents(runs)
        blocks: dict[str, bytes] = {}
        for kind, read in (("groups", PackedArchive.groups), ("answers", PackedArchive.answers)):
            index: list[dict[str, Any]] = []
            notes = []
            for place, (run, archive) in enumerate(zip(runs, self._archives, strict=True)):
                packed, note = read(archive, run, self._max_bytes)
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

    It carries `max_mib` of the archives' groups, and as much of their answers; beyond, evenly
    spaced steps and evaluations are left out.

    Raises:
        ValueError: a folder is not a run's, or `path` is a folder.
    """
    if path.is_dir():
        raise ValueError(f"--out: got the folder {path}, wanted a file's name")
    html = Page(folders, max_mib).html()
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, html)


class LiveServer(ThreadingHTTPServer):
    """Serves one page on the loopback address, below a path that only its user was told.

    The path keeps this machine's other users out; the check of Host keeps out a web page that has
    its own name point here.
    """

    daemon_threads = True

    def __init__(self, folders: Sequence[Path], port: int = 0, max_mib: int = MAX_MIB) -> None:
        """Read the runs and listen, on a free port if it is 0; `serve_forever` answers.

        Raises:
            ValueError: a folder is not a run's, or the port is none or taken.
        """
        if not 0 <= port < 1 << 16:
            raise ValueError(f"--port: got {port}, wanted 0 to 65535")
        self._folders = folders
        # First, so that what is written while the page is read counts as news.
        self._version = self._state()
        self._page = Page(folders, max_mib)
        self._lock = threading.Lock()
        self._secret = secrets.token_urlsafe(16)
        try:
            super().__init__((_LOOPBACK, port), _Handler)
        except OSError as error:
            raise ValueError(f"--port: {port}: {error.strerror}; try another, or 0") from error

    @property
    def url(self) -> str:
        """Where the page is."""
        return f"http://{_LOOPBACK}:{self.server_port}/{self._secret}/"

    def answer(self, host: str, path: str) -> tuple[HTTPStatus, str, bytes]:
        """Status, type and content of what is at `path`, asked for with the header Host."""
        name, _, port = host.partition(":")
        if name.lower() not in _OWN_NAMES or port != str(self.server_port):
            return HTTPStatus.MISDIRECTED_REQUEST, "text/plain", b"this server has another name\n"
        secret, _, rest = path.removeprefix("/").partition("/")
        missing = HTTPStatus.NOT_FOUND, "text/plain", b"no such page\n"
        if not secrets.compare_digest(secret.encode(), self._secret.encode()):
            return missing
        if rest == "version":
            return HTTPStatus.OK, "text/plain", self._newest().encode()
        if rest == "":
            return HTTPStatus.OK, "text/html; charset=utf-8", self._page.html(live=True).encode()
        block = self._page.blocks.get(rest.removeprefix("block/"))
        return missing if block is None else (HTTPStatus.OK, "application/octet-stream", block)

    def _newest(self) -> str:
        """The runs' state, which the page then shows."""
        # A run that another one replaces has no files for a moment: the page stays as it is.
        with self._lock, suppress(OSError, ValueError):
            state = self._state()
            if state != self._version:
                self._page.refresh()
                self._version = state
        return self._version

    def _state(self) -> str:
        names = (METRICS_FILE, "summary.json", ARCHIVE)
        paths = [folder / name for folder in self._folders for name in names]
        found = [path.stat() if path.exists() else None for path in paths]
        return "-".join(f"{one.st_size}.{one.st_mtime_ns}" if one else "" for one in found)


class _Handler(BaseHTTPRequestHandler):
    server: LiveServer  # pyright: ignore[reportIncompatibleVariableOverride]
    # A client that sends nothing holds its thread no longer.
    timeout = 30

    def do_GET(self) -> None:
        hosts = self.headers.get_all("Host", [])
        host = hosts[0] if len(hosts) == 1 else ""
        status, kind, content = self.server.answer(host, urlsplit(self.path).path)
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Cache-Control", "no-store")
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("Cross-Origin-Resource-Policy", "same-origin")
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:
        """Requests are not news."""


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
