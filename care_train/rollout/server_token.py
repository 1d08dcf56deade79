"""The token that a `care-train serve` demands: made at start, found by its user's runs.

It is looked for in this order: `$CARE_TRAIN_SERVER_TOKEN`, the file that
`rollout.vllm.server_token_file` names, and a file that the server itself writes, readable by its
user alone, in a folder that depends on the user and under a name that depends on the server's URL.
"""

import ipaddress
import os
import re
import secrets
import socket
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

VARIABLE = "CARE_TRAIN_SERVER_TOKEN"

_PREFIX = "care_"
_FORM = re.compile(_PREFIX + r"[A-Za-z0-9_-]{32,250}")
_WANTED = f"`{_PREFIX}` and at least 32 letters, digits, - or _"


@dataclass(frozen=True)
class Token:
    """A token, and where it is from: the value never stands in a message or a log."""

    value: str | None
    """None where there is none."""
    source: str


@contextmanager
def server_token(url: str, token_file: str | None) -> Iterator[Token]:
    """The token to demand: the one given, or a new one, whose file is there meanwhile.

    Args:
        url: the server's, as runs of this machine or user name it.
        token_file: `rollout.vllm.server_token_file`.

    Raises:
        ValueError: a given token cannot be read or is none, or no folder takes the file.
    """
    given = _given(token_file)
    if given is not None:
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


def find_token(url: str, token_file: str | None) -> Token:
    """The token to send to a server; its value is None where this user has none for that URL.

    Args:
        url: `rollout.vllm.server`. The file that a server wrote is used for its own URL alone: no
            other host is sent its token.
        token_file: `rollout.vllm.server_token_file`.

    Raises:
        ValueError: a file cannot be read, belongs to someone else, or holds no token.
    """
    given = _given(token_file)
    if given is not None:
        return given
    paths = [folder / _file_name(url) for folder in _folders()]
    for path in paths:
        if os.path.lexists(path):
            return Token(_read(path, "token file", is_ours=True), str(path))
    return Token(None, f"no {' and no '.join(map(str, paths))}")


def _given(token_file: str | None) -> Token | None:
    value = os.environ.get(VARIABLE)
    if value is not None:
        return Token(_checked(value, VARIABLE), f"${VARIABLE}")
    if token_file is not None:
        path, key = Path(token_file).expanduser(), "rollout.vllm.server_token_file"
        return Token(_read(path, key, is_ours=False), str(path))
    return None


def _checked(text: str, name: str) -> str:
    # The form keeps other secrets from being sent to a server that a configuration names.
    if not _FORM.fullmatch(text):
        raise ValueError(f"{name}: got {len(text)} characters that are no token, wanted {_WANTED}")
    return text


def _read(path: Path, key: str, *, is_ours: bool) -> str:
    """A file's token.

    Args:
        path: the file.
        key: what names it, for errors.
        is_ours: whether it must belong to this user, and to nobody else.
    """
    flags = os.O_RDONLY | os.O_NONBLOCK | (os.O_NOFOLLOW if is_ours else 0)
    try:
        with open(os.open(path, flags), encoding="ascii", errors="replace") as file:
            status = os.fstat(file.fileno())
            if is_ours and (status.st_uid != os.getuid() or status.st_mode & 0o077):
                raise ValueError(
                    f"{key}: {path} belongs to user {status.st_uid} with mode "
                    f"{stat.S_IMODE(status.st_mode):o}, wanted a file that only user {os.getuid()} "
                    "can read: delete it and start the server again"
                )
            text = file.read(1024)
    except OSError as error:
        raise ValueError(f"{key}: cannot read {path}: {error.strerror}") from None
    return _checked(text.strip(), f"{key}: {path}")


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
            partial.replace(path)
        except OSError as error:
            problems.append(f"{folder}: {error.strerror}")
        else:
            return path
    raise ValueError(
        f"no folder takes the server's token ({'; '.join(problems)}): set {VARIABLE} or "
        "rollout.vllm.server_token_file"
    )


def _folders() -> list[Path]:
    """Where a server writes its token: the cache folder, or without a home the temporary one."""
    cache = os.environ.get("XDG_CACHE_HOME")
    temporary = Path(tempfile.gettempdir()) / f"care-train-{os.getuid()}"
    try:
        home = [Path(cache) if cache else Path.home() / ".cache"]
    # The user has no home that anything knows of.
    except RuntimeError:
        home = []
    return [folder / "care-train" / "servers" for folder in home] + [temporary]


def _file_name(url: str) -> str:
    """Host and port; for this machine's own addresses its name, as a home may be shared."""
    parts = urlsplit(url)
    host = (parts.hostname or "").rstrip(".")
    if host == "localhost" or _is_own_address(host):
        host = socket.gethostname().lower()
    port = parts.port or (443 if parts.scheme == "https" else 80)
    return f"{re.sub(r'[^a-z0-9.-]', '_', host)}-{port}"


def _is_own_address(host: str) -> bool:
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    return address.is_loopback or address.is_unspecified
