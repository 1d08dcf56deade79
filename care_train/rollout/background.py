"""Work beside the main thread."""

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

Value = TypeVar("Value")


def in_background(work: Callable[[], Value]) -> Future[Value]:
    """Run `work` in a thread that, unlike an executor's, does not keep a process from ending."""
    future: Future[Value] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        # It belongs to whoever waits for the result.
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future
