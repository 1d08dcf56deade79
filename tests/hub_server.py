"""A Hugging Face Hub on this machine: what huggingface_hub asks to download and to upload."""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit


@dataclass
class Repository:
    """One repository with one commit, whose names are `main`, `v1` and its hash."""

    files: dict[str, bytes] = field(default_factory=dict)
    is_gated: bool = False
    is_private: bool = False

    @property
    def commit(self) -> str:
        """The commit's hash."""
        return _oid(repr(sorted(self.files.items())).encode())


class Hub:
    """The repositories, and what was asked."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        """By `models/ORG/NAME` and `datasets/ORG/NAME`."""
        self.requests: list[str] = []
        self.token = "hf_secret"
        self.endpoint = ""


def contents(folder: Path) -> dict[str, bytes]:
    """A folder's files by their path in it."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@contextmanager
def running_hub() -> Iterator[Hub]:
    """A Hub that answers while the block runs."""
    hub = Hub()
    with ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (_Handler,), {"hub": hub})) as server:
        hub.endpoint = f"http://127.0.0.1:{server.server_port}"
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield hub
        finally:
            server.shutdown()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self._noted()
        if found := re.fullmatch(r"/api/((?:models|datasets)/[^/]+/[^/]+)(?:/(.*))?", path):
            action, _, rest = (found[2] or "revision/main").partition("/")
            if repository := self._readable(found[1], rest.split("/")[0]):
                self._describe(found[1].partition("/")[2], repository, action)
        elif found := re.fullmatch(r"/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            if repository := self._readable(f"{found[1] or 'models/'}{found[2]}", found[3]):
                self._send_file(repository, found[4])
        else:
            self._send({"error": f"unknown {path}"}, 404)

    def do_POST(self) -> None:
        path, body = self._noted(), self._body()
        if not self._has_token():
            self._send({"error": "who are you?"}, 401)
        elif path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}"
            repository = Repository(is_private=asked.get("visibility") == "private")
            self.hub.repositories.setdefault(f"models/{name}", repository)
            self._send({"url": f"{self.hub.endpoint}/{name}"})
        elif path.endswith("/preupload/main"):
            files = [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                for file in json.loads(body)["files"]
            ]
            self._send({"files": files})
        elif found := re.fullmatch(r"/api/(models/.+)/commit/main", path):
            repository = self.hub.repositories[found[1]]
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    content = base64.b64decode(line["value"]["content"])
                    repository.files[line["value"]["path"]] = content
            url = f"{self.hub.endpoint}/{found[1]}/commit/{repository.commit}"
            self._send({"commitUrl": url, "commitOid": repository.commit, "hookOutput": ""})
        else:
            self._send({"warnings": [], "errors": []})  # /api/validate-yaml

    def _describe(self, name: str, repository: Repository, action: str) -> None:
        if action == "tree":
            files = repository.files.items()
            self._send(
                [
                    {"type": "file", "path": path, "size": len(content), "oid": _oid(content)}
                    for path, content in files
                ]
            )
            return
        siblings = [{"rfilename": path} for path in repository.files]
        about = {"id": name, "sha": repository.commit, "private": False}
        self._send(about | {"siblings": siblings})

    def _readable(self, name: str, revision: str) -> Repository | None:
        repository = self.hub.repositories.get(name)
        if repository is None:
            self._send({"error": "not found"}, 401, {"X-Error-Code": "RepoNotFound"})
        elif repository.is_gated and not self._has_token():
            self._send({"error": "gated"}, 403, {"X-Error-Code": "GatedRepo"})
        elif revision not in ("main", "v1", repository.commit):
            self._send({"error": "revision"}, 404, {"X-Error-Code": "RevisionNotFound"})
        else:
            return repository
        return None

    def _send_file(self, repository: Repository, path: str) -> None:
        content = repository.files.get(path)
        if content is None:
            self._send({"error": "entry"}, 404, {"X-Error-Code": "EntryNotFound"})
            return
        headers = {"ETag": f'"{_oid(content)}"', "X-Repo-Commit": repository.commit}
        self._send(content, 200, headers)

    def _has_token(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {self.hub.token}"

    def _noted(self) -> str:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append(f"{self.command} {path}")
        return path

    def _body(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _send(
        self, value: object, status: int = 200, headers: dict[str, str] | None = None
    ) -> None:
        """Bytes as they are, anything else as JSON."""
        content = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        for name, text in (headers or {}).items():
            self.send_header(name, text)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


def _oid(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()
