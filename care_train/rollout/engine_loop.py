"""vLLM in a server, driven by one thread: its requests, its weights' version, and its end."""

import queue
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from care_train.rollout.engine import Value
from care_train.rollout.errors import RolloutError
from care_train.rollout.server_messages import RequestError
from care_train.rollout.weight_sync import check_sync


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
    ids: list[str] = field(default_factory=list)
    """vLLM's internal ones, which end in a suffix that makes them unique."""
    outputs: dict[str, Any] = field(default_factory=dict)
    """Those that are done, by their ids without the suffix, as vLLM's outputs have them."""

    @property
    def names(self) -> list[str]:
        """The ids without the suffix."""
        return [name.partition("-")[0] for name in self.ids]


class EngineLoop:
    """Steps vLLM while there is work; every use of it runs on this one thread."""

    def __init__(self, start: Callable[[], Any], on_death: Callable[[], None]) -> None:
        """Drive the `LLM` without weights that `start` makes; `on_death` is called once if it or
        one of its workers fails."""
        self._on_death = on_death
        self._work: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._is_step_due = False
        self._version: str | None = None
        self._lora: Any = None
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
        """Within `call`: say which weights vLLM holds, whole and checked; None: none.

        Batches that are not done are given up. `lora` is vLLM's `LoRARequest` of the adapter among
        the weights, if there is one.
        """
        for batch in set(self.running.values()):
            self._abort(batch, "new weights came before it was done")
        self._version, self._lora = version, lora

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
        if self._version is None or batch.version != self._version:
            raise RequestError(
                409,
                "its weights are not those of this run: wanted a weight sync first (the server was "
                "restarted, or another run uses it)",
            )
        batch.ids = self._llm.enqueue(
            batch.prompts, batch.parameters, lora_request=self._lora, use_tqdm=False
        )
        self.running |= dict.fromkeys(batch.names, batch)
        self._step_next()

    def _abort(self, batch: Batch, reason: str) -> None:
        if batch.result.done():
            return
        self._llm.llm_engine.abort_request(batch.ids, internal=True)
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
            if len(batch.outputs) == len(batch.ids):
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
