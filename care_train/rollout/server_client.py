"""HTTP to a `care-train serve`: timeouts, retries while connecting only, errors that name it."""

import json
import socket
from typing import Any
from urllib.parse import urlsplit

from care_train.rollout.errors import RolloutServerError
from care_train.rollout.server_token import VARIABLE, Token

CONNECT_SECONDS = 10.0
CONNECT_RETRIES = 5
"""Attempts to connect after the first, over about 8 seconds. Nothing was sent then: a request that
the server may have begun is never repeated."""


class ServerClient:
    """One server, seen from one process."""

    def __init__(self, url: str, timeout: float, token: Token, retries: int | None = None) -> None:
        """Connects at the first request.

        Args:
            url: `http://host:port`.
            timeout: seconds that the server may take for one answer.
            token: what the server demands.
            retries: attempts to connect after the first; None: `CONNECT_RETRIES`.
        """
        import httpx

        self.url = url.rstrip("/")
        self._timeout = timeout
        self.token = token
        bearer = {} if token.value is None else {"Authorization": f"Bearer {token.value}"}
        self._http = httpx.Client(
            headers=bearer | {"Content-Type": "application/json"},
            # Proxies are for the outside.
            transport=httpx.HTTPTransport(retries=CONNECT_RETRIES if retries is None else retries),
            timeout=httpx.Timeout(timeout, connect=CONNECT_SECONDS),
            trust_env=False,
        )

    def with_timeout(self, timeout: float) -> "ServerClient":
        """The same server, asked once and with less patience."""
        return ServerClient(self.url, timeout, self.token, retries=0)

    def get(self, path: str) -> Any:
        """The server's answer."""
        return self._ask("GET", path, None)

    def post(self, path: str, message: Any) -> Any:
        """The server's answer to a message in JSON's types.

        Raises:
            RolloutServerError: names the server, what was asked, and why there is no answer.
        """
        return self._ask("POST", path, json.dumps(message).encode())

    def local_address(self) -> str:
        """This machine's address as the server can reach it."""
        parts = urlsplit(self.url)
        port = parts.port or (443 if parts.scheme == "https" else 80)
        try:
            with socket.create_connection((parts.hostname, port), CONNECT_SECONDS) as connection:
                return connection.getsockname()[0]
        except OSError as error:
            raise self._error(f"cannot connect: {error}") from error

    def _ask(self, method: str, path: str, content: bytes | None) -> Any:
        import httpx

        try:
            response = self._http.request(method, self.url + path, content=content)
        except (httpx.ConnectError, httpx.ConnectTimeout) as error:
            raise self._error(f"cannot connect: {error}; is `care-train serve` running?") from error
        except httpx.TimeoutException as error:
            raise self._error(
                f"{path}: no answer in rollout.vllm.server_timeout = {self._timeout:g} s"
            ) from error
        except httpx.TransportError as error:
            raise self._error(f"{path}: the connection broke: {error}") from error
        if response.status_code == 200:
            return json.loads(response.content)
        status = response.status_code
        problem = _token_problem(self.token) if status == 401 else _reason(response.content, status)
        raise RolloutServerError(f"rollout.vllm.server {self.url}: {path}: {problem}", status)

    def _error(self, problem: str) -> RolloutServerError:
        return RolloutServerError(f"rollout.vllm.server {self.url}: {problem}")


def _token_problem(token: Token) -> str:
    got = "no token was found" if token.value is None else "its token is not the one"
    return (
        f"{got} ({token.source}): the server says at its start where its token is; on this machine "
        "as its user it is found, otherwise give it by rollout.vllm.server_token_file or "
        f"${VARIABLE}"
    )


def _reason(content: bytes, status: int) -> str:
    try:
        return str(json.loads(content)["error"])
    except (ValueError, KeyError, TypeError):
        hint = "see its log" if status == 500 else "is this a `care-train serve`?"
        return f"status {status}: {hint}"
