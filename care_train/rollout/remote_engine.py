"""The vLLM engine in a server: each rank asks it for its rollouts, rank 0 sends the weights."""

import atexit
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from functools import cache, partial
from typing import Any

import torch

from care_train.config import VllmSettings
from care_train.distributed import is_main, of_first_rank
from care_train.models.load import LoadedModel
from care_train.models.lora import has_adapters
from care_train.rollout.engine import (
    Completion,
    Request,
    SamplingSettings,
    Value,
    WeightParts,
    in_background,
)
from care_train.rollout.errors import RolloutServerError
from care_train.rollout.server_access import TOKEN_VARIABLE, Token, find_token
from care_train.rollout.server_messages import (
    Begin,
    Bucket,
    Done,
    Generated,
    Message,
    MessageType,
    OfSender,
    ServerInfo,
    TakeLease,
    pack_batch,
    server_identity,
)
from care_train.rollout.vllm_engine import check_expansion, check_length
from care_train.rollout.weight_sync import (
    BUCKET_BYTES,
    MEET_SECONDS,
    Broadcast,
    backend_for,
    buckets,
    described,
    join_group,
    new_unique_id,
)

CONNECT_SECONDS = 10.0
CONNECT_RETRIES = 5
"""Attempts to connect after the first, over about 8 seconds. Nothing was sent then: a request that
the server may have begun is never repeated."""

ANSWER_SECONDS = 600.0
"""How long one answer may take, a whole batch or a bucket of weights; after that the run stops."""

REQUEST_BYTES = 64 << 20
"""Weights in one request, where requests carry them; a larger tensor goes alone."""

BEAT_SECONDS = 5.0
"""How often the server hears that the run is alive: a sixth of what it waits for that. Also how
long its answer to that may take."""

WAIT_SECONDS = 40.0
"""How long to ask for a server that another run has. That run may be one that was just killed,
which the server knows after 30 s of silence."""


class ServerClient:
    """One server, seen from one process, and the process's hold on it: once it is taken, a thread
    reports that the run is alive, until it is released or the process ends."""

    def __init__(self, url: str, token: Token) -> None:
        """Connects at the first request."""
        self.url = url
        self.token = token
        self.sender = uuid.uuid4().hex
        self._patient = _http(token, ANSWER_SECONDS, CONNECT_RETRIES)
        self._quick = _http(token, BEAT_SECONDS, 0)
        who = f"process {os.getpid()} on {socket.gethostname()}"
        self._lease = TakeLease(sender=self.sender, who=who)
        self._is_over = threading.Event()
        self._is_over.set()
        self._beats = threading.Thread()

    def ask(
        self,
        kind: type[MessageType],
        path: str,
        message: Message | None = None,
        *,
        quick: bool = False,
    ) -> MessageType:
        """The server's answer, of a kind; without a message, by GET.

        Raises:
            RolloutServerError: names the server, what was asked, and why there is no answer; where
                the answer is to be quick, also if it took more than `BEAT_SECONDS`.
        """
        import httpx

        http = self._quick if quick else self._patient
        method, content = "GET", None
        if message is not None:
            method, content = "POST", message.model_dump_json()
        try:
            response = http.request(method, self.url + path, content=content)
        except (httpx.ConnectError, httpx.ConnectTimeout) as error:
            raise self.error(f"cannot connect: {error}; is `care-train serve` running?") from error
        except httpx.TimeoutException as error:
            raise self.error(f"{path}: no answer in {http.timeout.read:g} s") from error
        except httpx.TransportError as error:
            raise self.error(f"{path}: the connection broke: {error}") from error
        status = response.status_code
        if status == 401:
            got = "no token was found" if self.token.value is None else "its token is not the one"
            raise self.error(
                f"{path}: {got} ({self.token.source}): the server says at its start where its "
                "token is; on this machine as its user it is found, otherwise give it by "
                f"${TOKEN_VARIABLE}",
                status,
            )
        try:
            if status == 200:
                return kind.model_validate_json(response.content)
            raise self.error(f"{path}: {response.json()['error']}", status)
        # Not of this form: pydantic's and JSON's errors are ValueErrors.
        except (ValueError, KeyError, TypeError):
            hint = "see its log" if status == 500 else "is this a `care-train serve`?"
            raise self.error(f"{path}: status {status}: {hint}", status) from None

    def take(self) -> None:
        """Have the server from now on.

        Raises:
            RolloutServerError: it cannot be reached, or a run that is alive has it.
        """
        end = time.monotonic() + WAIT_SECONDS
        while True:
            try:
                self.ask(Done, "/lease", self._lease)
                break
            except RolloutServerError as error:
                if error.status != 409 or time.monotonic() > end:
                    raise
            time.sleep(1)
        if self._is_over.is_set():
            self._is_over.clear()
            self._beats = threading.Thread(target=self._beat, daemon=True)
            self._beats.start()
            # So that the next run need not wait.
            atexit.register(self.release)

    def release(self) -> None:
        """Leave the server to others."""
        if self._is_over.is_set():
            return
        self._is_over.set()
        # A report on its way would take the server again.
        self._beats.join()
        try:
            self.ask(Done, "/release", OfSender(sender=self.sender), quick=True)
        # The server is gone or has another run, so there is nothing to release.
        except RolloutServerError:
            return

    def _beat(self) -> None:
        while not self._is_over.wait(BEAT_SECONDS):
            try:
                self.ask(Done, "/lease", self._lease, quick=True)
            except RolloutServerError as error:
                # Another run has it. Other failures may pass, or the next request reports them.
                if error.status == 409:
                    self._is_over.set()

    def error(self, problem: str, status: int | None = None) -> RolloutServerError:
        """What to raise about this server."""
        return RolloutServerError(f"rollout.vllm.server {self.url}: {problem}", status)


def _http(token: Token, seconds: float, retries: int) -> Any:
    import httpx

    bearer = {} if token.value is None else {"Authorization": f"Bearer {token.value}"}
    return httpx.Client(
        headers=bearer | {"Content-Type": "application/json"},
        transport=httpx.HTTPTransport(retries=retries),
        timeout=httpx.Timeout(seconds, connect=CONNECT_SECONDS),
        # No proxy: it would have to let the weights through too.
        trust_env=False,
    )


# A process is one run: its engines share the lease, and the one that sent weights last samples.
_client_of_process = cache(ServerClient)


class VllmServerEngine:
    """Samples at `rollout.vllm.server` from weights that `sync` sent there and had checked."""

    num_starts = 1
    """The server does not sleep, and a new one has to be sent all weights first."""

    def __init__(
        self, loaded: LoadedModel, settings: VllmSettings, lora_rank: int | None = None
    ) -> None:
        """Find the server.

        Args:
            loaded: the policy.
            settings: `rollout.vllm`.
            lora_rank: of adapters that go beside base weights; None where none do.

        Raises:
            ValueError: it serves another model, takes other adapters or has other devices, or a
                token cannot be read.
            RolloutServerError: it cannot be reached.
        """
        assert settings.server is not None
        self._loaded = loaded
        token = find_token(settings.server)
        self.client = _client_of_process(settings.server.rstrip("/"), token)
        self._info = self.client.ask(ServerInfo, "/info")
        self._backend = backend_for(loaded.model.device)
        self._sends_adapters = lora_rank is not None and has_adapters(loaded.model)
        own = server_identity(loaded, lora_rank, self._backend)
        for key in sorted({*self._info.identity, *own}):
            got, wanted = self._info.identity.get(key), own.get(key)
            if got != wanted:
                raise ValueError(
                    f"rollout.vllm.server {self.client.url} does not fit this run: {key}: "
                    f"server {got!r}, trainer {wanted!r}; start it with this run's configuration"
                )
        self._broadcast: Broadcast | None = None
        self._version: str | None = None

    def generate(self, requests: Sequence[Request], sampling: SamplingSettings) -> list[Completion]:
        """One completion per request, in order, with the log-probs of what was sampled.

        Raises:
            ValueError: a context over the limit, or one that vLLM expands otherwise than the
                trainer; named.
            RolloutServerError: the server is gone, late, or has other weights than `sync` sent.
        """
        if not requests:
            return []
        for request in requests:
            check_length(request, sampling, self._info.max_context)
        batch = pack_batch(requests, sampling, self._loaded, self._version)
        answer = self.client.ask(Generated, "/generate", batch)
        for request, packed in zip(requests, batch.requests, strict=True):
            check_expansion(request, (*(answer.expanded[packed.prompt] or ()), *request.prefix_ids))
        return list(answer.completions)

    @property
    def wanted(self) -> WeightParts:
        """With the base weights, until the server was seen to hold this run's."""
        if not self._sends_adapters:
            return WeightParts.MERGED
        return WeightParts.BASE_AND_ADAPTER if self._version is None else WeightParts.ADAPTER

    def sync(self, weights: Iterable[tuple[str, torch.Tensor]]) -> dict[str, float]:
        """Send what is `wanted` and have the server check that it holds it; due on all ranks.

        Raises:
            RolloutServerError: it does not hold them (names the tensor), or is gone. On all ranks.
        """
        # A rank that still waits for rollouts would lose them: the server gives up what runs.
        of_first_rank(None)
        remaining, held, self._version = iter(weights), self._version, None
        sent: Any = None
        if is_main():
            try:
                sent = self._send(remaining, held)
            except (ValueError, RolloutServerError) as error:
                # The group may be in the middle of a broadcast: the next sync makes another.
                sent, self._broadcast = error, None
        # To gather weights is collective, so every rank goes through all of them.
        for _ in remaining:
            pass
        sent = of_first_rank(sent)
        if isinstance(sent, Exception):
            raise sent
        self._version, num_bytes = sent
        return {"sync_bytes": float(num_bytes)}

    def rest(self) -> None:
        """Nothing to free: the server's memory is its own."""

    def _send(
        self, weights: Iterator[tuple[str, torch.Tensor]], held: str | None
    ) -> tuple[str | None, int]:
        """Send the weights to a server that holds version `held` of them; returns the version that
        it then holds, and the bytes sent."""
        self.client.take()
        sender, num_bytes, unique_id, join = self.client.sender, 0, None, None
        if self._backend == "nccl" and self._broadcast is None:
            unique_id, size = new_unique_id(), 1 + self._info.num_workers
            # Twice as long as a worker waits: the workers begin after what vLLM is busy with.
            join = partial(join_group, unique_id, 0, size, 2 * MEET_SECONDS)
        begin = Begin(sender=sender, version=held, unique_id=unique_id)
        broadcast = self._ask("/weights/begin", begin, join) or self._broadcast
        self._broadcast, limit = broadcast, BUCKET_BYTES if broadcast else REQUEST_BYTES
        for tensors, content in buckets(described(weights, self._loaded.model.dtype), limit):
            carried = None if broadcast else content.cpu().numpy().tobytes()
            bucket = Bucket(sender=sender, tensors=tuple(tensors), content=carried)
            self._ask("/weights/bucket", bucket, broadcast and partial(broadcast, content))
            num_bytes += content.numel()
        end = self.client.ask(Done, "/weights/end", OfSender(sender=sender))
        return end.version, num_bytes

    def _ask(
        self, path: str, message: Message, own_part: Callable[[], Value] | None
    ) -> Value | None:
        """Ask the server for something, and meanwhile do what it needs of this process; if both
        fail, the server's reason is raised."""
        if own_part is None:
            self.client.ask(Done, path, message)
            return None
        answer: Future[Done] = in_background(lambda: self.client.ask(Done, path, message))
        try:
            result = own_part()
        except RuntimeError as error:
            answer.result()
            raise self.client.error(
                f"weight sync: the server's workers cannot be reached: {error}"
            ) from error
        answer.result()
        return result
