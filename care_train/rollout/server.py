"""What a `care-train serve` does: one thread drives vLLM, one run at a time has the server.

The run with the lease reports every few seconds that it is alive, and alone may send weights. No
other run gets the lease before it has been silent for a while and nothing is sampled for it.

Requests of all trainer ranks share vLLM's batches. vLLM's thread alone decides which weights there
are: a batch enters vLLM only under the version of the weights that vLLM then holds, and is given up
before they change, so no answer was sampled from other weights than its run asked for.
"""

import asyncio
import queue
import secrets
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from care_train.models.load import LoadedModel
from care_train.rollout.engine import Value
from care_train.rollout.errors import RolloutError
from care_train.rollout.server_messages import (
    Begin,
    Bucket,
    Done,
    Generate,
    Generated,
    OfSender,
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


@dataclass(eq=False)
class Batch:
    """Requests that came together and are answered together."""

    version: str | None
    """Of the weights to sample from."""
    prompts: Sequence[Any]
    """What `LLM.enqueue` takes, one per request."""
    parameters: Sequence[Any]
    """vLLM's `SamplingParams`, one per request."""
    result: Future[list[Any]] = field(default_factory=Future)
    """vLLM's outputs in order."""
    names: list[str] = field(default_factory=list)
    """vLLM's, one per request."""
    outputs: dict[str, Any] = field(default_factory=dict)
    """Those that are done, by name."""


class EngineLoop:
    """Steps vLLM while there is work; every use of it runs on this one thread."""

    def __init__(self, start: Callable[[], Any], on_death: Callable[[], None]) -> None:
        """Drive the `LLM` without weights that `start` makes; `on_death` is called once if it or
        one of its workers fails."""
        self._on_death = on_death
        self._work: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._is_step_due = False
        self._lora: Any = None
        self.version: str | None = None
        """Of the weights that vLLM holds, whole and checked. Used on the thread."""
        self.running: dict[str, Batch] = {}
        """The batches that are being sampled, by vLLM's name of each of their requests."""
        self.failure: RequestError | None = None
        """Why vLLM can do nothing more."""
        started: Future[Any] = Future()
        threading.Thread(target=self._run, args=(start, started), name="vllm", daemon=True).start()
        self._llm = started.result()
        # A worker may die while nothing is sampled.
        self._llm.llm_engine.model_executor.register_failure_callback(
            lambda: self._work.put(lambda: self._fail("a worker process died"))
        )

    def call(self, function: Callable[[Any], Value]) -> Future[Value]:
        """Run `function(llm)` between two steps; what it raises becomes a `RequestError`."""
        result: Future[Value] = Future()

        def work() -> None:
            # From here on, nobody can cancel the future: setting its result below would then raise
            # and end this thread.
            if not result.set_running_or_notify_cancel():
                return
            try:
                if self.failure is not None:
                    raise self.failure
                result.set_result(function(self._llm))
            except RequestError as error:
                result.set_exception(error)
            except RolloutError as error:
                result.set_exception(self._failed(RequestError(409, str(error))))
            # vLLM and its workers raise whatever they like.
            except Exception as error:
                problem = f"vLLM: {type(error).__name__}: {error}"
                result.set_exception(self._failed(RequestError(500, problem)))

        self._work.put(work)
        return result

    def _failed(self, error: RequestError) -> RequestError:
        """What to answer after a call that failed: vLLM goes on, unless a worker has lost its GPU,
        whose every later call would fail too. Then the server ends, as after a failed step."""
        try:
            check_sync(self._llm.collective_rpc("care_check_device"))
        # A worker that cannot be asked is of no more use.
        except Exception as lost:
            self._fail(f"{error} ({lost})")
        return self.failure or error

    def generate(self, batch: Batch) -> Future[None]:
        """Start a batch; `batch.result` gets vLLM's outputs once they are done.

        All its requests enter vLLM between two steps, so a run's batches are made up alike every
        time. It is a `RequestError` if vLLM then has other weights than the batch's.
        """
        return self.call(lambda llm: self._add(batch))

    def abort(self, batch: Batch, reason: str) -> None:
        """Give up a batch that is not done."""
        self.call(lambda llm: self._abort(batch, reason))

    def hold_weights(self, version: str | None, lora: Any = None) -> None:
        """Within `call`: say which `version` of the weights vLLM holds; None: none.

        Batches that are not done are given up. `lora` is vLLM's `LoRARequest` of the adapter among
        the weights, if there is one.
        """
        for batch in set(self.running.values()):
            self._abort(batch, "new weights came before it was done")
        self.version, self._lora = version, lora

    def _run(self, start: Callable[[], Any], started: Future[Any]) -> None:
        # vLLM keeps the CUDA stream of the thread that starts it, and would copy tokens from there
        # before another thread's stream has sampled them.
        try:
            started.set_result(start())
        except BaseException as error:
            started.set_exception(error)
            return
        while True:
            self._work.get()()

    def _add(self, batch: Batch) -> None:
        if self.version is None or batch.version != self.version:
            raise RequestError(
                409,
                "its weights are not those of this run: wanted a weight sync first (the server was "
                "restarted, or another run uses it)",
            )
        ids = self._llm.enqueue(
            batch.prompts, batch.parameters, lora_request=self._lora, use_tqdm=False
        )
        # Without the suffix of vLLM's internal ids, which its outputs do not have.
        batch.names = [name.partition("-")[0] for name in ids]
        self.running |= dict.fromkeys(batch.names, batch)
        self._step_next()

    def _abort(self, batch: Batch, reason: str) -> None:
        if batch.result.done():
            return
        self._llm.llm_engine.abort_request(batch.names)
        for name in batch.names:
            self.running.pop(name, None)
        batch.result.set_exception(RequestError(409, reason))

    def _step_next(self) -> None:
        """After the calls that wait already, so that these come between two steps."""
        if self.running and not self._is_step_due:
            self._is_step_due = True
            self._work.put(self._step)

    def _step(self) -> None:
        self._is_step_due = False
        try:
            outputs = self._llm.llm_engine.step()
        except Exception as error:
            self._fail(f"{type(error).__name__}: {error}")
            return
        for output in outputs:
            batch = self.running.get(output.request_id)
            if batch is None or not output.finished:
                continue
            del self.running[output.request_id]
            batch.outputs[output.request_id] = output
            if len(batch.outputs) == len(batch.names):
                batch.result.set_result([batch.outputs[name] for name in batch.names])
        self._step_next()

    def _fail(self, problem: str) -> None:
        """Everyone who waits for an answer hears of it, and the server ends."""
        if self.failure is not None:
            return
        self.failure = RequestError(503, f"vLLM failed: {problem}")
        for batch in set(self.running.values()):
            batch.result.set_exception(self.failure)
        self.running = {}
        self._on_death()


class RolloutServer:
    """What the routes do. One asyncio thread runs them; what concerns weights happens on vLLM's
    thread, where the lease is checked again."""

    def __init__(self, loop: EngineLoop, info: ServerInfo, loaded: LoadedModel) -> None:
        """Serve `loaded`, a model without weights, whose empty vLLM `loop` drives."""
        self._loop, self._info, self._loaded = loop, info, loaded
        self._lease: TakeLease | None = None
        self._heard = 0.0
        """`time.monotonic` when the run with the lease last reported that it is alive."""
        # The next three are used on vLLM's thread alone.
        self._met: str | None = None
        """The sender whose NCCL group the workers are in."""
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

    async def begin(self, message: Begin, request: Any) -> Done:
        """Begin a weight sync: nothing is sampled until the new weights are whole."""

        def begin(llm: Any) -> None:
            # Otherwise what the workers still hold of another run could pass for this run's.
            keeps_base = message.version is not None and message.version == self._loop.version
            self._is_receiving = False
            self._loop.hold_weights(None)
            if message.unique_id is not None:
                self._met = message.sender
                check_sync(llm.collective_rpc("care_open", args=(message.unique_id,)))
            elif self._met not in (None, message.sender):
                raise RequestError(409, "weight sync: the server's workers met another trainer")
            llm.collective_rpc("care_begin", args=(keeps_base,))
            self._is_receiving, self._has_adapter = True, False

        return await self._on_engine(message, begin)

    async def bucket(self, message: Bucket, request: Any) -> Done:
        """Take some of the sync's tensors."""

        def receive(llm: Any) -> None:
            self._stop_receiving()
            arguments = (message.tensors, message.content)
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

    def _stop_receiving(self) -> None:
        """A sync goes on only if its next part succeeds; otherwise a new one has to begin."""
        if not self._is_receiving:
            raise RequestError(409, "weight sync: got a part of one, wanted its beginning first")
        self._is_receiving = False
