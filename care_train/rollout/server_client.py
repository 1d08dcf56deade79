"""HTTP to a `care-train serve`: timeouts, retries while connecting only, errors that name it."""

import json
import socket
from typing import Any
from urllib.parse import urlsplit

from care_train.rollout.errors import RolloutError

CONNECT_SECONDS = 10.0
CONNECT_RETRIES = 5
"""Attempts to connect after the first, over about 8 seconds. Nothing was sent then: a request that
the server may have begun is never repeated."""


class RolloutServerError(RolloutError):
    """The server is gone, late, or could not do what it was asked."""

    advice = "; start the server again (care-train serve)"


class ServerClient:
    """One server, seen from one process."""

    def __init__(self, url: str, timeout: float) -> None:
        """Connects at the first request.

        Args:
            url: `http://host:port`.
            timeout: seconds that the server may take for one answer.
        """
        import httpx

        self.url = url.rstrip("/")
        self._timeout = timeout
        self._http = httpx.Client(
            # Proxies are for the outside.
            transport=httpx.HTTPTransport(retries=CONNECT_RETRIES),
            timeout=httpx.Timeout(timeout, connect=CONNECT_SECONDS),
            trust_env=False,
        )

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
        raise self._error(f"{path}: {_reason(response.content, response.status_code)}")

    def _error(self, problem: str) -> RolloutServerError:
        return RolloutServerError(f"rollout.vllm.server {self.url}: {problem}")


def _reason(content: bytes, status: int) -> str:
    try:
        return str(json.loads(content)["error"])
    except (ValueError, KeyError, TypeError):
        return f"status {status}: is this a `care-train serve`?"
