"""The verifier V: accuracy, format and reward of a response (Eq. 1; Algorithm 1, line 2)."""

from dataclasses import dataclass

from care_train.algorithm.reward import reward
from care_train.algorithm.spans import parse_spans
from care_train.data import Sample
from care_train.settings import PromptSettings, RewardSettings
from care_train.verifier.format import format_score
from care_train.verifier.types import Verdict
from care_train.verifier.verify import verify


@dataclass(frozen=True)
class Score:
    """What the verifier says of one response."""

    accuracy: float
    """acc in [0, 1]."""
    format_score: float
    """fmt in [0, 1]."""
    reward: float
    """r of Eq. 1."""
    reason: str
    """Why the accuracy is what it is, for people."""


class Verifier:
    """Scores decoded responses, which are untrusted, in time linear in their length."""

    def __init__(self, prompt: PromptSettings, reward: RewardSettings) -> None:
        if not prompt.think_tag or not prompt.answer_tag or prompt.think_tag == prompt.answer_tag:
            raise ValueError(
                f"prompt.think_tag, prompt.answer_tag: got {prompt.think_tag!r} and "
                f"{prompt.answer_tag!r}, wanted two different names: change one"
            )
        self._think_tag = prompt.think_tag
        self._answer_tag = prompt.answer_tag
        self._format_weight = reward.format_weight

    def score(self, text: str, sample: Sample, finished: bool = True) -> Score:
        """Score one response; only its answer span counts for accuracy.

        Args:
            text: the decoded response, without EOS, a forced prefix included.
            sample: the row whose answer is the key.
            finished: False when the length limit cut the response, which makes fmt 0.
        """
        verdict = self._verdict(text, sample.answer, finished)
        form = format_score(text, self._think_tag, self._answer_tag) if finished else 0.0
        return Score(
            accuracy=verdict.accuracy,
            format_score=form,
            reward=reward(verdict.accuracy, form, self._format_weight),
            reason=verdict.reason,
        )

    def _verdict(self, text: str, expected: str, finished: bool) -> Verdict:
        span = parse_spans(text, self._think_tag, self._answer_tag).answer_content
        if span is None:
            cut = "" if finished else ": cut by the length limit"
            return Verdict(0.0, f"no complete <{self._answer_tag}> span{cut}")
        start, end = span
        return verify(text[start:end], expected)
