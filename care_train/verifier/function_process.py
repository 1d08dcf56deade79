"""A user's reward function: in a process of its own, killed and replaced where it hangs, or, handed
over by a program, in this one."""

import logging
import signal
import threading
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import FrameType
from typing import Any

from care_train.config import FROM_PYTHON, RewardFunctionSettings
from care_train.data import Sample
from care_train.killable import Limits, Lost, Worker
from care_train.verifier.functions import FunctionScore, Metrics, TrainerState, UserFunction
from care_train.verifier.responses import Response

logger = logging.getLogger(__name__)

_Call = tuple[Sequence[Response], TrainerState] | None
"""Responses to score; None asks for the function's signature."""


class RewardFunction:
    """Called with responses and every column of their rows; it keeps its state between calls."""

    def __init__(
        self, settings: RewardFunctionSettings, given: Mapping[str, Callable[..., Any]]
    ) -> None:
        """Start its process.

        Args:
            settings: which function, and how it is called.
            given: functions that a program hands over, by `settings.function`; they run in it.

        Raises:
            ValueError: no such file or function, or another signature than those known.
        """
        self.settings = settings
        self.name = settings.function.rpartition(":")[2]
        self.metrics: Metrics = {}
        """What the function returned ("") and logged since this was last emptied, by name."""
        self._title = f"reward.functions: {settings.function}"
        make = partial(_make_function, settings)
        if settings.function.startswith(FROM_PYTHON):
            if settings.function not in given:
                raise ValueError(
                    f"{self._title} stands for a function that a program handed over "
                    "(CareTrainer): run it from there, or name file.py:function"
                )
            if threading.current_thread() is not threading.main_thread():
                logger.warning(
                    "warning: %s has no time limit, as this is not the program's main thread; a "
                    "function that is named as file.py:function has one",
                    self._title,
                )
            self._ask = _InProgram(make(given[settings.function]), settings.timeout)
        else:
            limits = Limits(seconds=settings.timeout)
            self._ask = Worker[_Call, Any](self._title, make, limits)
        signature: Any = self._ask(None)
        self._is_per_response, self._columns = signature

    def __call__(self, responses: Sequence[Response], state: TrainerState) -> list[FunctionScore]:
        """A score per response, in order.

        A function that takes one response at a time and hangs, or ends its process, costs that
        response alone: its value is 0, with a warning that names the row.

        Raises:
            ValueError: another number of results, or one that is no number in range; a function of
                whole batches that hangs or ends its process.
            Exception: whatever the function raises, with its name and traceback noted.
        """
        batches = [[one] for one in responses] if self._is_per_response else [list(responses)]
        scores = [score for batch in batches for score in self._score(batch, state)]
        values = [score.value for score in scores if score.value is not None]
        self.metrics.setdefault("", []).extend(values)
        return scores

    def check_columns(self, samples: Sequence[Sample]) -> None:
        """Check that some row has a column for each parameter that only a column can fill.

        Raises:
            ValueError: parameters without a column, and the columns of the first row.
        """
        missing = set(self._columns)
        for sample in samples if missing else ():
            missing -= sample.columns.keys()
            if not missing:
                break
        if missing:
            first = samples[0]
            raise ValueError(
                f"{self._title}: got the parameters {', '.join(sorted(missing))}, for which no row "
                f"has a column ({first.where} has "
                f"{', '.join(sorted(first.columns)) or 'none'}), wanted a column of each name, a "
                "default value, or the value in `arguments`"
            )

    def _score(self, responses: list[Response], state: TrainerState) -> list[FunctionScore]:
        reply = self._ask((responses, state))
        if not isinstance(reply, Lost):
            scores, metrics = reply
            for name, values in metrics.items():
                self.metrics.setdefault(name, []).extend(values)
            return scores
        if reply.error is not None:
            raise reply.error
        places = list(dict.fromkeys(r.sample.where for r in responses))
        more = f" and {len(places) - 3} more" if len(places) > 3 else ""
        text = f"{self._title}: {', '.join(places[:3])}{more}: {reply.reason}"
        if not self._is_per_response:
            raise ValueError(f"{text}, wanted {len(responses)} results")
        logger.warning("warning: %s; its value is 0", text)
        return [FunctionScore(0.0, note=f" ({reply.reason})")]


class _InProgram:
    """A function called in this process, as `Worker` calls one in another.

    It can use what the program holds, a model on the GPU say; but it shares the program's memory
    and cannot be killed. Its time limit is a signal, which ends what Python executes: one C call
    that hangs (a regular expression) goes on. A function that sets the same alarm itself, as
    math-verify does, takes the limit off; outside of the main thread there is none.
    """

    def __init__(self, call: Callable[[_Call], Any], seconds: float) -> None:
        self._call, self._seconds = call, seconds

    def __call__(self, item: _Call) -> Any:
        if threading.current_thread() is not threading.main_thread():
            return self._call(item)
        before = signal.signal(signal.SIGALRM, _out_of_time)
        signal.setitimer(signal.ITIMER_REAL, self._seconds)
        try:
            return self._call(item)
        except _OutOfTimeError:
            return Lost(f"got nothing in {self._seconds:g} s", is_timeout=True)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)


class _OutOfTimeError(BaseException):
    """Not an Exception, so that a function's own `except Exception` does not catch it."""


def _out_of_time(_number: int, _frame: FrameType | None) -> None:
    raise _OutOfTimeError


def _make_function(
    settings: RewardFunctionSettings, given: Callable[..., Any] | None = None
) -> Callable[[_Call], Any]:
    function = UserFunction(settings, given)
    signature = function.is_per_response, function.columns
    return lambda call: signature if call is None else function(*call)
