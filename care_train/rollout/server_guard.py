"""Who may talk to a `care-train serve`: checked before a byte of a request's body is read.

The token keeps everybody else out. Host and Origin keep browsers out even where a page has come to
know it: a page that lets its own name point here sends that name as Host, and every page's request
that could change anything has an Origin, while runs send none.
"""

import hmac
import ipaddress
import json
import re
import socket
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from typing import Any

Scope = MutableMapping[str, Any]
App = Callable[[Scope, Any, Any], Awaitable[None]]

_HOST = re.compile(r"(?:\[(?P<address>[0-9A-Fa-f:.]+)\]|(?P<name>[A-Za-z0-9._-]+))(?::\d{1,5})?")
"""A Host header: an IPv6 address in brackets, or a name or IPv4 address; a port may follow."""


class Guard:
    """An ASGI application that answers itself what is refused, and hands on the rest."""

    def __init__(self, app: App, token: str, host: str, allowed_hosts: Sequence[str] = ()) -> None:
        """Guard `app`.

        Args:
            app: gets the requests that are not refused.
            token: what they must bear.
            host: where the server listens.
            allowed_hosts: more names that it may be called by.
        """
        self._app = app
        self._token = f"Bearer {token}".encode()
        self._on_loopback = _is_loopback(host)
        own = ("localhost", host, *(() if self._on_loopback else _machine_names()))
        self._names = {name.lower().rstrip(".") for name in (*own, *allowed_hosts)}

    async def __call__(self, scope: Scope, receive: Any, send: Any) -> None:
        """Answer one request, or let the application."""
        refusal = self._refusal(scope) if scope["type"] == "http" else None
        if refusal is None:
            await self._app(scope, receive, send)
            return
        status, problem = refusal
        content = json.dumps({"error": problem}).encode()
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(content)).encode()),
            # The rest of the request is not read.
            (b"connection", b"close"),
        ]
        if status == 401:
            headers.append((b"www-authenticate", b"Bearer"))
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": content})

    def _refusal(self, scope: Scope) -> tuple[int, str] | None:
        """Status and reason; None for a request to go on with."""
        headers: dict[bytes, list[bytes]] = {}
        for name, value in scope["headers"]:
            headers.setdefault(name, []).append(value)
        hosts = [value.decode("latin-1") for value in headers.get(b"host", [])]
        if len(hosts) != 1 or not self._is_own(hosts[0]):
            return 421, f"Host: got {hosts}, wanted one of {sorted(self._names)} or an own address"
        if b"origin" in headers:
            return 403, "Origin: got one, wanted none: this server is not for web pages"
        tokens = headers.get(b"authorization", [])
        if len(tokens) != 1 or not hmac.compare_digest(tokens[0], self._token):
            got = "another" if tokens else "none"
            return 401, f"Authorization: got {got}, wanted this server's token"
        if scope["method"] == "POST":
            kinds = headers.get(b"content-type", [])
            if [kind.partition(b";")[0].strip().lower() for kind in kinds] != [b"application/json"]:
                return 415, f"Content-Type: got {kinds}, wanted application/json"
        return None

    def _is_own(self, host: str) -> bool:
        """Whether a Host header names this server.

        An address cannot be another site's name that points here, so any will do where the server
        listens on more than this machine's own: a router or a container may translate it.
        """
        match = _HOST.fullmatch(host)
        if match is None:
            return False
        name = (match["address"] or match["name"]).lower().rstrip(".")
        try:
            address = ipaddress.ip_address(name)
        except ValueError:
            return name in self._names
        return address.is_loopback or not self._on_loopback


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _machine_names() -> tuple[str, ...]:
    name = socket.gethostname()
    return name, name.partition(".")[0]
