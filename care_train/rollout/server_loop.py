"""vLLM in a server: one thread drives it, and requests of all trainer ranks share its batches.

The same thread alone decides which weights there are. A batch enters vLLM only under the version
of the weights that vLLM then holds, and is given up before they change, so no answer was sampled
from other weights than its run asked for.
"""

import queue
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

from care_train.rollout.errors import RolloutError
from care_train.rollout.server_messages import RequestError


class Batch:
    """Requests that came together and are answered together."""

    def __init__(
        self,
        version: str | None,
        prompts: Sequence[Any],
        parameters: Sequence[Any],
        lora: Any = None,
    ) -> None:
        """
        Args:
            version: of the weights to sample from.
            prompts: what `LLM.enqueue` takes, one per request.
            parameters: vLLM's `SamplingParams`, one per request.
            lora: vLLM's `LoRARequest`, if any.
        """
        self.version = version
        self.prompts = prompts
        self.parameters = parameters
        self.lora = lora
        self.result: Future[list[Any]] = Future()
        self.ids: list[str] = []
        """vLLM's internal ones, which end in a suffix that makes them unique."""
        self.outputs: dict[str, Any] = {}

    @property
    def names(self) -> list[str]:
        """The ids without the suffix, as vLLM's outputs have them."""
        return [name.partition("-")[0] for name in self.ids]


class EngineLoop:
    """Steps vLLM while there is work; every use of it runs on this one thread."""

    def __init__(self, llm: Any, on_death: Callable[[], None]) -> None:
        """Start the thread.

        Args:
            llm: vLLM's `LLM`, without weights.
            on_death: called once if vLLM fails.
        """
        self._llm = llm
        self._on_death = on_death
        self._commands: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._running: dict[str, Batch] = {}
        self._version: str | None = None
        self._failure: RequestError | None = None
        self._thread = threading.Thread(target=self._run, name="vllm", daemon=True)
        self._thread.start()

    @property
    def is_sampling(self) -> bool:
        """Whether a batch is being sampled."""
        return bool(self._running)

    def generate(self, batch: Batch) -> None:
        """Start a batch; `batch.result` gets vLLM's outputs in order.

        All its requests enter vLLM between two steps, so a run's batches are made up alike every
        time. The result is a `RequestError` where vLLM then has other weights than the batch's.
        """
        self._submit(batch.result, lambda: self._add(batch))

    def call(self, function: Callable[[Any], Any]) -> Future[Any]:
        """Run `function(llm)` between two steps."""
        result: Future[Any] = Future()
        self._submit(result, lambda: result.set_result(function(self._llm)))
        return result

    def abort(self, batch: Batch, reason: str) -> None:
        """Give up a batch that is not done."""
        self._submit(Future(), lambda: self._abort(batch, reason))

    def drop_weights(self, reason: str) -> None:
        """Within `call`: sample nothing from now on, and give up the batches that are not done."""
        assert threading.current_thread() is self._thread
        self._version = None
        for batch in set(self._running.values()):
            self._abort(batch, reason)

    def adopt_weights(self, version: str) -> None:
        """Within `call`: vLLM now holds these weights, whole and checked."""
        assert threading.current_thread() is self._thread
        assert not self._running
        self._version = version

    def _submit(self, result: Future[Any], command: Callable[[], None]) -> None:
        def guarded() -> None:
            # From here on, nobody can cancel the future: setting its result below would then raise
            # and end this thread.
            if not result.set_running_or_notify_cancel():
                return
            try:
                if self._failure is not None:
                    raise self._failure
                command()
            except RequestError as error:
                result.set_exception(error)
            except RolloutError as error:
                result.set_exception(RequestError(409, str(error)))
            # vLLM and its workers raise whatever they like. vLLM goes on.
            except Exception as error:
                problem = f"vLLM: {type(error).__name__}: {error}"
                result.set_exception(RequestError(500, problem))

        self._commands.put(guarded)

    def _add(self, batch: Batch) -> None:
        if self._version is None or batch.version != self._version:
            raise RequestError(
                409,
                "its weights are not those of this run: wanted a weight sync first (the server was "
                "restarted, or another run uses it)",
            )
        batch.ids = self._llm.enqueue(
            batch.prompts, batch.parameters, lora_request=batch.lora, use_tqdm=False
        )
        self._running |= dict.fromkeys(batch.names, batch)

    def _abort(self, batch: Batch, reason: str) -> None:
        if batch.result.done():
            return
        self._llm.llm_engine.abort_request(batch.ids, internal=True)
        self._forget(batch)
        batch.result.set_exception(RequestError(409, reason))

    def _forget(self, batch: Batch) -> None:
        for name in batch.names:
            self._running.pop(name, None)

    def _run(self) -> None:
        while True:
            # Wait for a command where vLLM has nothing to do.
            if not self._running:
                self._commands.get()()
            while not self._commands.empty():
                self._commands.get()()
            if self._running and self._failure is None:
                self._step()

    def _step(self) -> None:
        try:
            outputs = self._llm.llm_engine.step()
        # Whatever it is, everyone who waits for an answer must hear of it, and the server ends.
        except Exception as error:
            self._failure = RequestError(503, f"vLLM failed: {type(error).__name__}: {error}")
            for batch in set(self._running.values()):
                batch.result.set_exception(self._failure)
            self._running = {}
            self._on_death()
            return
        for output in outputs:
            batch = self._running.get(output.request_id)
            if batch is not None and output.finished:
                batch.outputs[output.request_id] = output
                if len(batch.outputs) == len(batch.ids):
                    self._forget(batch)
                    batch.result.set_result([batch.outputs[name] for name in batch.names])
