"""The vLLM engine in a server: each rank asks it for its rollouts, rank 0 sends the weights."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from typing import Any

import torch

from care_train.config import VllmSettings
from care_train.distributed import is_main, of_first_rank
from care_train.models.load import LoadedModel
from care_train.rollout.checksum import checksum
from care_train.rollout.engine import (
    Completion,
    Request,
    SamplingSettings,
    Value,
    WeightParts,
    in_background,
)
from care_train.rollout.errors import RolloutServerError
from care_train.rollout.model_identity import first_difference, model_identity
from care_train.rollout.server_client import ServerClient
from care_train.rollout.server_lease import process_lease
from care_train.rollout.server_messages import pack_requests, unpack_completion
from care_train.rollout.server_token import find_token
from care_train.rollout.vllm_inputs import check_expansion, check_length, merge_size_of
from care_train.rollout.vllm_process import adapter_rank
from care_train.rollout.weight_channel import MEET_SECONDS, Broadcast, backend_for, invite

_MEET_SECONDS = 2 * MEET_SECONDS
"""The server's workers come after what its engine has begun."""


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
        self._dtype = loaded.model.dtype
        self._bucket_bytes = settings.sync_bucket_mib << 20
        token = find_token(settings.server, settings.server_token_file)
        self._client = ServerClient(settings.server, settings.server_timeout, token)
        self._info = self._client.get("/info")
        difference = first_difference(self._info["model"], model_identity(loaded))
        if difference is not None:
            raise ValueError(
                f"rollout.vllm.server {self._client.url}: it serves another model: {difference}; "
                "start it with this run's configuration"
            )
        backend = backend_for(loaded.model.device)
        if self._info["backend"] != backend:
            raise ValueError(
                f"rollout.vllm.server {self._client.url}: it takes weights by "
                f"{self._info['backend']}, this run sends them by {backend}: both must have GPUs, "
                "or neither"
            )
        self._has_adapter = _checked_rank(self._client.url, self._info, loaded, settings)
        self._lease = process_lease(self._client)
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
            check_length(request, sampling, self._info["max_context"])
        eos_ids = self._loaded.eos_token_ids
        message = pack_requests(
            requests, sampling, eos_ids, self._loaded.image_token_id, merge_size_of(self._loaded)
        )
        answer = self._client.post("/generate", message | {"version": self._version})
        for request, packed in zip(requests, message["requests"], strict=True):
            expanded = answer["expanded"][packed["prompt"]]
            check_expansion(request, (*expanded, *request.prefix_ids))
        return [unpack_completion(values, eos_ids) for values in answer["completions"]]

    @property
    def wanted(self) -> WeightParts:
        """Base weights until the server was seen to hold this run's."""
        if not self._has_adapter:
            return WeightParts.MERGED
        return WeightParts.BASE_AND_ADAPTER if self._version is None else WeightParts.ADAPTER

    def sync(self, weights: Iterable[tuple[str, torch.Tensor]]) -> dict[str, float]:
        """Send what is `wanted`, let the server check that it holds it; due on all ranks.

        Raises:
            RolloutServerError: it does not hold them (names the tensor), or is gone. On all ranks.
        """
        # No rank may still wait for rollouts: the server would give them up.
        of_first_rank(None)
        remaining, self._version = iter(weights), None
        sent: Any = None
        if is_main():
            try:
                sent = self._send(remaining)
            except (ValueError, RolloutServerError) as error:
                # The group may be half in a broadcast: the next sync makes a new one.
                sent, self._broadcast = error, None
        # Gathering is collective: every rank goes through all of it.
        for _ in remaining:
            pass
        sent = of_first_rank(sent)
        if isinstance(sent, Exception):
            raise sent
        self._version, num_bytes = sent
        return {"sync_bytes": float(num_bytes)}

    def rest(self) -> None:
        """The server's memory is its own."""

    def close(self) -> None:
        """Leave the server to other processes; the end of this one does so too."""
        self._lease.release()

    def _send(self, weights: Iterator[tuple[str, torch.Tensor]]) -> tuple[str, int]:
        if self._broadcast is None:
            self._broadcast = self._open_channel()
        broadcast, sender = self._broadcast, {"sender": self._lease.sender}
        self._client.post("/weights/begin", sender)
        num_bytes = 0
        for notes, bucket in _buckets(weights, self._dtype, self._bucket_bytes):
            self._send_bucket(broadcast, bucket, sender | {"tensors": notes})
            num_bytes += len(bucket)
        return self._client.post("/weights/end", sender)["version"], num_bytes

    def _send_bucket(
        self, broadcast: Broadcast, bucket: torch.Tensor, message: dict[str, Any]
    ) -> None:
        message = message | {"num_bytes": len(bucket)}
        answer = in_background(lambda: self._client.post("/weights/bucket", message))
        self._meet(lambda: broadcast(bucket), answer)

    def _open_channel(self) -> Broadcast:
        self._lease.take()
        invitation = invite(self._info["backend"], self._client.local_address())
        message = invitation.message | {"sender": self._lease.sender}
        answer = in_background(lambda: self._client.post("/weights/open", message))
        size = 1 + self._info["num_workers"]
        return self._meet(lambda: invitation.open(size, _MEET_SECONDS), answer)

    def _meet(self, own_part: Callable[[], Value], answer: Future[Any]) -> Value:
        """What must happen here while the server does its part; its reason to fail goes first."""
        try:
            result = own_part()
        except RuntimeError as error:
            answer.result()
            problem = f"weight sync: the server's workers cannot be reached: {error}"
            raise RolloutServerError(
                f"rollout.vllm.server {self._client.url}: {problem}"
            ) from error
        answer.result()
        return result


def _checked_rank(
    url: str, info: dict[str, Any], loaded: LoadedModel, settings: VllmSettings
) -> bool:
    """Whether adapters go alone; the server must have been started for just those."""
    own, served = adapter_rank(loaded, settings), info["lora_rank"]
    if own != served:
        raise ValueError(
            f"rollout.vllm.server {url}: it takes adapters of rank {served}, this run sends rank "
            f"{own} (None: merged weights); start it with this run's model.lora and "
            "rollout.vllm.lora"
        )
    return own is not None


def _buckets(
    weights: Iterator[tuple[str, torch.Tensor]], dtype: torch.dtype, bucket_bytes: int
) -> Iterator[tuple[list[Any], torch.Tensor]]:
    """Tensors packed one after the other: what the server must know of each, and their bytes.

    Args:
        weights: names and whole tensors, each valid until the next is asked for.
        dtype: the precision they are sent in.
        bucket_bytes: a bucket is no larger, unless one tensor alone is.
    """
    notes: list[Any] = []
    parts: list[torch.Tensor] = []
    size = 0
    for name, tensor in weights:
        whole = tensor.detach().to(dtype).contiguous()
        num_bytes = whole.numel() * whole.element_size()
        if notes and size + num_bytes > bucket_bytes:
            yield notes, torch.cat(parts)
            notes, parts, size = [], [], 0
        kind = str(dtype).removeprefix("torch.")
        notes.append((name, kind, list(whole.shape), checksum(whole)))
        parts.append(whole.reshape(-1).view(torch.uint8).clone())
        size += num_bytes
    if notes:
        yield notes, torch.cat(parts)
