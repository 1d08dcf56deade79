"""The HTTP side of `care-train serve`: batches in, samples out; weights in, a verdict out.

One run has the server: the one that holds the lease. It says every few seconds that it is alive,
and while it does, or while something is sampled, no other run gets the lease. Only the run that has
it may send weights.
"""

import asyncio
import json
import secrets
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import TypeAdapter

from care_train.rollout.adapter_sync import adapter_request
from care_train.rollout.engine import SamplingSettings
from care_train.rollout.server_engine import (
    Batch,
    EngineLoop,
    InvalidError,
    RefusedError,
    RequestError,
    TooLargeError,
)
from care_train.rollout.server_guard import Guard
from care_train.rollout.server_messages import (
    BucketMessage,
    GenerateMessage,
    LeaseMessage,
    NcclMessage,
    OpenMessage,
    PromptLimits,
    SenderMessage,
    TcpMessage,
    pack_expansions,
    parse,
    unpack_meeting,
    unpack_prompts,
)
from care_train.rollout.vllm_inputs import sampled_log_probs, sampling_parameters
from care_train.rollout.weight_sync import reset_caches

LEASE_SECONDS = 30.0
"""How long a run that is not heard of is taken to be alive."""

_ASK_SECONDS = 1.0
"""How often a running batch asks whether its trainer is still there."""

_BODY_SECONDS = 120.0
"""The longest that a message may take to arrive."""

_MAX_BATCH_BYTES = 1 << 30
_MAX_MESSAGE_BYTES = 16 << 20


@dataclass(frozen=True)
class Peer:
    """Who sent a request."""

    address: str
    is_gone: Callable[[], Awaitable[bool]]


Handler = Callable[[Any, Peer], Awaitable[dict[str, Any]]]


@dataclass(frozen=True)
class _Lease:
    """Which run has the server."""

    sender: str
    who: str
    heard: float
    """`time.monotonic` when it last said that it is alive."""


class RolloutServer:
    """What the routes do; one asyncio thread runs them all, and what concerns weights happens on
    the engine's."""

    def __init__(self, loop: EngineLoop, info: dict[str, Any], limits: PromptLimits) -> None:
        """Serve what `loop` drives.

        Args:
            loop: vLLM, empty.
            info: what `/info` tells: the model's identity and limits.
            limits: what prompts may be.
        """
        self._loop = loop
        self._info = info
        self._limits = limits
        self._lease: _Lease | None = None
        # Of the engine's thread.
        self._met: str | None = None
        """Which sender the workers have met last."""
        self._is_receiving = False
        """A sync has begun and has neither failed nor ended."""

    async def info(self, message: None, peer: Peer) -> dict[str, Any]:
        """The model and its limits."""
        return self._info

    async def generate(self, message: GenerateMessage, peer: Peer) -> dict[str, Any]:
        """Sample one batch with the weights that its trainer sent last."""
        prompts = await asyncio.to_thread(unpack_prompts, message, self._limits)
        sampling = SamplingSettings(**message.sampling.model_dump())
        parameters = [
            sampling_parameters(sampling, request.seed, message.eos_ids)
            for request in message.requests
        ]
        lora = adapter_request() if self._info["lora_rank"] else None
        batch = Batch(message.version, prompts, parameters, lora)
        self._loop.generate(batch)
        outputs = await self._wait(batch, peer)
        return {
            "expanded": pack_expansions(message, [output.prompt_token_ids for output in outputs]),
            "completions": [
                {
                    "token_ids": list(output.outputs[0].token_ids),
                    "log_probs": sampled_log_probs(output.outputs[0]),
                }
                for output in outputs
            ],
        }

    async def take(self, message: LeaseMessage, peer: Peer) -> dict[str, Any]:
        """Let a run have the server, or keep it; it then is the only one that may send weights.

        Raises:
            RefusedError: another run has it; says which.
        """
        lease, now = self._lease, time.monotonic()
        if lease is not None and lease.sender != message.sender:
            silent = now - lease.heard
            if silent < LEASE_SECONDS or self._loop.is_sampling:
                raise RefusedError(
                    f"another run has this server: {lease.who}, heard of {silent:.0f} s ago; one "
                    f"run at a time, until it ended or was silent for {LEASE_SECONDS:g} s"
                )
        self._lease = _Lease(message.sender, message.who, now)
        return {}

    async def release(self, message: SenderMessage, peer: Peer) -> dict[str, Any]:
        """The run that has the server is done with it."""
        self._check_sender(message)
        self._lease = None
        return {}

    async def open(self, message: TcpMessage | NcclMessage, peer: Peer) -> dict[str, Any]:
        """Let a trainer's rank 0 meet the workers, at no address but the one that asks."""
        if message.backend != self._info["backend"]:
            raise InvalidError(
                f"backend: got {message.backend}, wanted this server's {self._info['backend']}"
            )
        meeting = unpack_meeting(message, peer.address)

        def open_channel(llm: Any) -> None:
            self._drop_weights()
            self._met = None
            llm.collective_rpc("care_open", args=(meeting,))
            self._met = message.sender

        return await self._of_owner(message, open_channel)

    async def begin(self, message: SenderMessage, peer: Peer) -> dict[str, Any]:
        """New weights are coming: nothing is sampled until they are whole."""

        def begin(llm: Any) -> None:
            self._drop_weights()
            # What the workers hold of another run's must not pass for a part of this one's.
            if self._met != message.sender:
                raise RefusedError("weight sync: the server's workers have not met this trainer")
            llm.collective_rpc("care_begin")
            self._is_receiving = True

        return await self._of_owner(message, begin)

    async def bucket(self, message: BucketMessage, peer: Peer) -> dict[str, Any]:
        """Take the bucket that the trainer broadcasts meanwhile."""

        def receive(llm: Any) -> None:
            arguments = (message.tensors, message.num_bytes)
            self._stop_receiving()
            _check_sync(llm.collective_rpc("care_receive", args=arguments))
            self._is_receiving = True

        return await self._of_owner(message, receive)

    async def end(self, message: SenderMessage, peer: Peer) -> dict[str, Any]:
        """Compare what the workers hold with what was sent; then the weights count.

        Returns:
            The version by which batches name them.
        """
        version = secrets.token_hex(16)

        def check(llm: Any) -> None:
            self._stop_receiving()
            failures = llm.collective_rpc("care_failures")
            _check_sync([failure for worker in failures for failure in worker])
            reset_caches(llm)
            self._loop.adopt_weights(version)

        return await self._of_owner(message, check) | {"version": version}

    async def _of_owner(
        self, message: SenderMessage, work: Callable[[Any], None]
    ) -> dict[str, Any]:
        """`work(llm)` on the engine's thread, if the run has the server then."""

        def checked(llm: Any) -> None:
            self._check_sender(message)
            work(llm)

        await asyncio.wrap_future(self._loop.call(checked))
        return {}

    def _check_sender(self, message: SenderMessage) -> None:
        lease = self._lease
        if lease is None or lease.sender != message.sender:
            owner = "nobody" if lease is None else lease.who
            raise RefusedError(f"{owner} has this server, not this run: one run at a time")

    def _drop_weights(self) -> None:
        self._is_receiving = False
        self._loop.drop_weights("new weights came before it was done")

    def _stop_receiving(self) -> None:
        """Unless all goes well, the next thing has to be a new sync."""
        if not self._is_receiving:
            raise RefusedError("weight sync: got a part of one, wanted its beginning first")
        self._is_receiving = False

    async def _wait(self, batch: Batch, peer: Peer) -> list[Any]:
        """The outputs; a batch nobody waits for is given up."""
        result = asyncio.wrap_future(batch.result)
        while not result.done():
            await asyncio.wait([result], timeout=_ASK_SECONDS)
            if not result.done() and await peer.is_gone():
                self._loop.abort(batch, "its trainer went away")
        return result.result()


def _check_sync(problems: Sequence[str | None]) -> None:
    for problem in problems:
        if problem is not None:
            raise RefusedError(f"weight sync: {problem}")


def build_app(
    server: RolloutServer, token: str, host: str, allowed_hosts: Sequence[str] = ()
) -> Guard:
    """The ASGI application.

    Args:
        server: what answers.
        token: what every request must bear.
        host: where the application is served.
        allowed_hosts: more names that it may be called by.
    """
    from fastapi import FastAPI, Request, Response

    app = FastAPI(title="care-train serve", docs_url=None, redoc_url=None, openapi_url=None)

    def route(
        path: str, handler: Handler, kind: Any = None, max_bytes: int = _MAX_MESSAGE_BYTES
    ) -> None:
        adapter = None if kind is None else TypeAdapter(kind)

        async def endpoint(request: Request) -> Response:
            assert request.client is not None
            try:
                content = await _body(request, max_bytes)
                message = adapter and await asyncio.to_thread(parse, adapter, content)
                answer = await handler(message, Peer(request.client.host, request.is_disconnected))
                status = 200
            except RequestError as error:
                answer, status = {"error": str(error)}, error.status
            # Not JSONResponse: log-probs of broken weights are NaN, which it does not write.
            return Response(json.dumps(answer), status, media_type="application/json")

        app.add_api_route(path, endpoint, methods=["POST" if kind else "GET"])

    route("/info", server.info)
    route("/lease", server.take, LeaseMessage)
    route("/release", server.release, SenderMessage)
    route("/generate", server.generate, GenerateMessage, _MAX_BATCH_BYTES)
    route("/weights/open", server.open, OpenMessage)
    route("/weights/begin", server.begin, SenderMessage)
    route("/weights/bucket", server.bucket, BucketMessage)
    route("/weights/end", server.end, SenderMessage)
    return Guard(app, token, host, allowed_hosts)


async def _body(request: Any, max_bytes: int) -> bytes:
    """A request's content.

    Raises:
        InvalidError: it is larger, slower, or its sender left.
    """
    from starlette.requests import ClientDisconnect

    content = bytearray()
    try:
        async with asyncio.timeout(_BODY_SECONDS):
            async for chunk in request.stream():
                content += chunk
                if len(content) > max_bytes:
                    raise TooLargeError(
                        f"got a message of more than {max_bytes} bytes: send fewer sequences at "
                        "once (rollout.batch_size, eval.batch_size)"
                    )
    except TimeoutError:
        raise InvalidError(f"the message was not there after {_BODY_SECONDS:g} s") from None
    except ClientDisconnect:
        raise InvalidError("the message broke off") from None
    return bytes(content)
