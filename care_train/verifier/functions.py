"""Users' own rewards, in the signatures of EasyR1, TRL and verl: what runs in their process."""

import importlib.util
import inspect
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

from PIL import Image

from care_train.config import RewardFunctionSettings
from care_train.data import Sample, load_image
from care_train.verifier.responses import Response

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


class RowImages(Sequence[Image.Image]):
    """A row's images as RGB, each decoded when it is asked for."""

    def __init__(self, sample: Sample, max_pixels: int) -> None:
        self._sample, self._max_pixels = sample, max_pixels

    def __len__(self) -> int:
        return len(self._sample.images)

    @overload
    def __getitem__(self, index: int) -> Image.Image: ...
    @overload
    def __getitem__(self, index: slice) -> list[Image.Image]: ...
    def __getitem__(self, index: int | slice) -> Image.Image | list[Image.Image]:
        if isinstance(index, slice):
            return [self[place] for place in range(len(self))[index]]
        place = self._sample.location or self._sample.id
        ref = self._sample.images[index]
        return load_image(ref, location=place, max_pixels=self._max_pixels)


class UserFunction:
    """A function of the user's, called with responses and every column of their rows."""

    def __init__(self, settings: RewardFunctionSettings, max_image_pixels: int) -> None:
        """Load it.

        Raises:
            ValueError: no such file or function, or another signature than those known.
        """
        self.settings = settings
        self._max_image_pixels = max_image_pixels
        self._call = _load(settings.function)
        parameters = inspect.signature(self._call).parameters
        self._takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
        self._parameters = set(parameters)
        known = {
            "reward_inputs": self._easyr1_batch,
            "reward_input": self._easyr1_sequential,
            "completions": self._trl,
            "solution_str": self._verl,
        }
        form = next((known[name] for name in known if name in parameters), None)
        if form is None or inspect.iscoroutinefunction(self._call):
            raise ValueError(
                f"reward.functions: {settings.function}: got the parameters "
                f"{', '.join(parameters) or 'none'}, wanted {_FORMS}"
            )
        self._form: Callable[[Sequence[Response]], Sequence[Any]] = form
        self.is_per_response = form in (self._easyr1_sequential, self._verl)
        """Called with one response at a time."""

    def __call__(self, responses: Sequence[Response]) -> list[FunctionScore]:
        """A score per response, in order.

        Raises:
            ValueError: another number of results, or one that is no number in range.
            Exception: whatever the function raises, with its name noted.
        """
        try:
            results = self._form(responses)
        except Exception as error:
            error.add_note(f"in reward.functions: {self.settings.function}")
            raise
        if not isinstance(results, Sequence) or len(results) != len(responses):
            got = f"{len(results)}" if isinstance(results, Sequence) else repr(results)[:80]
            raise ValueError(
                f"reward.functions: {self.settings.function}: got {got} results, wanted a list of "
                f"{len(responses)}, one per response"
            )
        return [self._score(*pair) for pair in zip(results, responses, strict=True)]

    def _score(self, result: Any, response: Response) -> FunctionScore:
        form = None
        if isinstance(result, Mapping):
            names = [name for name in ("accuracy", "overall", "score") if name in result]
            if not names:
                raise self._wrong(result, response, "a key accuracy, overall or score")
            form = result.get("format")
            result = result[names[0]]
        if result is None:
            return FunctionScore(None)
        bounded = self.settings.target == "accuracy"
        return FunctionScore(
            self._number(result, response, bounded),
            None if form is None else self._number(form, response, True),
        )

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
            "images": RowImages(sample, self._max_image_pixels),
            "source": sample.source,
            "finished": response.finished,
            "response": response.text,
            "response_length": response.num_tokens,
            "ground_truth": sample.answer,
        }

    def _easyr1_batch(self, responses: Sequence[Response]) -> Sequence[Any]:
        return self._call([self._input(one) for one in responses], **self.settings.arguments)

    def _easyr1_sequential(self, responses: Sequence[Response]) -> Sequence[Any]:
        return [self._call(self._input(one), **self.settings.arguments) for one in responses]

    def _trl(self, responses: Sequence[Response]) -> Sequence[Any]:
        inputs = [self._input(one) for one in responses]
        names = dict.fromkeys(name for row in inputs for name in row if name != "response")
        columns = {name: [row.get(name) for row in inputs] for name in names}
        columns["prompts"] = columns.pop("prompt")
        texts = [one.text for one in responses]
        if self.settings.messages:
            columns["completions"] = [[{"role": "assistant", "content": text}] for text in texts]
        else:
            columns["completions"] = texts
        return self._call(**self._known(columns), **self.settings.arguments)

    def _verl(self, responses: Sequence[Response]) -> Sequence[Any]:
        return [
            self._call(
                **self._known(
                    {
                        "data_source": one.sample.source,
                        "solution_str": one.text,
                        "ground_truth": one.sample.answer,
                        "extra_info": self._input(one),
                    }
                ),
                **self.settings.arguments,
            )
            for one in responses
        ]

    def _known(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Those the function takes; TRL's and verl's own may name fewer."""
        chosen = values if self._takes_any else {k: values[k] for k in self._chosen(values)}
        return {k: v for k, v in chosen.items() if k not in self.settings.arguments}

    def _chosen(self, values: Mapping[str, Any]) -> Iterator[str]:
        return (name for name in values if name in self._parameters)


def _load(function: str) -> Callable[..., Any]:
    path, _, name = function.rpartition(":")
    file = Path(path)
    if not file.is_file():
        raise ValueError(f"reward.functions: {function}: got no file {file.absolute()}, wanted one")
    module_name = f"care_train_reward_{file.stem}_{abs(hash(file.absolute()))}"
    spec = importlib.util.spec_from_file_location(module_name, file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Dataclasses and pickling look a function's module up by name.
    sys.modules[module_name] = module
    spec.loader.exec_module(module)
    found = getattr(module, name, None)
    if not callable(found):
        defined = sorted(n for n, value in vars(module).items() if inspect.isfunction(value))
        raise ValueError(
            f"reward.functions: {function}: got no function {name} in it, wanted one of "
            f"{', '.join(defined) or 'none'}"
        )
    return found
