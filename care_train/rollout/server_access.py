"""Who may talk to a `care-train serve`: the token, where it is kept, and the checks of a request.

The token keeps everybody else out. The server writes it to a file that only its user can read, and
that user's runs find it there. The checks of Host and Origin keep browsers out even where a page
has come to know the token: a page that points its own name at this machine sends that name as Host,
and every request of a page that could change anything has an Origin, while runs send none.
"""

import hmac
import ipaddress
import json
import os
import re
import secrets
import socket
import stat
import tempfile
from collections.abc import Awaitable, Callable, Iterator, MutableMapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

TOKEN_VARIABLE = "CARE_TRAIN_SERVER_TOKEN"

_PREFIX = "care_"
_FORM = re.compile(_PREFIX + r"[A-Za-z0-9_-]{32,250}")

_HOST = re.compile(r"(?:\[(?P<address>[0-9A-Fa-f:.]+)\]|(?P<name>[A-Za-z0-9._-]+))(?::\d{1,5})?")
"""A Host header: an IPv6 address in brackets, or a name or IPv4 address; a port may follow."""

Scope = MutableMapping[str, Any]
App = Callable[[Scope, Any, Any], Awaitable[None]]


class Guard:
    """An ASGI application that refuses requests before a byte of their body is read, and passes
    the others on."""

    def __init__(self, app: App, token: str, host: str, allowed_hosts: Sequence[str] = ()) -> None:
        """Guard `app`, which listens at `host`: requests must bear the token, and call the server
        by an own name or one of `allowed_hosts`."""
        self._app = app
        self._token = f"Bearer {token}".encode()
        self._on_loopback = host == "localhost" or _is_loopback(host)
        machine = socket.gethostname()
        names = () if self._on_loopback else (machine, machine.partition(".")[0])
        names = ("localhost", host, *names, *allowed_hosts)
        self._names = {name.lower().rstrip(".") for name in names}

    async def __call__(self, scope: Scope, receive: Any, send: Any) -> None:
        """Answer one request, or let the application."""
        refusal = self._refusal(scope) if scope["type"] == "http" else None
        if refusal is None:
            await self._app(scope, receive, send)
            return
        status, problem = refusal
        # The rest of the request is not read.
        headers = [(b"content-type", b"application/json"), (b"connection", b"close")]
        if status == 401:
            headers.append((b"www-authenticate", b"Bearer"))
        await send({"type": "http.response.start", "status": status, "headers": headers})
        content = json.dumps({"error": problem}).encode()
        await send({"type": "http.response.body", "body": content})

    def _refusal(self, scope: Scope) -> tuple[int, str] | None:
        """Status and reason; None for a request to go on with."""

        def all_of(name: bytes) -> list[bytes]:
            return [value for key, value in scope["headers"] if key == name]

        hosts = [value.decode("latin-1") for value in all_of(b"host")]
        if len(hosts) != 1 or not self._is_own(hosts[0]):
            return 421, f"Host: got {hosts}, wanted one of {sorted(self._names)} or an own address"
        if all_of(b"origin"):
            return 403, "Origin: got one, wanted none: this server is not for web pages"
        tokens = all_of(b"authorization")
        if len(tokens) != 1 or not hmac.compare_digest(tokens[0], self._token):
            got = "another" if tokens else "none"
            return 401, f"Authorization: got {got}, wanted this server's token"
        if scope["method"] == "POST":
            kinds = all_of(b"content-type")
            if [kind.partition(b";")[0].strip().lower() for kind in kinds] != [b"application/json"]:
                return 415, f"Content-Type: got {kinds}, wanted application/json"
        return None

    def _is_own(self, host: str) -> bool:
        """Whether a Host header names this server.

        An address cannot be another site's name that points here. So any address will do where the
        server listens on more than this machine's own: a router or container may translate it.
        """
        match = _HOST.fullmatch(host)
        if match is None:
            return False
        name = (match["address"] or match["name"]).lower().rstrip(".")
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return name in self._names
        return _is_loopback(name) or not self._on_loopback


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


@dataclass(frozen=True)
class Token:
    """A token, and where it is from; the value never stands in a message or a log."""

    value: str | None
    """None where there is none."""
    source: str


@contextmanager
def server_token(url: str) -> Iterator[Token]:
    """The token that a server at `url` demands: the one given in `$CARE_TRAIN_SERVER_TOKEN`, or a
    new one, whose file exists within the block.

    Raises:
        ValueError: a given token has another form, or no folder takes the file.
    """
    if given := _given():
        yield given
        return
    token = _PREFIX + secrets.token_urlsafe(32)
    path = _write(_file_name(url), token)
    try:
        yield Token(token, str(path))
    finally:
        # Another server may have taken the port, and with it the name, in the meantime.
        if path.is_file() and path.read_text() == token:
            path.unlink()


def find_token(url: str) -> Token:
    """The token to send to a server; its value is None where this user has none for that URL.

    It is looked for in `$CARE_TRAIN_SERVER_TOKEN`, then in the file that a server of this user
    wrote for this very URL: no other host is sent its token.

    Raises:
        ValueError: a file cannot be read, belongs to someone else, or holds no token.
    """
    if given := _given():
        return given
    paths = [folder / _file_name(url) for folder in _folders()]
    for path in paths:
        if os.path.lexists(path):
            return Token(_read(path), str(path))
    return Token(None, f"no {' and no '.join(map(str, paths))}")


def _given() -> Token | None:
    value = os.environ.get(TOKEN_VARIABLE)
    if value is None:
        return None
    return Token(_checked(value, TOKEN_VARIABLE), f"${TOKEN_VARIABLE}")


def _checked(text: str, name: str) -> str:
    # The form keeps other secrets from being sent to a server that a configuration names.
    if not _FORM.fullmatch(text):
        raise ValueError(
            f"{name}: got {len(text)} characters that are no token, wanted `{_PREFIX}` and at "
            "least 32 letters, digits, - or _"
        )
    return text


def _read(path: Path) -> str:
    """A file's token; it must be a plain file that only this user can read."""
    try:
        flags = os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW
        with open(os.open(path, flags), encoding="ascii", errors="replace") as file:
            status = os.fstat(file.fileno())
            if status.st_uid != os.getuid() or status.st_mode & 0o077:
                raise ValueError(
                    f"token file: {path} belongs to user {status.st_uid} with mode "
                    f"{stat.S_IMODE(status.st_mode):o}, wanted a file that only user {os.getuid()} "
                    "can read: delete it and start the server again"
                )
            text = file.read(1024)
    except OSError as error:
        raise ValueError(f"token file: cannot read {path}: {error.strerror}") from None
    return _checked(text.strip(), f"token file: {path}")


def _write(name: str, token: str) -> Path:
    problems = []
    for folder in _folders():
        path, partial = folder / name, folder / f"{name}.{secrets.token_hex(8)}"
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            status = folder.lstat()
            if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid():
                problems.append(f"{folder}: not a folder of user {os.getuid()}")
                continue
            folder.chmod(0o700)
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
            with open(os.open(partial, flags, 0o600), "w") as file:
                file.write(token)
            return partial.replace(path)
        except OSError as error:
            problems.append(f"{folder}: {error.strerror}")
    raise ValueError(
        f"no folder takes the server's token ({'; '.join(problems)}): set {TOKEN_VARIABLE}"
    )


def _folders() -> list[Path]:
    """Where a server writes its token: the cache folder, or the temporary one as a last resort."""
    temporary = Path(tempfile.gettempdir()) / f"care-train-{os.getuid()}"
    # A user without a home folder has `~` as it is.
    cache = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"))
    return [cache / "care-train" / "servers", temporary] if cache.is_absolute() else [temporary]


def _file_name(url: str) -> str:
    """Host and port; for this machine's own addresses its name, as a home may be shared."""
    parts = urlsplit(url)
    host = (parts.hostname or "").rstrip(".")
    if host in ("localhost", "0.0.0.0", "::") or _is_loopback(host):
        host = socket.gethostname().lower()
    port = parts.port or (443 if parts.scheme == "https" else 80)
    return f"{re.sub(r'[^a-z0-9.-]', '_', host)}-{port}"
