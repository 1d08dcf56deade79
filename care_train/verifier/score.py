"""The verifier V: accuracy, format and reward of responses (Eq. 1; Algorithm 1, line 2)."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from care_train.algorithm.spans import parse_spans, reward
from care_train.config import PromptSettings, RewardSettings
from care_train.data import Sample
from care_train.verifier.format import boxed_answer, boxed_fault, format_fault
from care_train.verifier.function_process import RewardFunction
from care_train.verifier.functions import TrainerState
from care_train.verifier.judge import Judge, case_of
from care_train.verifier.pool import shared_pool
from care_train.verifier.responses import Response, item_of
from care_train.verifier.types import Item, Verdict
from care_train.verifier.verify import verify_batch


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
            ValueError: the tags are the same, or a reward function cannot be used.
        """
        if not prompt.think_tag or not prompt.answer_tag or prompt.think_tag == prompt.answer_tag:
            raise ValueError(
                f"prompt.think_tag, prompt.answer_tag: got {prompt.think_tag!r} and "
                f"{prompt.answer_tag!r}, wanted two different names: change one"
            )
        self._think_tag = prompt.think_tag
        self._answer_tag = prompt.answer_tag
        self._settings = reward
        self._functions = [RewardFunction(one, given or {}) for one in reward.functions]
        names = [function.name for function in self._functions]
        self._names = [f"{n}_{i + 1}" if n in names[:i] else n for i, n in enumerate(names)]
        self.state = TrainerState()
        """Where the run is: reward functions may ask."""
        self._judge = Judge(reward.judge) if reward.judge else None

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
        forms = [self._form(response) for response in responses]
        results = [(f.settings, f(responses, self.state)) for f in self._functions]
        for function, (_, found) in zip(self._functions, results, strict=True):
            values = [one.value for one in found if one.value is not None]
            function.metrics.setdefault("", []).extend(values)
        scores, threshold = [], self._settings.success_threshold
        for place, (verdict, fault) in enumerate(zip(verdicts, forms, strict=True)):
            own = [(settings, found[place]) for settings, found in results]
            accurate = [
                (s.weight, found.value)
                for s, found in own
                if s.target == "accuracy" and found.value is not None
            ]
            weight = self._settings.verifier_weight
            if weight or not accurate:
                accurate.append((weight or 1.0, verdict.accuracy))
            graded = _mean(accurate)
            accuracy = graded if threshold is None else float(graded >= threshold)
            given = [(s.weight, f.format_score) for s, f in own if f.format_score is not None]
            form = _mean(given) if given else float(not fault)
            given_by = [
                (name, found.value)
                for name, (_, found) in zip(self._names, own, strict=True)
                if found.value is not None
            ]
            bonus = sum(s.weight * (f.value or 0.0) for s, f in own if s.target == "bonus")
            scores.append(
                Score(
                    accuracy,
                    form,
                    reward(graded, form, self._settings.format_weight) + bonus,
                    self._reason(verdict, own),
                    "by reward.functions" if given else fault or "as asked",
                    graded,
                    (("verifier", verdict.accuracy), *given_by),
                    min((f.wrong_step for _, f in own if f.wrong_step), default=None),
                )
            )
        return scores

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

    def _reason(self, verdict: Verdict, own: Sequence[tuple]) -> str:
        parts = [
            f"{settings.function.rpartition(':')[2]} {found.value:g}{found.note}"
            for settings, found in own
            if found.value is not None
        ]
        parts += [f"{name}: {value}" for _, one in own for name, value in one.extra.items()]
        return "; ".join([*parts, verdict.reason])

    def _form(self, response: Response) -> str:
        if self._settings.answer == "boxed":
            return boxed_fault(response.text, self._think_tag)
        if not response.finished:
            return "cut by the length limit"
        return format_fault(response.text, self._think_tag, self._answer_tag)

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
        answers = [self._answer(response) for response in responses]
        asked: dict[int, Item] = {
            place: item_of(answer, responses[place].sample, tolerance)
            for place, answer in enumerate(answers)
            if answer is not None
        }
        pool = shared_pool()
        found = dict(zip(asked, verify_batch(list(asked.values()), pool), strict=True))
        if self._judge is not None:
            found |= self._judged(self._judge, responses, asked, found)
        return [found.get(place) or self._missing(one) for place, one in enumerate(responses)]

    def _judged(
        self,
        judge: Judge,
        responses: Sequence[Response],
        asked: dict[int, Item],
        found: dict[int, Verdict],
    ) -> dict[int, Verdict]:
        """The judge's verdicts where the verifier found no match in a type it judges."""
        types = self._settings.judge.types if self._settings.judge else []
        cases = {
            place: case
            for place, item in asked.items()
            if found[place].accuracy == 0
            and found[place].answer_type in types
            and (case := case_of(responses[place].sample.prompt, item))
        }
        return dict(zip(cases, judge.judge(list(cases.values())), strict=True))

    def _answer(self, response: Response) -> str | None:
        if self._settings.answer == "boxed":
            return boxed_answer(response.text)
        span = parse_spans(response.text, self._think_tag, self._answer_tag).answer_content
        return None if span is None else response.text[span[0] : span[1]]

    def _missing(self, response: Response) -> Verdict:
        cut = "" if response.finished else ": cut by the length limit"
        boxed = self._settings.answer == "boxed"
        wanted = "\\boxed{}" if boxed else f"complete <{self._answer_tag}> span"
        return Verdict(0.0, f"no {wanted}{cut}")


def _mean(weighted: Sequence[tuple[float, float]]) -> float:
    return sum(w * value for w, value in weighted) / sum(w for w, _ in weighted)
