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
    """One repository with one branch, `main`, and the tag `v1`."""

    files: dict[str, bytes] = field(default_factory=dict)
    is_gated: bool = False
    is_private: bool = False

    @property
    def commit(self) -> str:
        """The hash of the only commit."""
        return hashlib.sha1(repr(sorted(self.files.items())).encode()).hexdigest()

    def has(self, revision: str) -> bool:
        """Whether it is a name of the commit."""
        return revision in ("main", "v1", self.commit)


class Hub:
    """The repositories, and what was asked."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        """By `models/ORG/NAME` and `datasets/ORG/NAME`."""
        self.requests: list[str] = []
        self.token = "hf_secret"
        self.endpoint = ""

    def add(self, name: str, folder: Path, **options: bool) -> None:
        """Publish a folder's files."""
        self.repositories[name] = Repository(contents(folder), **options)


def contents(folder: Path) -> dict[str, bytes]:
    """A folder's files by their path in it."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@contextmanager
def running_hub() -> Iterator[Hub]:
    """A Hub that answers while the block runs."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (_Handler,), {"hub": hub}))
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self._noted()
        if found := re.fullmatch(r"/api/(models|datasets)/([^/]+/[^/]+)(?:/(.*))?", path):
            self._describe(f"{found[1]}/{found[2]}", found[3] or "revision/main")
        elif found := re.fullmatch(r"/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            self._send_file(f"{found[1] or 'models/'}{found[2]}", found[3], found[4])
        else:
            self._send({"error": f"unknown {path}"}, 404)

    def do_POST(self) -> None:
        path, body = self._noted(), self._body()
        if self.headers.get("Authorization") != f"Bearer {self.hub.token}":
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
        elif found := re.fullmatch(r"/api/models/(.+)/commit/main", path):
            self._commit(found[1], body)
        else:
            self._send({"warnings": [], "errors": []})  # /api/validate-yaml

    def _describe(self, name: str, what: str) -> None:
        action, _, rest = what.partition("/")
        repository = self._readable(name, rest.split("/")[0])
        if repository is None:
            return
        files = [
            {"type": "file", "path": path, "size": len(content), "oid": _oid(content)}
            for path, content in repository.files.items()
        ]
        if action == "tree":
            self._send(files)
            return
        siblings = [{"rfilename": one["path"]} for one in files]
        name = name.partition("/")[2]
        self._send({"id": name, "sha": repository.commit, "siblings": siblings, "private": False})

    def _readable(self, name: str, revision: str) -> Repository | None:
        repository = self.hub.repositories.get(name)
        has_token = self.headers.get("Authorization") == f"Bearer {self.hub.token}"
        if repository is None or (repository.is_private and not has_token):
            self._send({"error": "not found"}, 401, "RepoNotFound")
        elif repository.is_gated and not has_token:
            self._send({"error": "gated"}, 403, "GatedRepo")
        elif not repository.has(revision):
            self._send({"error": "revision"}, 404, "RevisionNotFound")
        else:
            return repository
        return None

    def _send_file(self, name: str, revision: str, path: str) -> None:
        repository = self._readable(name, revision)
        if repository is None:
            return
        if path not in repository.files:
            self._send({"error": "entry"}, 404, "EntryNotFound")
            return
        content = repository.files[path]
        headers = {"ETag": f'"{_oid(content)}"', "X-Repo-Commit": repository.commit}
        self._send_bytes(content, 200, headers)

    def _commit(self, name: str, body: bytes) -> None:
        files = self.hub.repositories[f"models/{name}"].files
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
        commit = self.hub.repositories[f"models/{name}"].commit
        url = f"{self.hub.endpoint}/{name}/commit/{commit}"
        self._send({"commitUrl": url, "commitOid": commit, "hookOutput": ""})

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

    def _send(self, value: object, status: int = 200, code: str = "") -> None:
        headers = {"X-Error-Code": code} if code else {}
        self._send_bytes(json.dumps(value).encode(), status, headers)

    def _send_bytes(self, content: bytes, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, text in headers.items():
            self.send_header(name, text)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


def _oid(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()
