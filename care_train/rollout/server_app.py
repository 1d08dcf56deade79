"""The routes of `care-train serve`: batches in, samples out; weights in, a verdict out.

One run at a time has the server: the one that holds the lease. It reports every few seconds that it
is alive. No other run gets the lease before it has been silent for a while and nothing is sampled
for it any longer, and only the run with the lease may send weights.
"""

import asyncio
import secrets
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

from care_train.rollout.server_access import Guard
from care_train.rollout.server_loop import Batch, EngineLoop
from care_train.rollout.server_messages import (
    Bucket,
    Done,
    Generate,
    Generated,
    Message,
    OfSender,
    OpenChannel,
    PromptLimits,
    RequestError,
    ServerInfo,
    TakeLease,
    expansions,
    parse,
    unpack_batch,
)
from care_train.rollout.vllm_engine import adapter_request, completion_of, sampling_parameters
from care_train.rollout.weight_sync import check_sync, finish_sync

LEASE_SECONDS = 30.0
"""How long a silent run is taken to be alive."""

_POLL_SECONDS = 1.0
"""How often the server checks whether the trainer of a running batch is still connected."""

_BODY_SECONDS = 120.0
"""How long a message may take to arrive."""

_MAX_BATCH_BYTES = 1 << 30
_MAX_MESSAGE_BYTES = 16 << 20


@dataclass(frozen=True)
class _Lease:
    """Which run has the server."""

    sender: str
    who: str
    heard: float
    """`time.monotonic` when it last reported that it is alive."""


class RolloutServer:
    """What the routes do. One asyncio thread runs them; what concerns weights happens on vLLM's
    thread, where the lease is checked again."""

    def __init__(self, loop: EngineLoop, info: ServerInfo, limits: PromptLimits) -> None:
        """Serve what `loop` drives.

        Args:
            loop: vLLM, empty.
            info: what runs are told.
            limits: what prompts may be.
        """
        self._loop = loop
        self._info = info
        self._limits = limits
        self._lease: _Lease | None = None
        # The next two are used on vLLM's thread alone.
        self._met: str | None = None
        """The sender whose channel the workers joined last."""
        self._is_receiving = False
        """A sync has begun, and has neither failed nor ended."""

    async def info(self, message: None, request: Any) -> ServerInfo:
        """The model and its limits."""
        return self._info

    async def generate(self, message: Generate, request: Any) -> Generated:
        """Sample one batch from the weights that its trainer sent last."""
        prompts = await asyncio.to_thread(unpack_batch, message, self._limits)
        parameters = [
            sampling_parameters(message.sampling, packed.seed, message.eos_ids)
            for packed in message.requests
        ]
        lora = adapter_request() if self._info.lora_rank else None
        batch = Batch(message.version, prompts, parameters, lora)
        self._loop.generate(batch)
        result = asyncio.wrap_future(batch.result)
        while not result.done():
            await asyncio.wait([result], timeout=_POLL_SECONDS)
            if not result.done() and await request.is_disconnected():
                self._loop.abort(batch, "its trainer went away")
        outputs = result.result()
        return Generated(
            expanded=expansions(message, [output.prompt_token_ids for output in outputs]),
            completions=tuple(completion_of(o.outputs[0], message.eos_ids) for o in outputs),
        )

    async def take(self, message: TakeLease, request: Any) -> Done:
        """Give a run the lease, or extend it.

        Raises:
            RequestError: another run has it; says which.
        """
        lease, now = self._lease, time.monotonic()
        if lease is not None and lease.sender != message.sender:
            silent = now - lease.heard
            if silent < LEASE_SECONDS or self._loop.is_sampling:
                raise RequestError(
                    409,
                    f"another run has this server: {lease.who}, heard of {silent:.0f} s ago; one "
                    f"run at a time, until it ended or was silent for {LEASE_SECONDS:g} s",
                )
        self._lease = _Lease(message.sender, message.who, now)
        return Done()

    async def release(self, message: OfSender, request: Any) -> Done:
        """End the lease."""
        self._check_sender(message)
        self._lease = None
        return Done()

    async def open(self, message: OpenChannel, request: Any) -> Done:
        """Let the workers join a channel, at no other address than the request's own."""
        if message.call.backend != self._info.backend:
            got, wanted = message.call.backend, self._info.backend
            raise RequestError(422, f"backend: got {got}, wanted this server's {wanted}")

        def join_channel(llm: Any) -> None:
            self._drop_weights()
            self._met = None
            llm.collective_rpc("care_open", args=(message.call, request.client.host))
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
            self._is_receiving = True

        return await self._on_engine(message, begin)

    async def bucket(self, message: Bucket, request: Any) -> Done:
        """Take the bucket that the trainer broadcasts meanwhile."""

        def receive(llm: Any) -> None:
            self._stop_receiving()
            arguments = (message.tensors, message.num_bytes)
            check_sync(llm.collective_rpc("care_receive", args=arguments))
            self._is_receiving = True

        return await self._on_engine(message, receive)

    async def end(self, message: OfSender, request: Any) -> Done:
        """Compare what the workers hold with what was sent; then the weights have a version."""
        version = secrets.token_hex(16)

        def check(llm: Any) -> None:
            self._stop_receiving()
            finish_sync(llm)
            self._loop.adopt_weights(version)

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
        self._loop.drop_weights("new weights came before it was done")

    def _stop_receiving(self) -> None:
        """A sync goes on only if its next part succeeds; otherwise a new one has to begin."""
        if not self._is_receiving:
            raise RequestError(409, "weight sync: got a part of one, wanted its beginning first")
        self._is_receiving = False


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
    from starlette.applications import Starlette
    from starlette.responses import JSONResponse, Response
    from starlette.routing import Route

    def route(
        path: str,
        handler: Callable[[Any, Any], Awaitable[Message]],
        kind: type[Message] | None = None,
        max_bytes: int = _MAX_MESSAGE_BYTES,
    ) -> Route:
        async def endpoint(request: Any) -> Response:
            content = await _body(request, max_bytes)
            message = kind and await asyncio.to_thread(parse, kind, content)
            answer = await handler(message, request)
            return Response(answer.model_dump_json(), media_type="application/json")

        return Route(path, endpoint, methods=["POST" if kind else "GET"])

    async def refuse(request: Any, error: Any) -> Response:
        return JSONResponse({"error": str(error)}, error.status)

    routes = [
        route("/info", server.info),
        route("/lease", server.take, TakeLease),
        route("/release", server.release, OfSender),
        route("/generate", server.generate, Generate, _MAX_BATCH_BYTES),
        route("/weights/open", server.open, OpenChannel),
        route("/weights/begin", server.begin, OfSender),
        route("/weights/bucket", server.bucket, Bucket),
        route("/weights/end", server.end, OfSender),
    ]
    app: Any = Starlette(routes=routes, exception_handlers={RequestError: refuse})
    return Guard(app, token, host, allowed_hosts)


async def _body(request: Any, max_bytes: int) -> bytes:
    """A request's content.

    Raises:
        RequestError: it is larger, slower, or its sender left.
    """
    from starlette.requests import ClientDisconnect

    content = bytearray()
    try:
        async with asyncio.timeout(_BODY_SECONDS):
            async for chunk in request.stream():
                content += chunk
                if len(content) > max_bytes:
                    raise RequestError(
                        413,
                        f"got a message of more than {max_bytes} bytes: send fewer sequences at "
                        "once (rollout.batch_size)",
                    )
    except TimeoutError:
        raise RequestError(422, f"the message was not there after {_BODY_SECONDS:g} s") from None
    except ClientDisconnect:
        raise RequestError(422, "the message broke off") from None
    return bytes(content)
