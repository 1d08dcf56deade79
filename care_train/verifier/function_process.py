"""A user's reward function in a process of its own, killed and replaced where it hangs."""

import atexit
import logging
import pickle
from collections.abc import Sequence
from typing import Any

from care_train.config import RewardFunctionSettings
from care_train.verifier.child import Child
from care_train.verifier.functions import FunctionScore
from care_train.verifier.responses import Response

logger = logging.getLogger(__name__)

_START_SECONDS = 300.0
"""For the user's imports."""


class RewardFunction:
    """Called with responses and every column of their rows; it keeps its state between calls."""

    def __init__(self, settings: RewardFunctionSettings, max_image_pixels: int) -> None:
        """Start its process.

        Raises:
            ValueError: no such file or function, or another signature than those known.
        """
        self.settings = settings
        self._begin = pickle.dumps((settings, max_image_pixels))
        self._child: Child | None = None
        self._is_per_response = self._start()
        atexit.register(self.close)

    def __call__(self, responses: Sequence[Response]) -> list[FunctionScore]:
        """A score per response, in order.

        A function that takes one response at a time and hangs, or ends its process, costs that
        response alone: its value is 0, with a warning that names the row.

        Raises:
            ValueError: another number of results, or one that is no number in range; a function of
                whole batches that hangs or ends its process.
            Exception: whatever the function raises, with its name and traceback noted.
        """
        if not self._is_per_response:
            return self._ask(responses)
        return [score for response in responses for score in self._ask([response])]

    def close(self) -> None:
        """End its process."""
        if self._child is not None:
            self._child.kill()
            self._child = None

    def _start(self) -> bool:
        self._child = Child("care_train.verifier.function_worker", {}, is_silent=False)
        problem = self._send(self._begin, _START_SECONDS)
        if isinstance(problem, str):
            raise ValueError(f"reward.functions: {self.settings.function}: {problem} at its start")
        return problem

    def _ask(self, responses: Sequence[Response]) -> list[FunctionScore]:
        if self._child is None:
            self._start()
        reply = self._send(pickle.dumps(list(responses)), self.settings.timeout)
        if not isinstance(reply, str):
            return reply
        places = dict.fromkeys(r.sample.location or r.sample.id for r in responses)
        where = ", ".join(list(places)[:3]) + (f" and {len(places) - 3} more" * (len(places) > 3))
        text = f"reward.functions: {self.settings.function}: {where}: {reply}"
        if not self._is_per_response:
            raise ValueError(f"{text}, wanted {len(responses)} results")
        logger.warning("warning: %s; its value is 0", text)
        return [FunctionScore(0.0, note=f" ({reply})")]

    def _send(self, message: bytes, timeout: float) -> Any:
        """The reply, or as text why there is none; then the process is gone."""
        assert self._child is not None
        try:
            self._child.requests.send_bytes(message)
            if not self._child.replies.poll(timeout):
                self.close()
                return f"got nothing in {timeout:g} s"
            reply = pickle.loads(self._child.replies.recv_bytes())
        except (EOFError, OSError):
            self.close()
            return "got the end of its process"
        if isinstance(reply, Exception):
            raise reply
        return reply
