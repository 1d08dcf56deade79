"""The vLLM engine in a server: each rank asks it for its rollouts, rank 0 sends the weights."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from typing import Any

import torch

from care_train.config import VllmSettings
from care_train.distributed import is_main, of_first_rank
from care_train.models.load import LoadedModel
from care_train.rollout.engine import (
    Completion,
    Request,
    SamplingSettings,
    Value,
    WeightParts,
    in_background,
)
from care_train.rollout.errors import RolloutServerError
from care_train.rollout.server_access import find_token
from care_train.rollout.server_client import ANSWER_SECONDS, ServerClient, process_lease
from care_train.rollout.server_messages import (
    Bucket,
    Done,
    Generated,
    OfSender,
    OpenChannel,
    ServerInfo,
    first_difference,
    model_identity,
    pack_batch,
)
from care_train.rollout.vllm_engine import check_expansion, check_length
from care_train.rollout.vllm_process import adapter_rank
from care_train.rollout.weight_channel import MEET_SECONDS, Broadcast, backend_for, invite
from care_train.rollout.weight_sync import BUCKET_BYTES, buckets, described


class VllmServerEngine:
    """Samples at `rollout.vllm.server` from weights that `sync` sent there and had checked."""

    def __init__(self, loaded: LoadedModel, settings: VllmSettings) -> None:
        """Find the server.

        Args:
            loaded: gives configuration, tokenizer, processor and precision.
            settings: `rollout.vllm`, with a server.

        Raises:
            ValueError: it serves another model, takes other adapters or has other devices, or a
                token cannot be read.
            RolloutServerError: it cannot be reached.
        """
        assert settings.server is not None
        self._loaded = loaded
        token = find_token(settings.server)
        self._client = ServerClient(settings.server, ANSWER_SECONDS, token)
        self._info = self._client.ask(ServerInfo, "/info")
        if problem := _misfit(self._info, loaded, settings):
            raise ValueError(f"rollout.vllm.server {self._client.url}: {problem}")
        self._lease = process_lease(self._client)
        self._broadcast: Broadcast | None = None
        self._version: str | None = None

    @property
    def num_starts(self) -> int:
        """1: the server does not sleep, and a new one has to be sent all weights first."""
        return 1

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
        answer = self._client.ask(Generated, "/generate", batch)
        for request, packed in zip(requests, batch.requests, strict=True):
            check_expansion(request, (*(answer.expanded[packed.prompt] or ()), *request.prefix_ids))
        return list(answer.completions)

    @property
    def wanted(self) -> WeightParts:
        """With the base weights, until the server was seen to hold this run's."""
        if self._info.lora_rank is None:
            return WeightParts.MERGED
        return WeightParts.BASE_AND_ADAPTER if self._version is None else WeightParts.ADAPTER

    def sync(self, weights: Iterable[tuple[str, torch.Tensor]]) -> dict[str, float]:
        """Send what is `wanted` and have the server check that it holds it; due on all ranks.

        Raises:
            RolloutServerError: it does not hold them (names the tensor), or is gone. On all ranks.
        """
        # A rank that still waits for rollouts would lose them: the server gives up what runs.
        of_first_rank(None)
        remaining, self._version = iter(weights), None
        sent: Any = None
        if is_main():
            try:
                sent = self._send(remaining)
            except (ValueError, RolloutServerError) as error:
                # The channel may be in the middle of a broadcast: the next sync opens another.
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

    def close(self) -> None:
        """Leave the server to other processes; the end of this one does so too."""
        self._lease.release()

    def _send(self, weights: Iterator[tuple[str, torch.Tensor]]) -> tuple[str | None, int]:
        if self._broadcast is None:
            self._broadcast = self._open_channel()
        broadcast, sender, num_bytes = self._broadcast, self._lease.sender, 0
        self._client.ask(Done, "/weights/begin", OfSender(sender=sender))
        described_weights = described(weights, self._loaded.model.dtype)
        for tensors, content in buckets(described_weights, BUCKET_BYTES):
            size = content.numel()
            message = Bucket(sender=sender, tensors=tuple(tensors), num_bytes=size)
            answer = in_background(lambda m=message: self._client.ask(Done, "/weights/bucket", m))
            self._meet(lambda c=content: broadcast(c), answer)
            num_bytes += size
        end = self._client.ask(Done, "/weights/end", OfSender(sender=sender))
        return end.version, num_bytes

    def _open_channel(self) -> Broadcast:
        self._lease.take()
        invitation = invite(self._info.backend, self._client.local_address())
        message = OpenChannel(sender=self._lease.sender, call=invitation.call)
        answer = in_background(lambda: self._client.ask(Done, "/weights/open", message))
        size = 1 + self._info.num_workers
        # Twice as long as a worker waits: the workers begin after what vLLM is busy with.
        return self._meet(lambda: invitation.open(size, 2 * MEET_SECONDS), answer)

    def _meet(self, own_part: Callable[[], Value], answer: Future[Any]) -> Value:
        """Do what must happen here while the server does its part; if both fail, the server's
        reason is raised."""
        try:
            result = own_part()
        except RuntimeError as error:
            answer.result()
            raise self._client.error(
                f"weight sync: the server's workers cannot be reached: {error}"
            ) from error
        answer.result()
        return result


def _misfit(info: ServerInfo, loaded: LoadedModel, settings: VllmSettings) -> str | None:
    """Why a run cannot use a server; None if it can."""
    if difference := first_difference(info.identity, model_identity(loaded)):
        return f"it serves another model: {difference}; start it with this run's configuration"
    backend = backend_for(loaded.model.device)
    if info.backend != backend:
        return (
            f"it takes weights by {info.backend}, this run sends them by {backend}: both must have "
            "GPUs, or neither"
        )
    own = adapter_rank(loaded, settings)
    if info.lora_rank != own:
        return (
            f"it takes adapters of rank {info.lora_rank}, this run sends rank {own} (None: merged "
            "weights); start it with this run's model.lora and rollout.vllm.lora"
        )
    return None
