"""vLLM in a server: one thread drives it, and requests of all trainer ranks share its batches."""

import queue
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any


class AbortedError(RuntimeError):
    """A batch was given up: other weights came, or whoever asked went away."""


class EngineDeadError(RuntimeError):
    """vLLM failed, and answers nothing more."""


class Batch:
    """Requests that came together and are answered together."""

    def __init__(self, prompts: Sequence[Any], parameters: Sequence[Any], lora: Any = None) -> None:
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
            llm: vLLM's `LLM`.
            on_death: called once if vLLM fails.
        """
        self._llm = llm
        self._on_death = on_death
        self._commands: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._running: dict[str, Batch] = {}
        self._failure: EngineDeadError | None = None
        threading.Thread(target=self._run, name="vllm", daemon=True).start()

    def generate(self, batch: Batch) -> None:
        """All requests enter vLLM between two of its steps, so that they are batched alike in every
        run; `batch.result` gets vLLM's outputs in order."""
        self._submit(batch.result, lambda: self._add(batch))

    def call(self, function: Callable[[Any], Any]) -> Future[Any]:
        """`function(llm)` between two steps."""
        result: Future[Any] = Future()
        self._submit(result, lambda: result.set_result(function(self._llm)))
        return result

    def abort(self, batch: Batch, reason: str) -> None:
        """Give up a batch that is not done."""
        self._submit(Future(), lambda: self._abort(batch, reason))

    def abort_all(self, reason: str) -> Future[Any]:
        """Give up all that was not done before this."""
        result: Future[Any] = Future()

        def abort() -> None:
            for batch in {id(batch): batch for batch in self._running.values()}.values():
                self._abort(batch, reason)
            result.set_result(None)

        self._submit(result, abort)
        return result

    def _submit(self, result: Future[Any], command: Callable[[], None]) -> None:
        def guarded() -> None:
            if self._failure is not None:
                result.set_exception(self._failure)
                return
            try:
                command()
            # Whatever a command raises is for whoever gave it; vLLM goes on.
            except Exception as error:
                result.set_exception(error)

        self._commands.put(guarded)

    def _add(self, batch: Batch) -> None:
        batch.ids = self._llm.enqueue(
            batch.prompts, batch.parameters, lora_request=batch.lora, use_tqdm=False
        )
        self._running |= {name: batch for name in _names(batch)}
        self._finish(batch)

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
        # Nobody else would hear of it: all who wait are told, and the server ends.
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
        if len(batch.outputs) == len(batch.ids):
            self._forget(batch)
            batch.result.set_result([batch.outputs[name] for name in _names(batch)])


def _names(batch: Batch) -> list[str]:
    """The ids without vLLM's suffix, as its outputs have them."""
    return [name.partition("-")[0] for name in batch.ids]
