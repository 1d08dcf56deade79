"""`care-train serve`: starts an empty vLLM for the run of a configuration, and answers for it over
HTTP until a signal. The run sends the weights, so it need not be started before."""

import asyncio
import os
import signal
import socket
import sys
import tempfile
from collections.abc import Awaitable, Callable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch

from care_train.config import Config
from care_train.data import load_samples
from care_train.models.load import load_without_weights
from care_train.models.tiny import model_folder
from care_train.rollout.server import EngineLoop, RolloutServer
from care_train.rollout.server_access import Guard, server_token
from care_train.rollout.server_messages import (
    Begin,
    Bucket,
    Generate,
    Message,
    OfSender,
    RequestError,
    ServerInfo,
    TakeLease,
    parse,
    server_identity,
)
from care_train.rollout.vllm_process import VllmSetup, start_vllm
from care_train.rollout.weight_sync import backend_for

_GRACE_SECONDS = 5
"""What running answers get when the server is told to end."""

_BODY_SECONDS = 120.0
"""How long a message may take to arrive."""

_MAX_BUCKET_BYTES = 1 << 35
"""More than any one tensor in base64: an embedding of 256k tokens by 16k in float32 has 2^34."""

_MAX_BATCH_BYTES = 1 << 30
_MAX_MESSAGE_BYTES = 16 << 20


def serve(config: Config, host: str, port: int, allowed_hosts: Sequence[str] = ()) -> bool:
    """Serve until SIGTERM or Ctrl-C; whether vLLM was well to the end.

    Args:
        config: the run's.
        host: address to listen at.
        port: 0 takes a free one.
        allowed_hosts: more names that runs may call the server by.

    Raises:
        ValueError: no model at `model.path`, no vLLM, no token, or the port is taken.
    """
    with ExitStack() as stack:
        temporary = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="care-serve-")))
        # A tiny model is the one that `quickstart` makes under the same settings.
        rows = (
            row
            for data in (config.sft.data, config.data)
            for row in load_samples(data, config.seed)
        )
        loaded = load_without_weights(config.model, model_folder(config, temporary / "model", rows))
        setup = VllmSetup.of(config, loaded)
        backend = backend_for(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
        # Port and token first: vLLM takes long to start.
        listening = stack.enter_context(_listen(host, port))
        name = socket.gethostname() if host in ("0.0.0.0", "::", "") else host
        url = f"http://{name}:{listening.getsockname()[1]}"
        token = stack.enter_context(server_token(url))
        assert token.value is not None
        num_workers = setup.settings.tensor_parallel_size
        executor = "uni" if num_workers == 1 else "mp"
        start = partial(start_vllm, loaded, str(temporary / "vllm"), setup, executor)
        loop = EngineLoop(start, on_death=lambda: os.kill(os.getpid(), signal.SIGTERM))
        identity = server_identity(loaded, setup.lora_rank, backend)
        info = ServerInfo(identity=identity, max_context=setup.max_context, num_workers=num_workers)
        server = RolloutServer(loop, info, loaded)
        print(
            f"serving {config.model.path} at {url}\n"
            f"  train with rollout.engine=vllm rollout.vllm.server={url}\n"
            f"  token in {token.source}; for runs of other users or machines see docs/rollouts.md",
            file=sys.stderr,
            flush=True,
        )
        # Between GPUs no request carries weights.
        bucket_bytes = _MAX_BUCKET_BYTES if backend == "http" else _MAX_MESSAGE_BYTES
        app = Guard(_routes(server, bucket_bytes), token.value, host, allowed_hosts)
        _answer_until_told(app, listening)
        return loop.failure is None


def _listen(host: str, port: int) -> socket.socket:
    try:
        return socket.create_server((host, port))
    except OSError as error:
        raise ValueError(f"--host, --port: cannot listen at {host}:{port}: {error}") from None


def _routes(server: RolloutServer, max_bucket_bytes: int) -> Any:
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
        route("/weights/begin", server.begin, Begin),
        route("/weights/bucket", server.bucket, Bucket, max_bucket_bytes),
        route("/weights/end", server.end, OfSender),
    ]
    return Starlette(routes=routes, exception_handlers={RequestError: refuse})


async def _body(request: Any, max_bytes: int) -> bytes:
    """A request's content; `RequestError` if it is larger, slower, or its sender left."""
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


def _answer_until_told(app: Guard, listening: socket.socket) -> None:
    import uvicorn

    web = uvicorn.Server(
        uvicorn.Config(
            app,
            log_level="error",
            timeout_graceful_shutdown=_GRACE_SECONDS,
            ws="none",
        )
    )
    # uvicorn raises the signal that it caught once more; to end as asked is no failure.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)
    web.run(sockets=[listening])
