"""`care-train report --watch`: the page of runs that go on, served to this machine's browsers."""

import secrets
import threading
from collections.abc import Sequence
from contextlib import suppress
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

from care_train.reporting.archive import ARCHIVE
from care_train.reporting.metrics import METRICS_FILE
from care_train.reporting.page.page import MAX_MIB, Page

_LOOPBACK = "127.0.0.1"
_OWN_NAMES = (_LOOPBACK, "localhost")


class LiveServer(ThreadingHTTPServer):
    """Serves one page on the loopback address, below a path that only its user was told.

    The path keeps this machine's other users out; the check of Host keeps out a web page that has
    its own name point here.
    """

    daemon_threads = True

    def __init__(self, folders: Sequence[Path], port: int = 0, max_mib: int = MAX_MIB) -> None:
        """Read the runs and listen, on a free port if it is 0; `serve_forever` answers.

        Raises:
            ValueError: a folder is not a run's, or the port is taken.
        """
        self._folders = folders
        self._page = Page(folders, max_mib)
        self._lock = threading.Lock()
        self._version = self._state()
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
        with self._lock:
            state = self._state()
            # A run that another one replaces has no files for a moment: the page stays as it is.
            with suppress(OSError, ValueError):
                if state != self._version:
                    self._page.refresh()
                    self._version = state
        return self._version

    def _state(self) -> str:
        sizes = []
        for folder in self._folders:
            archive = folder / ARCHIVE
            for path in (folder / METRICS_FILE, folder / "summary.json", archive):
                found = path.stat() if path.exists() else None
                sizes.append("" if found is None else f"{found.st_size}.{found.st_mtime_ns}")
        return "-".join(sizes)


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
