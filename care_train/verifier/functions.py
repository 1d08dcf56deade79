"""Users' own rewards, in the signatures of EasyR1, TRL and verl: what runs in their process."""

import asyncio
import importlib.util
import inspect
import math
import operator
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from numbers import Real
from pathlib import Path
from types import ModuleType
from typing import Any

from care_train.config import SHIPPED_REWARDS, RewardFunctionSettings
from care_train.data import RowError
from care_train.data.answers import verl_answer
from care_train.verifier.responses import Response, RowImages

_MAX_EXTRA_CHARS = 200
_TRL_NAMES = set(
    "prompts completions completion_ids trainer_state log_metric log_extra answer image images "
    "source finished response_length ground_truth".split()
)
_FORMS = (
    "compute_score(reward_inputs) or compute_score(reward_input) as in EasyR1, "
    "f(completions, **columns) as in TRL, or f(solution_str, ground_truth, ...) as in verl"
)

Metrics = dict[str, list[float]]
"""By name: numbers of TRL's `log_metric`, and other numbers in a result's mapping."""


@dataclass(frozen=True)
class FunctionScore:
    """What a function says of one response; None where it says nothing."""

    value: float | None
    format_score: float | None = None
    note: str = ""
    """Why the value is no result of the function's."""
    extra: Mapping[str, Any] = field(default_factory=dict)
    """What the function gave TRL's `log_extra`."""
    wrong_step: tuple[int, int] | None = None
    """Characters of the response's first wrong step; None: it names none."""


@dataclass(frozen=True)
class TrainerState:
    """Where the run is, under the names of transformers' own."""

    global_step: int = 0
    max_steps: int = 0


class UserFunction:
    """A function or object of the user's, called with responses and every column of their rows."""

    def __init__(
        self, settings: RewardFunctionSettings, given: Callable[..., Any] | None = None
    ) -> None:
        """Load it, or take the one that a program hands over.

        Raises:
            ValueError: no such file or function, or another signature than those known.
        """
        self._settings = settings
        self._name = f"reward.functions: {settings.function}"
        self._metrics: Metrics = {}
        self._extra: list[dict[str, Any]] = []
        self._call = _load(settings.function) if given is None else given
        parameters = inspect.signature(self._call).parameters
        self._parameters = set(parameters)
        self._takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
        known = {
            "reward_inputs": (self._easyr1_batch, set()),
            "reward_input": (self._easyr1_sequential, set()),
            "completions": (self._trl, _TRL_NAMES),
            "solution_str": (self._verl, {"data_source", "ground_truth", "extra_info"}),
        }
        name = next((name for name in known if name in parameters), None)
        if name is None:
            raise ValueError(
                f"{self._name}: got the parameters {', '.join(parameters) or 'none'}, "
                f"wanted {_FORMS}"
            )
        self._form, filled = known[name]
        needed = [
            p.name
            for p in parameters.values()
            if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL) and p.default is p.empty
            if p.name not in {name, *filled, *settings.arguments}
        ]
        if needed and name != "completions":
            raise ValueError(
                f"{self._name}: got the parameters {', '.join(needed)}, which nothing fills, "
                f"wanted {_FORMS}, or their values in `arguments`"
            )
        self.is_per_response = name in ("reward_input", "solution_str")
        """Whether it is called with one response at a time."""
        self.columns = tuple(needed)
        """Parameters that only a row's columns can fill."""

    def __call__(
        self, responses: Sequence[Response], state: TrainerState
    ) -> tuple[list[FunctionScore], Metrics]:
        """A score per response, in order, and what the function logged.

        Raises:
            ValueError: another number of results, or one that is no number in range.
            RuntimeError: the function's own ValueError or OSError.
            Exception: whatever else it raises, with its name noted.
        """
        self._metrics, self._extra = {}, [{} for _ in responses]
        row = f": {responses[0].sample.where}" if self.is_per_response else ""
        with _naming(self._name + row):
            results: Any = self._form(responses, state)
        if hasattr(results, "tolist"):
            results = results.tolist()  # an array or tensor
        if not isinstance(results, Sequence) or len(results) != len(responses):
            got = f"{len(results)}" if isinstance(results, Sequence) else repr(results)[:80]
            raise ValueError(
                f"{self._name}: got {got} results, wanted a list of {len(responses)}, one per "
                "response"
            )
        return list(map(self._score, results, responses, self._extra)), self._metrics

    def _score(self, result: Any, response: Response, extra: dict[str, Any]) -> FunctionScore:
        form, step = None, None
        if isinstance(result, Mapping):
            names = [name for name in ("accuracy", "acc", "overall", "score") if name in result]
            if not names:
                raise self._wrong(result, response, "a key accuracy, acc, overall or score")
            form = result.get("format")
            step = self._wrong_step(result.get("wrong_step"), response)
            for name, value in result.items():
                number = _finite(value) if isinstance(value, Real) else None
                if name not in (names[0], "format") and number is not None:
                    self._metrics.setdefault(str(name), []).append(number)
            result = result[names[0]]
        if result is None and self._form == self._trl:
            return FunctionScore(None, extra=extra, wrong_step=step)
        number = self._number(result, response, self._settings.target == "accuracy")
        form = None if form is None else self._number(form, response, True)
        return FunctionScore(number, form, extra=extra, wrong_step=step)

    def _wrong_step(self, given: Any, response: Response) -> tuple[int, int] | None:
        if given is None:
            return None
        try:
            start, end = map(operator.index, given)
        except (TypeError, ValueError):
            start, end = -1, -1
        if not 0 <= start < end <= len(response.text):
            wanted = f"start and end of characters in [0, {len(response.text)}] as its wrong_step"
            raise self._wrong(given, response, wanted)
        return start, end

    def _number(self, value: Any, response: Response, bounded: bool) -> float:
        number = _finite(value)
        if number is None or (bounded and not 0 <= number <= 1):
            share = "a number in [0, 1]: scale it, or set target: bonus where it is no accuracy"
            raise self._wrong(value, response, share if bounded else "a finite number")
        return number

    def _wrong(self, value: Any, response: Response, wanted: str) -> ValueError:
        got = str(value)[:80]
        return ValueError(f"{self._name}: {response.sample.where}: got {got}, wanted {wanted}")

    def _run(self, *arguments: Any, **named: Any) -> Any:
        result = self._call(*arguments, **named)
        if inspect.isawaitable(result):
            # In a thread of its own: a notebook's main thread has a loop already.
            with ThreadPoolExecutor(1) as pool:
                return pool.submit(asyncio.run, _awaited(result)).result()
        return result

    def _easyr1_batch(self, responses: Sequence[Response], _state: TrainerState) -> Any:
        return self._run([_row(one) for one in responses], **self._settings.arguments)

    def _easyr1_sequential(self, responses: Sequence[Response], _state: TrainerState) -> list[Any]:
        return [self._run(_row(one), **self._settings.arguments) for one in responses]

    def _trl(self, responses: Sequence[Response], state: TrainerState) -> Any:
        rows = [_row(one) for one in responses]
        for row, one in zip(rows, responses, strict=True):
            # The columns of the key's names as they stand.
            row |= {k: v for k, v in one.sample.columns.items() if k in ("answer", "ground_truth")}
        names = dict.fromkeys(name for row in rows for name in row)
        columns: dict[str, Any] = {name: [row.get(name) for row in rows] for name in names}
        del columns["prompt"], columns["response"]
        if "image" in self._parameters:
            # Decoded only for a function that names it.
            columns["image"] = [next(iter(row["images"]), None) for row in rows]
        # As TRL does it: chat messages for rows that are.
        columns["prompts"] = [
            _messages(one) if one.sample.is_conversation else one.sample.prompt for one in responses
        ]
        columns["completions"] = [
            [{"role": "assistant", "content": one.text}] if one.sample.is_conversation else one.text
            for one in responses
        ]
        columns["completion_ids"] = [list(one.token_ids) for one in responses]
        logs = {"log_metric": self._log_metric, "log_extra": self._log_extra}
        return self._run_named(columns | logs | {"trainer_state": state})

    def _log_metric(self, name: str, value: float) -> None:
        self._metrics.setdefault(name, []).append(float(value))

    def _log_extra(self, column: str, values: Sequence[Any]) -> None:
        if len(values) != len(self._extra):
            raise ValueError(
                f"log_extra: {column}: got {len(values)} values, wanted {len(self._extra)}, one "
                "per response"
            )
        for extra, value in zip(self._extra, values, strict=True):
            extra[column] = str(value)[:_MAX_EXTRA_CHARS]

    def _verl(self, responses: Sequence[Response], _state: TrainerState) -> list[Any]:
        results = []
        for one in responses:
            row = _row(one)
            extra, truth = row.get("extra_info"), verl_answer(row)
            values = {
                "data_source": row.get("data_source") or one.sample.source,
                "solution_str": one.text,
                "ground_truth": row["ground_truth"] if truth is None else truth,
                "extra_info": {**row, **(extra if isinstance(extra, Mapping) else {})},
            }
            results.append(self._run_named(values))
        return results

    def _run_named(self, values: Mapping[str, Any]) -> Any:
        """With those values that the function takes; TRL's and verl's own may name fewer."""
        taken = values if self._takes_any else self._parameters & values.keys()
        return self._run(**{name: values[name] for name in taken} | self._settings.arguments)


@contextmanager
def _naming(name: str) -> Iterator[None]:
    """Errors of the user's own code get the function's name.

    Its ValueErrors and OSErrors would pass for wrong input, of which the message alone is shown.
    """
    try:
        yield
    except RowError:  # of a row's image, which the function asked for
        raise
    except (ValueError, OSError) as error:
        raise RuntimeError(f"{name}: {type(error).__name__}: {error}") from error
    except Exception as error:
        error.add_note(f"in {name}")
        raise


def _finite(value: Any) -> float | None:
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


async def _awaited(result: Any) -> Any:
    return await result


def _row(response: Response) -> dict[str, Any]:
    """A row's columns and its response, as a function gets them."""
    sample = response.sample
    key = sample.answer if sample.key is None else sample.key
    return {
        **sample.columns,
        "answer": key,
        "ground_truth": key,
        "prompt": sample.prompt,
        "images": RowImages(sample),
        "source": sample.source,
        "finished": response.finished,
        "response": response.text,
        "response_length": len(response.token_ids),
    }


def _messages(response: Response) -> list[dict[str, str]]:
    system = response.sample.columns.get("system")
    head = [{"role": "system", "content": system}] if isinstance(system, str) else []
    return [*head, {"role": "user", "content": response.sample.prompt}]


def _load(function: str) -> Callable[..., Any]:
    path, separator, name = function.rpartition(":")
    if path + separator == SHIPPED_REWARDS:
        module = importlib.import_module("care_train.verifier.steps")
    else:
        module = _load_file(function, Path(path).absolute())
    found = getattr(module, name, None)
    if inspect.isclass(found):
        with _naming(f"reward.functions: {function}"):
            found = found()
    if not callable(found):
        defined = sorted(n for n, value in vars(module).items() if inspect.isfunction(value))
        raise ValueError(
            f"reward.functions: {function}: got no function {name} in it, wanted one of "
            f"{', '.join(defined) or 'none'}"
        )
    return found


def _load_file(function: str, file: Path) -> ModuleType:
    if not file.is_file():
        raise ValueError(f"reward.functions: {function}: got no file {file}, wanted one")
    module_name = f"care_train_reward_{file.stem}_{abs(hash(file))}"
    spec = importlib.util.spec_from_file_location(module_name, file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # A helper beside the file is found, after the standard library and before installed packages.
    installed = [n for n, entry in enumerate(sys.path) if entry.endswith("-packages")]
    sys.path.insert(min(installed, default=len(sys.path)), str(file.parent))
    # Dataclasses and pickling look a function's module up by name.
    sys.modules[module_name] = module
    with _naming(f"reward.functions: {function}"):
        spec.loader.exec_module(module)
    return module
