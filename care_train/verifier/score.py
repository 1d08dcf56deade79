"""The verifier V: accuracy, format and reward of responses (Eq. 1; Algorithm 1, line 2)."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from care_train.algorithm.spans import parse_spans, reward
from care_train.config import PromptSettings, RewardSettings
from care_train.data import Sample
from care_train.verifier.function_process import RewardFunction
from care_train.verifier.functions import FunctionScore, TrainerState
from care_train.verifier.judge import Judge
from care_train.verifier.responses import (
    Item,
    Response,
    Verdict,
    boxed_answer,
    boxed_fault,
    check_comparable,
    format_fault,
    item_of,
)
from care_train.verifier.verify import verify_batch


def check_key(sample: Sample, reward: RewardSettings) -> None:
    """Check that the verifier can read a row's key, where it takes part in the accuracy.

    Raises:
        RowError: only a reward function can.
    """
    judges = any(function.target == "accuracy" for function in reward.own_functions)
    if reward.verifier_weight or not judges:
        check_comparable(sample)


@dataclass(frozen=True)
class Score:
    """What the verifier says of one response."""

    accuracy: float
    """acc in [0, 1]; 0 or 1 where `reward.success_threshold` is set."""
    format_score: float
    """fmt in [0, 1]."""
    reward: float
    """r of Eq. 1, and the bonuses."""
    reason: str
    """Why the accuracy is what it is, for people."""
    format_reason: str = "as asked"
    """Why the format is what it is."""
    graded: float = 0.0
    """acc before `reward.success_threshold` makes it 0 or 1."""
    rewards: tuple[tuple[str, float], ...] = ()
    """What the verifier and each reward function gave, by name."""
    wrong_step: tuple[int, int] | None = None
    """Characters of the first wrong step that a reward function names."""


class Verifier:
    """Scores decoded responses, which are untrusted: in training and in evaluation."""

    def __init__(
        self,
        prompt: PromptSettings,
        reward: RewardSettings,
        given: Mapping[str, Callable[..., Any]] | None = None,
    ) -> None:
        """Start the reward functions' processes.

        Args:
            prompt: the tags.
            reward: how responses are scored.
            given: functions that a program hands over, by their name in `reward.functions`.

        Raises:
            ValueError: a reward function cannot be used.
        """
        self._think_tag = prompt.think_tag
        self._answer_tag = prompt.answer_tag
        self._is_boxed = prompt.is_boxed
        self._settings, self._weight = reward, reward.verifier_weight
        self._functions = [RewardFunction(one, given or {}) for one in reward.own_functions]
        names = [function.name for function in self._functions]
        self._names = [f"{n}_{i + 1}" if n in names[:i] else n for i, n in enumerate(names)]
        self.state = TrainerState()
        """Where the run is: reward functions may ask."""
        self._judge = Judge(reward.judge) if reward.judge.base_url else None

    def score(self, text: str, sample: Sample, finished: bool = True) -> Score:
        """`score_batch` of one response."""
        return self.score_batch([Response(text, sample, finished)])[0]

    def score_batch(self, responses: Sequence[Response]) -> list[Score]:
        """A score per response, in order; only the answer span counts for the verifier's accuracy.

        Raises:
            ValueError: a row's column or a reward function's result that cannot be used, or a judge
                that does not answer.
        """
        if not responses:
            return []
        verdicts = self.verdicts(responses, self._settings.tolerance)
        results = [function(responses, self.state) for function in self._functions]
        return [
            self._score(response, verdict, [found[place] for found in results])
            for place, (response, verdict) in enumerate(zip(responses, verdicts, strict=True))
        ]

    def verdicts(self, responses: Sequence[Response], tolerance: float | None) -> list[Verdict]:
        """The verifier's verdict per response, in order, without reward functions.

        The judge's replaces it where the verifier finds no match in an answer type that
        `reward.judge.types` names.

        Args:
            responses: only the answer span counts.
            tolerance: of numbers, relative to the key; a row's own column comes first. None: the
                answer type's own.

        Raises:
            ValueError: a row's column that cannot be used, or a judge that does not answer.
        """
        asked: dict[int, Item] = {}
        for place, response in enumerate(responses):
            answer = self.answer(response.text)
            if answer is not None:
                asked[place] = item_of(answer, response.sample, tolerance)
        found = dict(zip(asked, verify_batch(list(asked.values())), strict=True))
        if self._judge is not None:
            open_answers = [p for p in asked if self._judge.is_asked(asked[p], found[p])]
            cases = [(responses[p].sample.prompt, asked[p]) for p in open_answers]
            found |= dict(zip(open_answers, self._judge.judge(cases), strict=True))
        return [found.get(place) or self._missing(one) for place, one in enumerate(responses)]

    def answer(self, text: str) -> str | None:
        """What stands in a response's answer span, or in its box under `prompt.tags=[think,boxed]`.

        None where there is no complete one.
        """
        if self._is_boxed:
            return boxed_answer(text)
        span = parse_spans(text, self._think_tag, self._answer_tag).answer_content
        return None if span is None else text[span[0] : span[1]]

    def form_fault(self, response: Response) -> str:
        """What is wrong with a response's form, or ""."""
        if self._is_boxed:
            return boxed_fault(response.text, self._think_tag)
        if not response.finished:
            return "cut by the length limit"
        return format_fault(response.text, self._think_tag, self._answer_tag)

    def check_columns(self, samples: Sequence[Sample]) -> None:
        """Check that rows fill every parameter of the reward functions, by their columns.

        Raises:
            ValueError: a function's parameter that no row has a column for, naming the first row's.
        """
        for function in self._functions:
            function.check_columns(samples)

    def take_metrics(self) -> dict[str, list[float]]:
        """What reward functions returned and logged since the last call.

        By the function's name for its results, `name_metric` for what it logged.
        """
        found: dict[str, list[float]] = {}
        for name, function in zip(self._names, self._functions, strict=True):
            found |= {f"{name}_{key}" if key else name: v for key, v in function.metrics.items()}
            function.metrics = {}
        return found

    def _score(
        self, response: Response, verdict: Verdict, results: Sequence[FunctionScore]
    ) -> Score:
        """Eq. 1 from the verifier's verdict and what each reward function says of a response."""
        accurate, given, bonus, reasons = [], [], 0.0, []
        rewards = [("verifier", verdict.accuracy)]
        for name, function, one in zip(self._names, self._functions, results, strict=True):
            settings = function.settings
            if one.format_score is not None:
                given.append((settings.weight, one.format_score))
            if one.value is None:
                continue
            rewards.append((name, one.value))
            reasons.append(f"{function.name} {one.value:g}{one.note}")
            if settings.target == "accuracy":
                accurate.append((settings.weight, one.value))
            else:
                bonus += settings.weight * one.value
        if self._weight or not accurate:
            check_comparable(response.sample)
            accurate.append((self._weight or 1.0, verdict.accuracy))
        graded, threshold = _mean(accurate), self._settings.success_threshold
        fault = self.form_fault(response)
        form = _mean(given) if given else float(not fault)
        reasons += [f"{name}: {value}" for one in results for name, value in one.extra.items()]
        return Score(
            graded if threshold is None else float(graded >= threshold),
            form,
            reward(graded, form, self._settings.format_weight) + bonus,
            "; ".join([*reasons, verdict.reason]),
            "by reward.functions" if given else fault or "as asked",
            graded,
            tuple(rewards),
            min((one.wrong_step for one in results if one.wrong_step), default=None),
        )

    def _missing(self, response: Response) -> Verdict:
        cut = "" if response.finished else ": cut by the length limit"
        wanted = "\\boxed{}" if self._is_boxed else f"complete <{self._answer_tag}> span"
        return Verdict(0.0, f"no {wanted}{cut}")


def _mean(weighted: Sequence[tuple[float, float]]) -> float:
    return sum(w * value for w, value in weighted) / sum(w for w, _ in weighted)
