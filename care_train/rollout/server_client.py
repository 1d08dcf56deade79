"""A run's side of a `care-train serve`: HTTP that is never repeated, and the hold on the server."""

import os
import socket
import threading
import time
import uuid
import weakref
from typing import TypeVar
from urllib.parse import urlsplit

from care_train.rollout.errors import RolloutServerError
from care_train.rollout.server_access import TOKEN_VARIABLE, Token
from care_train.rollout.server_messages import Done, Message, OfSender, TakeLease

Answer = TypeVar("Answer", bound=Message)

CONNECT_SECONDS = 10.0
CONNECT_RETRIES = 5
"""Attempts to connect after the first, over about 8 seconds. Nothing was sent then: a request that
the server may have begun is never repeated."""

ANSWER_SECONDS = 600.0
"""How long one answer may take, a whole batch or a bucket of weights; after that the run stops."""

BEAT_SECONDS = 5.0
"""How often the server hears that the run is alive: a sixth of what it waits for that."""

WAIT_SECONDS = 40.0
"""How long to ask for a server that another run has. That run may be one that was just killed,
which the server knows after 30 s of silence."""

_BEAT_ANSWER_SECONDS = 5.0


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
            transport=httpx.HTTPTransport(retries=CONNECT_RETRIES if retries is None else retries),
            timeout=httpx.Timeout(timeout, connect=CONNECT_SECONDS),
            # No proxy: it would have to let the weights through too.
            trust_env=False,
        )

    def with_timeout(self, timeout: float) -> "ServerClient":
        """The same server, to be asked without retries and with another time limit."""
        return ServerClient(self.url, timeout, self.token, retries=0)

    def ask(self, kind: type[Answer], path: str, message: Message | None = None) -> Answer:
        """The server's answer.

        Args:
            kind: the answer's.
            path: the route.
            message: None asks by GET.

        Raises:
            RolloutServerError: names the server, what was asked, and why there is no answer.
        """
        import httpx

        method, content = "GET", None
        if message is not None:
            method, content = "POST", message.model_dump_json()
        try:
            response = self._http.request(method, self.url + path, content=content)
        except (httpx.ConnectError, httpx.ConnectTimeout) as error:
            raise self.error(f"cannot connect: {error}; is `care-train serve` running?") from error
        except httpx.TimeoutException as error:
            raise self.error(f"{path}: no answer in {self._timeout:g} s") from error
        except httpx.TransportError as error:
            raise self.error(f"{path}: the connection broke: {error}") from error
        status = response.status_code
        if status == 401:
            raise self.error(f"{path}: {_token_problem(self.token)}", status)
        try:
            if status == 200:
                return kind.model_validate_json(response.content)
            raise self.error(f"{path}: {response.json()['error']}", status)
        # Not of this form: pydantic's and JSON's errors are ValueErrors.
        except (ValueError, KeyError, TypeError):
            hint = "see its log" if status == 500 else "is this a `care-train serve`?"
            raise self.error(f"{path}: status {status}: {hint}", status) from None

    def local_address(self) -> str:
        """This machine's address as the server can reach it."""
        parts = urlsplit(self.url)
        port = parts.port or (443 if parts.scheme == "https" else 80)
        try:
            with socket.create_connection((parts.hostname, port), CONNECT_SECONDS) as connection:
                return connection.getsockname()[0]
        except OSError as error:
            raise self.error(f"cannot connect: {error}") from error

    def error(self, problem: str, status: int | None = None) -> RolloutServerError:
        """What to raise about this server."""
        return RolloutServerError(f"rollout.vllm.server {self.url}: {problem}", status)


def _token_problem(token: Token) -> str:
    got = "no token was found" if token.value is None else "its token is not the one"
    return (
        f"{got} ({token.source}): the server says at its start where its token is; on this machine "
        "as its user it is found, otherwise give it by "
        f"${TOKEN_VARIABLE}"
    )


class Lease:
    """A run's hold on its server: a thread reports that the run is alive, until the lease is
    released or the process ends."""

    def __init__(self, client: ServerClient) -> None:
        """Nothing is taken yet.

        Args:
            client: the server's.
        """
        self.sender = uuid.uuid4().hex
        self._client = client
        who = f"process {os.getpid()} on {socket.gethostname()}"
        self._message = TakeLease(sender=self.sender, who=who)
        self._is_over = threading.Event()
        self._is_over.set()

    def take(self) -> None:
        """Have the server from now on.

        Raises:
            RolloutServerError: it cannot be reached, or a run that is alive has it.
        """
        end = time.monotonic() + WAIT_SECONDS
        while True:
            try:
                self._client.ask(Done, "/lease", self._message)
                break
            except RolloutServerError as error:
                if error.status != 409 or time.monotonic() > end:
                    raise
            time.sleep(1)
        if self._is_over.is_set():
            self._is_over = threading.Event()
            quick = self._client.with_timeout(_BEAT_ANSWER_SECONDS)
            beats = threading.Thread(
                target=_beat, args=(quick, self._message, self._is_over), daemon=True
            )
            beats.start()
            # Also at the end of the process, so that the next run need not wait.
            self._release = weakref.finalize(self, _end, quick, self.sender, self._is_over, beats)

    def release(self) -> None:
        """Leave the server to others."""
        if not self._is_over.is_set():
            self._release()


_of_process: dict[tuple[str, str | None], Lease] = {}


def process_lease(client: ServerClient) -> Lease:
    """This process's hold on a server. A process is one run: its engines share the lease, and the
    one that sent weights last is the one that samples."""
    return _of_process.setdefault((client.url, client.token.value), Lease(client))


def _beat(client: ServerClient, message: TakeLease, is_over: threading.Event) -> None:
    while not is_over.wait(BEAT_SECONDS):
        try:
            client.ask(Done, "/lease", message)
        except RolloutServerError as error:
            # Another run has it. Other failures may pass, or the next request reports them.
            if error.status == 409:
                is_over.set()


def _end(
    client: ServerClient, sender: str, is_over: threading.Event, beats: threading.Thread
) -> None:
    is_over.set()
    # A report on its way would take the server again.
    beats.join()
    try:
        client.ask(Done, "/release", OfSender(sender=sender))
    # The server is gone or has another run, so there is nothing to release.
    except RolloutServerError:
        return
