"""Users' own rewards, in the signatures of EasyR1, TRL and verl: what runs in their process."""

import asyncio
import importlib.util
import inspect
import math
import operator
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import Any

from care_train.config import SHIPPED_REWARDS, RewardFunctionSettings
from care_train.verifier.responses import Response, RowImages

_MAX_EXTRA_CHARS = 200
_TRL_NAMES = {
    "prompts",
    "completions",
    "completion_ids",
    "trainer_state",
    "log_metric",
    "log_extra",
}
_ROW_NAMES = {
    "answer",
    "image",
    "images",
    "source",
    "finished",
    "response_length",
    "ground_truth",
}
_FORMS = (
    "compute_score(reward_inputs) or compute_score(reward_input) as in EasyR1, "
    "f(completions, **columns) as in TRL, or f(solution_str, ground_truth, ...) as in verl"
)


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


@dataclass(frozen=True)
class Request:
    """One call."""

    responses: Sequence[Response]
    state: TrainerState = TrainerState()


@dataclass(frozen=True)
class Reply:
    """A score per response, in order, and what the function logged."""

    scores: list[FunctionScore]
    metrics: dict[str, list[float]]
    """By name: numbers of TRL's `log_metric`, and other numbers in a result's mapping."""


@dataclass(frozen=True)
class Signature:
    """How a function is called."""

    is_per_response: bool
    """With one response at a time."""
    columns: tuple[str, ...]
    """Parameters that only a row's columns can fill."""


class UserFunction:
    """A function or object of the user's, called with responses and every column of their rows."""

    def __init__(
        self,
        settings: RewardFunctionSettings,
        given: Callable[..., Any] | None = None,
    ) -> None:
        """Load it, or take the one that a program hands over.

        Raises:
            ValueError: no such file or function, or another signature than those known.
        """
        self.settings = settings
        self._metrics: dict[str, list[float]] = {}
        self._extra: list[dict[str, Any]] = []
        self._call = _load(settings.function) if given is None else given
        parameters = inspect.signature(self._call).parameters
        self._parameters = set(parameters)
        self._takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
        known = {
            "reward_inputs": (self._easyr1_batch, set()),
            "reward_input": (self._easyr1_sequential, set()),
            "completions": (self._trl, _TRL_NAMES | _ROW_NAMES),
            "solution_str": (self._verl, {"data_source", "ground_truth", "extra_info"}),
        }
        name = next((name for name in known if name in parameters), None)
        if name is None:
            raise ValueError(
                f"reward.functions: {settings.function}: got the parameters "
                f"{', '.join(parameters) or 'none'}, wanted {_FORMS}"
            )
        self._form: Callable[[Request], Sequence[Any]] = known[name][0]
        filled = {name, *known[name][1], *settings.arguments}
        needed = [
            p.name
            for p in parameters.values()
            if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)
            and p.default is p.empty
            and p.name not in filled
        ]
        if needed and name != "completions":
            raise ValueError(
                f"reward.functions: {settings.function}: got the parameters {', '.join(needed)}, "
                f"which nothing fills, wanted {_FORMS}, or their values in `arguments`"
            )
        self.signature = Signature(name in ("reward_input", "solution_str"), tuple(needed))

    def __call__(self, request: Request) -> Reply:
        """A score per response, in order.

        Raises:
            ValueError: another number of results, or one that is no number in range.
            Exception: whatever the function raises, with its name noted.
        """
        responses = request.responses
        self._metrics, self._extra = {}, [{} for _ in responses]
        try:
            results: Any = self._form(request)
        except Exception as error:
            error.add_note(f"in reward.functions: {self.settings.function}")
            raise
        if hasattr(results, "tolist"):
            results = results.tolist()  # an array or tensor
        if not isinstance(results, Sequence) or len(results) != len(responses):
            got = f"{len(results)}" if isinstance(results, Sequence) else repr(results)[:80]
            raise ValueError(
                f"reward.functions: {self.settings.function}: got {got} results, wanted a list of "
                f"{len(responses)}, one per response"
            )
        scores = [self._score(*pair) for pair in zip(results, responses, strict=True)]
        with_extra = zip(scores, self._extra, strict=True)
        scores = [replace(score, extra=extra) if extra else score for score, extra in with_extra]
        return Reply(scores, self._metrics)

    def _score(self, result: Any, response: Response) -> FunctionScore:
        form, wrong_step = None, None
        if isinstance(result, Mapping):
            names = [name for name in ("accuracy", "overall", "score") if name in result]
            if not names:
                raise self._wrong(result, response, "a key accuracy, overall or score")
            form = result.get("format")
            wrong_step = self._wrong_step(result.get("wrong_step"), response)
            for name, value in result.items():
                if name not in (names[0], "format") and _is_number(value):
                    self._metrics.setdefault(str(name), []).append(float(value))
            result = result[names[0]]
        if result is None:
            return FunctionScore(None, wrong_step=wrong_step)
        bounded = self.settings.target == "accuracy"
        return FunctionScore(
            self._number(result, response, bounded),
            None if form is None else self._number(form, response, True),
            wrong_step=wrong_step,
        )

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
        wanted = "a number in [0, 1]" if bounded else "a finite number"
        try:
            number = float(value)
        except (TypeError, ValueError):
            raise self._wrong(value, response, wanted) from None
        if not math.isfinite(number) or (bounded and not 0 <= number <= 1):
            raise self._wrong(value, response, f"{wanted} (target {self.settings.target})")
        return number

    def _wrong(self, value: Any, response: Response, wanted: str) -> ValueError:
        place = response.sample.location or response.sample.id
        name = self.settings.function
        return ValueError(
            f"reward.functions: {name}: {place}: got {str(value)[:80]}, wanted {wanted}"
        )

    def _input(self, response: Response) -> dict[str, Any]:
        sample = response.sample
        return {
            **sample.columns,
            "prompt": sample.prompt,
            "answer": sample.answer,
            "images": RowImages(sample),
            "source": sample.source,
            "finished": response.finished,
            "response": response.text,
            "response_length": response.num_tokens,
            "ground_truth": sample.answer,
        }

    def _run(self, *arguments: Any, **named: Any) -> Any:
        result = self._call(*arguments, **named)
        if inspect.isawaitable(result):
            # In a thread of its own: a notebook's main thread has a loop already.
            with ThreadPoolExecutor(1) as pool:
                return pool.submit(asyncio.run, _awaited(result)).result()
        return result

    def _easyr1_batch(self, request: Request) -> Sequence[Any]:
        inputs = [self._input(one) for one in request.responses]
        return self._run(inputs, **self.settings.arguments)

    def _easyr1_sequential(self, request: Request) -> Sequence[Any]:
        arguments = self.settings.arguments
        return [self._run(self._input(one), **arguments) for one in request.responses]

    def _trl(self, request: Request) -> Sequence[Any]:
        responses = request.responses
        inputs = [self._input(one) for one in responses]
        names = dict.fromkeys(name for row in inputs for name in row if name != "response")
        columns: dict[str, Any] = {name: [row.get(name) for row in inputs] for name in names}
        del columns["prompt"]
        if "image" in self._parameters:
            # Decoded only for a function that names it.
            columns["image"] = [next(iter(row["images"]), None) for row in inputs]
        # As TRL does it: chat messages for rows that are.
        pairs = [(one, one.sample.is_conversation) for one in responses]
        columns["prompts"] = [_prompt(one) if chat else one.sample.prompt for one, chat in pairs]
        columns["completions"] = [
            [{"role": "assistant", "content": one.text}] if chat else one.text
            for one, chat in pairs
        ]
        columns["completion_ids"] = [list(one.token_ids) for one in responses]
        columns |= {"trainer_state": request.state, "log_metric": self._log_metric}
        columns["log_extra"] = self._log_extra
        return self._run(**self._known(columns), **self.settings.arguments)

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

    def _verl(self, request: Request) -> Sequence[Any]:
        results = []
        for one in request.responses:
            row = self._input(one)
            extra, model = row.get("extra_info"), row.get("reward_model")
            truth = model.get("ground_truth") if isinstance(model, Mapping) else None
            values = {
                "data_source": row.get("data_source") or one.sample.source,
                "solution_str": one.text,
                "ground_truth": one.sample.answer if truth is None else truth,
                "extra_info": {**row, **(extra if isinstance(extra, Mapping) else {})},
            }
            results.append(self._run(**self._known(values), **self.settings.arguments))
        return results

    def _known(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Those the function takes; TRL's and verl's own may name fewer."""
        return {
            name: value
            for name, value in values.items()
            if (self._takes_any or name in self._parameters) and name not in self.settings.arguments
        }


async def _awaited(result: Any) -> Any:
    return await result


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def _prompt(response: Response) -> list[dict[str, str]]:
    sample = response.sample
    system = sample.columns.get("system")
    head = [{"role": "system", "content": system}] if isinstance(system, str) else []
    return [*head, {"role": "user", "content": sample.prompt}]


def _load(function: str) -> Callable[..., Any]:
    path, separator, name = function.rpartition(":")
    if path + separator == SHIPPED_REWARDS:
        module = importlib.import_module("care_train.verifier.steps")
    else:
        module = _load_file(function, Path(path).absolute())
    found = getattr(module, name, None)
    if inspect.isclass(found):
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
    spec.loader.exec_module(module)
    return module
