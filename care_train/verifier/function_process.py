"""A user's reward function in a process of its own, killed and replaced where it hangs."""

import logging
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

from care_train.config import RewardFunctionSettings
from care_train.killable import Limits, Lost, Worker
from care_train.verifier.functions import FunctionScore, UserFunction
from care_train.verifier.responses import Response

logger = logging.getLogger(__name__)

Request = list[Response] | Literal["is_per_response"]
"""Responses to score, or what the function is asked about."""


class RewardFunction:
    """Called with responses and every column of their rows; it keeps its state between calls."""

    def __init__(self, settings: RewardFunctionSettings, max_image_pixels: int) -> None:
        """Start its process.

        Raises:
            ValueError: no such file or function, or another signature than those known.
        """
        self.settings = settings
        self._worker = Worker[Request, Any](
            f"reward.functions: {settings.function}",
            partial(_make_function, settings, max_image_pixels),
            Limits(seconds=settings.timeout),
        )
        self._is_per_response = self._worker("is_per_response")

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
        self._worker.close()

    def _ask(self, responses: Sequence[Response]) -> list[FunctionScore]:
        reply = self._worker(list(responses))
        if not isinstance(reply, Lost):
            return reply
        if reply.error is not None:
            raise reply.error
        places = dict.fromkeys(r.sample.location or r.sample.id for r in responses)
        where = ", ".join(list(places)[:3]) + (f" and {len(places) - 3} more" * (len(places) > 3))
        text = f"reward.functions: {self.settings.function}: {where}: {reply.reason}"
        if not self._is_per_response:
            raise ValueError(f"{text}, wanted {len(responses)} results")
        logger.warning("warning: %s; its value is 0", text)
        return [FunctionScore(0.0, note=f" ({reply.reason})")]


def _make_function(
    settings: RewardFunctionSettings, max_image_pixels: int
) -> Callable[[Request], list[FunctionScore] | bool]:
    function = UserFunction(settings, max_image_pixels)
    return lambda asked: function.is_per_response if isinstance(asked, str) else function(asked)
