"""What a `care-train serve` does: one thread drives vLLM, one run at a time has the server.

The run with the lease reports every few seconds that it is alive, and alone may send weights. No
other run gets the lease before it has been silent for a while and nothing is sampled for it.

Requests of all trainer ranks share vLLM's batches. vLLM's thread alone decides which weights there
are: a batch enters vLLM only under the version of the weights that vLLM then holds, and is given up
before they change, so no answer was sampled from other weights than its run asked for.
"""

import asyncio
import secrets
import time
from collections.abc import Callable
from typing import Any

from care_train.models.load import LoadedModel
from care_train.rollout.engine_loop import Batch, EngineLoop
from care_train.rollout.server_messages import (
    Bucket,
    Done,
    Generate,
    Generated,
    OfSender,
    OpenChannel,
    RequestError,
    ServerInfo,
    TakeLease,
    unpack_batch,
)
from care_train.rollout.vllm_engine import adapter_request, completion_of, sampling_parameters
from care_train.rollout.weight_sync import check_sync, finish_sync

LEASE_SECONDS = 30.0
"""How long a silent run is taken to be alive."""

_POLL_SECONDS = 1.0
"""How often the server checks whether the trainer of a running batch is still connected."""


class RolloutServer:
    """What the routes do. One asyncio thread runs them; what concerns weights happens on vLLM's
    thread, where the lease is checked again."""

    def __init__(
        self, loop: EngineLoop, info: ServerInfo, loaded: LoadedModel, backend: str
    ) -> None:
        """Serve `loaded`, a model without weights, whose empty vLLM `loop` drives; weights come by
        `backend` (`weight_channel.backend_for`)."""
        self._loop = loop
        self._info = info
        self._loaded = loaded
        self._backend = backend
        self._lease: TakeLease | None = None
        self._heard = 0.0
        """`time.monotonic` when the run with the lease last reported that it is alive."""
        # The next three are used on vLLM's thread alone.
        self._met: str | None = None
        """The sender whose channel the workers joined last."""
        self._is_receiving = False
        """A sync has begun, and has neither failed nor ended."""
        self._has_adapter = False
        """It has brought an adapter."""

    async def info(self, message: None, request: Any) -> ServerInfo:
        """The model and its limits."""
        return self._info

    async def generate(self, message: Generate, request: Any) -> Generated:
        """Sample one batch from the weights that its trainer sent last."""
        limit = self._info.max_context
        prompts = await asyncio.to_thread(unpack_batch, message, self._loaded, limit)
        parameters = [
            sampling_parameters(message.sampling, packed.seed, message.eos_ids)
            for packed in message.requests
        ]
        batch = Batch(message.version, prompts, parameters)
        await asyncio.wrap_future(self._loop.generate(batch))
        result = asyncio.wrap_future(batch.result)
        while not result.done():
            await asyncio.wait([result], timeout=_POLL_SECONDS)
            if not result.done() and await request.is_disconnected():
                self._loop.abort(batch, "its trainer went away")
        outputs = result.result()
        expanded: list[tuple[int, ...] | None] = [None] * len(message.prompts)
        for packed, output in zip(message.requests, outputs, strict=True):
            ids = tuple(output.prompt_token_ids)
            own = ids[: len(ids) - len(packed.prefix_ids)]
            assert expanded[packed.prompt] in (None, own), "vLLM expanded a prompt in two ways"
            expanded[packed.prompt] = own
        completions = tuple(completion_of(o.outputs[0], message.eos_ids) for o in outputs)
        return Generated(expanded=tuple(expanded), completions=completions)

    async def take(self, message: TakeLease, request: Any) -> Done:
        """Give a run the lease, or extend it.

        Raises:
            RequestError: another run has it; says which.
        """
        lease, now = self._lease, time.monotonic()
        silent = now - self._heard
        if (
            lease is not None
            and lease.sender != message.sender
            and (silent < LEASE_SECONDS or self._loop.running)
        ):
            raise RequestError(
                409,
                f"another run has this server: {lease.who}, heard of {silent:.0f} s ago; one run "
                f"at a time, until it ended or was silent for {LEASE_SECONDS:g} s",
            )
        self._lease, self._heard = message, now
        return Done()

    async def release(self, message: OfSender, request: Any) -> Done:
        """End the lease."""
        self._check_sender(message)
        self._lease = None
        return Done()

    async def open(self, message: OpenChannel, request: Any) -> Done:
        """Let the workers join a channel, at no other address than the request's own."""
        if message.call.backend != self._backend:
            got = message.call.backend
            raise RequestError(422, f"backend: got {got}, wanted this server's {self._backend}")

        def join_channel(llm: Any) -> None:
            self._drop_weights()
            self._met = None
            check_sync(llm.collective_rpc("care_open", args=(message.call, request.client.host)))
            self._met = message.sender

        return await self._on_engine(message, join_channel)

    async def begin(self, message: OfSender, request: Any) -> Done:
        """Begin a weight sync: nothing is sampled until the new weights are whole."""

        def begin(llm: Any) -> None:
            self._drop_weights()
            # Otherwise what the workers still hold of another run could pass for this run's.
            if self._met != message.sender:
                raise RequestError(
                    409, "weight sync: the server's workers have not met this trainer"
                )
            llm.collective_rpc("care_begin")
            self._is_receiving, self._has_adapter = True, False

        return await self._on_engine(message, begin)

    async def bucket(self, message: Bucket, request: Any) -> Done:
        """Take the bucket that the trainer broadcasts meanwhile."""

        def receive(llm: Any) -> None:
            self._stop_receiving()
            arguments = (message.tensors, message.num_bytes)
            check_sync(llm.collective_rpc("care_receive", args=arguments))
            self._has_adapter |= any(tensor.is_adapter for tensor in message.tensors)
            self._is_receiving = True

        return await self._on_engine(message, receive)

    async def end(self, message: OfSender, request: Any) -> Done:
        """Compare what the workers hold with what was sent; then the weights have a version."""
        version = secrets.token_hex(16)

        def check(llm: Any) -> None:
            self._stop_receiving()
            finish_sync(llm)
            self._loop.hold_weights(version, adapter_request() if self._has_adapter else None)

        await self._on_engine(message, check)
        return Done(version=version)

    async def _on_engine(self, message: OfSender, work: Callable[[Any], None]) -> Done:
        """`work(llm)` on vLLM's thread, if the sender has the lease at that moment."""

        def checked(llm: Any) -> None:
            self._check_sender(message)
            work(llm)

        await asyncio.wrap_future(self._loop.call(checked))
        return Done()

    def _check_sender(self, message: OfSender) -> None:
        lease = self._lease
        if lease is None or lease.sender != message.sender:
            owner = "nobody" if lease is None else lease.who
            raise RequestError(409, f"{owner} has this server, not this run: one run at a time")

    def _drop_weights(self) -> None:
        self._is_receiving = False
        self._loop.hold_weights(None)

    def _stop_receiving(self) -> None:
        """A sync goes on only if its next part succeeds; otherwise a new one has to begin."""
        if not self._is_receiving:
            raise RequestError(409, "weight sync: got a part of one, wanted its beginning first")
        self._is_receiving = False
