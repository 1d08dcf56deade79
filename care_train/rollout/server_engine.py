"""vLLM in a server: one thread drives it, and requests of all trainer ranks share its batches.

The same thread alone decides which weights there are. A batch enters vLLM only under the version
of the weights that vLLM then holds, and is given up before they change: what was sampled from other
weights is never an answer.
"""

import queue
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any


class RequestError(Exception):
    """Why a request got no answer; the message is for whoever sent it."""

    status = 500
    """HTTP's."""


class InvalidError(RequestError):
    """The message is not one that the server takes."""

    status = 422


class TooLargeError(RequestError):
    """The message is longer than the server takes."""

    status = 413


class RefusedError(RequestError):
    """The message does not fit the server's state."""

    status = 409


class AbortedError(RequestError):
    """A batch was given up: other weights came, or whoever asked went away."""

    status = 409


class EngineError(RequestError):
    """vLLM refused a request, or a worker failed at a task; vLLM goes on."""


class EngineDeadError(RequestError):
    """vLLM failed, and answers nothing more."""

    status = 503


class Batch:
    """Requests that came together and are answered together."""

    def __init__(
        self,
        version: str | None,
        prompts: Sequence[Any],
        parameters: Sequence[Any],
        lora: Any = None,
    ) -> None:
        self.version = version
        """Of the weights to sample from."""
        self.prompts = prompts
        self.parameters = parameters
        self.lora = lora
        self.result: Future[list[Any]] = Future()
        self.ids: list[str] = []
        """vLLM's own, which it makes unique by a suffix."""
        self.outputs: dict[str, Any] = {}


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
        self._failure: EngineDeadError | None = None
        self._thread = threading.Thread(target=self._run, name="vllm", daemon=True)
        self._thread.start()

    @property
    def is_sampling(self) -> bool:
        """Whether a batch is under way."""
        return bool(self._running)

    def generate(self, batch: Batch) -> None:
        """All requests enter vLLM between two of its steps, so that they are batched alike in every
        run; `batch.result` gets vLLM's outputs in order, or `RefusedError` where vLLM then has
        other weights than the batch's."""
        self._submit(batch.result, lambda: self._add(batch))

    def call(self, function: Callable[[Any], Any]) -> Future[Any]:
        """`function(llm)` between two steps."""
        result: Future[Any] = Future()
        self._submit(result, lambda: result.set_result(function(self._llm)))
        return result

    def abort(self, batch: Batch, reason: str) -> None:
        """Give up a batch that is not done."""
        self._submit(Future(), lambda: self._abort(batch, reason))

    def drop_weights(self, reason: str) -> None:
        """Within `call`: nothing may be sampled from now on; what was not done is given up."""
        assert threading.current_thread() is self._thread
        self._version = None
        for batch in set(self._running.values()):
            self._abort(batch, reason)

    def adopt_weights(self, version: str) -> None:
        """Within `call`: vLLM holds these weights, whole."""
        assert threading.current_thread() is self._thread
        assert not self._running
        self._version = version

    def _submit(self, result: Future[Any], command: Callable[[], None]) -> None:
        def guarded() -> None:
            # From here on whoever waits cannot cancel it, which would end this thread below.
            if not result.set_running_or_notify_cancel():
                return
            try:
                if self._failure is not None:
                    raise self._failure
                command()
            except RequestError as error:
                result.set_exception(error)
            # vLLM and its workers raise what they like; it is for whoever gave the command.
            except Exception as error:
                result.set_exception(EngineError(f"vLLM: {type(error).__name__}: {error}"))

        self._commands.put(guarded)

    def _add(self, batch: Batch) -> None:
        if self._version is None or batch.version != self._version:
            raise RefusedError(
                "its weights are not those of this run: wanted a weight sync first (the server was "
                "restarted, or another run uses it)"
            )
        batch.ids = self._llm.enqueue(
            batch.prompts, batch.parameters, lora_request=batch.lora, use_tqdm=False
        )
        self._running |= {name: batch for name in _names(batch)}

    def _abort(self, batch: Batch, reason: str) -> None:
        if batch.result.done():
            return
        self._llm.llm_engine.abort_request(batch.ids, internal=True)
        self._forget(batch)
        batch.result.set_exception(AbortedError(reason))

    def _forget(self, batch: Batch) -> None:
        for name in _names(batch):
            self._running.pop(name, None)

    def _run(self) -> None:
        while True:
            # Sleeps where vLLM has nothing to do.
            if not self._running:
                self._commands.get()()
            while not self._commands.empty():
                self._commands.get()()
            if self._running and self._failure is None:
                self._step()

    def _step(self) -> None:
        try:
            outputs = self._llm.llm_engine.step()
        # Whatever it is, all who wait must hear of it, and the server ends.
        except Exception as error:
            self._failure = EngineDeadError(f"vLLM failed: {type(error).__name__}: {error}")
            for batch in set(self._running.values()):
                batch.result.set_exception(self._failure)
            self._running = {}
            self._on_death()
            return
        for output in outputs:
            batch = self._running.get(output.request_id)
            if batch is not None and output.finished:
                batch.outputs[output.request_id] = output
                self._finish(batch)

    def _finish(self, batch: Batch) -> None:
        if len(batch.outputs) < len(batch.ids):
            return
        self._forget(batch)
        if batch.version == self._version:
            batch.result.set_result([batch.outputs[name] for name in _names(batch)])
        else:
            batch.result.set_exception(AbortedError("other weights came while it was sampled"))


def _names(batch: Batch) -> list[str]:
    """The ids without vLLM's suffix, as its outputs have them."""
    return [name.partition("-")[0] for name in batch.ids]
