"""The HTTP side of `care-train serve`: batches in, samples out; weights in, a verdict out."""

import asyncio
import json
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import Future
from typing import Any

from care_train.rollout.adapter_sync import adapter_request
from care_train.rollout.server_engine import AbortedError, Batch, EngineDeadError, EngineLoop
from care_train.rollout.server_messages import pack_expansions, unpack_prompts
from care_train.rollout.types import SamplingSettings
from care_train.rollout.vllm_inputs import sampled_log_probs, sampling_parameters
from care_train.rollout.weight_sync import reset_caches

_ASK_SECONDS = 1.0
"""How often a running batch asks whether its trainer is still there."""


class RefusedError(Exception):
    """A request that does not fit the server's state; the message is for the trainer."""


class RolloutServer:
    """What the routes do; one asyncio thread runs them all."""

    def __init__(self, loop: EngineLoop, info: dict[str, Any]) -> None:
        """Serve what `loop` drives.

        Args:
            loop: vLLM, empty.
            info: what `/info` tells: the model's identity and limits.
        """
        self._loop = loop
        self._info = info
        self._sender: str | None = None
        self._version: str | None = None

    async def info(self, message: Any, is_gone: Any) -> dict[str, Any]:
        """The model, its limits, and whose weights it has."""
        return self._info | {"version": self._version}

    async def generate(
        self, message: dict[str, Any], is_gone: Callable[[], Awaitable[bool]]
    ) -> dict[str, Any]:
        """Sample one batch with the weights that its trainer sent last."""
        if self._version is None or message["version"] != self._version:
            raise RefusedError(
                "its weights are not those of this run: wanted a weight sync first (the server was "
                "restarted, or another run uses it)"
            )
        prompts = await asyncio.to_thread(unpack_prompts, message)
        sampling = SamplingSettings(**message["sampling"])
        parameters = [
            sampling_parameters(sampling, request["seed"], message["eos_ids"])
            for request in message["requests"]
        ]
        lora = adapter_request() if self._info["lora_rank"] else None
        batch = Batch(prompts, parameters, lora)
        self._loop.generate(batch)
        outputs = await self._wait(batch, is_gone)
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

    async def open(self, message: dict[str, Any], is_gone: Any) -> dict[str, Any]:
        """Let a trainer's rank 0 meet the workers; it then is the only one that may send."""
        await self._forget(message["sender"])
        place = (message["backend"], message["host"], message["port"], message["timeout"])
        await self._call("care_open", place)
        return {}

    async def begin(self, message: dict[str, Any], is_gone: Any) -> dict[str, Any]:
        """New weights are coming: nothing is sampled until they are whole."""
        self._check_sender(message)
        await self._forget(message["sender"])
        await self._call("care_begin", ())
        return {}

    async def bucket(self, message: dict[str, Any], is_gone: Any) -> dict[str, Any]:
        """Take the bucket that the trainer broadcasts meanwhile."""
        self._check_sender(message)
        _check_sync(await self._call("care_receive", (message["tensors"], message["num_bytes"])))
        return {}

    async def end(self, message: dict[str, Any], is_gone: Any) -> dict[str, Any]:
        """Compare what the workers hold with what was sent; then the weights count."""
        self._check_sender(message)
        failures = await self._call("care_failures", ())
        _check_sync([failure for worker in failures for failure in worker])
        await asyncio.wrap_future(self._loop.call(reset_caches))
        self._version = message["version"]
        return {}

    async def _forget(self, sender: str) -> None:
        self._sender, self._version = sender, None
        await asyncio.wrap_future(self._loop.abort_all("new weights came before it was done"))

    async def _call(self, method: str, arguments: tuple[Any, ...]) -> list[Any]:
        future: Future[Any] = self._loop.call(
            lambda llm: llm.collective_rpc(method, args=arguments)
        )
        return await asyncio.wrap_future(future)

    async def _wait(self, batch: Batch, is_gone: Callable[[], Awaitable[bool]]) -> list[Any]:
        """The outputs; a batch nobody waits for is given up."""
        result = asyncio.wrap_future(batch.result)
        while not result.done():
            await asyncio.wait([result], timeout=_ASK_SECONDS)
            if not result.done() and await is_gone():
                self._loop.abort(batch, "its trainer went away")
        return result.result()

    def _check_sender(self, message: dict[str, Any]) -> None:
        if message["sender"] != self._sender:
            raise RefusedError("another run has taken this server over: one run at a time")


def _check_sync(problems: Sequence[str | None]) -> None:
    for problem in problems:
        if problem is not None:
            raise RefusedError(f"weight sync: {problem}")


def build_app(server: RolloutServer) -> Any:
    """The FastAPI application."""
    from fastapi import FastAPI, Request, Response

    app = FastAPI(title="care-train serve", docs_url=None, redoc_url=None, openapi_url=None)

    def route(method: str, path: str, handler: Callable[..., Awaitable[Any]]) -> None:
        async def endpoint(request: Request) -> Response:
            content = await request.body()
            try:
                message = json.loads(content) if content else None
                answer, status = await handler(message, request.is_disconnected), 200
            except (RefusedError, AbortedError) as error:
                answer, status = {"error": str(error)}, 409
            except EngineDeadError as error:
                answer, status = {"error": str(error)}, 503
            # vLLM refuses a request, or a worker failed: the trainer must hear why.
            except Exception as error:
                answer, status = {"error": f"{type(error).__name__}: {error}"}, 500
            # Not JSONResponse: log-probs of broken weights are NaN, which it does not write.
            return Response(json.dumps(answer), status, media_type="application/json")

        app.add_api_route(path, endpoint, methods=[method])

    route("GET", "/info", server.info)
    route("POST", "/generate", server.generate)
    route("POST", "/weights/open", server.open)
    route("POST", "/weights/begin", server.begin)
    route("POST", "/weights/bucket", server.bucket)
    route("POST", "/weights/end", server.end)
    return app
