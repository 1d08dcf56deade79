"""One prompt on its way through a step, and the verdicts on its responses."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from care_train.algorithm.released import TagPatterns, token_tag_spans
from care_train.algorithm.spans import parse_spans, token_spans
from care_train.algorithm.types import (
    GroupUpdate,
    Rollout,
    RolloutGroup,
    Spans,
    skipped_update,
)
from care_train.config import PromptSettings
from care_train.data import Sample
from care_train.models.batch import TokenSequence
from care_train.models.prompts import EncodedPrompt, TokenText
from care_train.rollout.engine import Completion
from care_train.verifier import Response, Score, Verifier


class Answer(NamedTuple):
    """What the rollout engine sampled for a row, before it is verified."""

    sample: Sample
    completion: Completion
    prefix_ids: tuple[int, ...] = ()
    """Tokens that were forced before the completion (reflection)."""


@dataclass(frozen=True, kw_only=True)
class Group(RolloutGroup):
    """The G responses to one prompt. Each stage of a step returns the group with more fields."""

    sample: Sample
    prompt: EncodedPrompt = field(repr=False)
    completions: tuple[Completion, ...] = field(default=(), repr=False)
    """Line 1: what the engine sampled; `rollouts` are their verified form (line 2)."""
    repair: Answer | None = None
    """Lines 11-13: the reflection as it was sampled; None where there is none."""
    update: GroupUpdate = field(default_factory=lambda: skipped_update(""))
    """Lines 15-19 and 26-41: what the group trains."""

    def sequence(
        self, rollout: Rollout, prefix_ids: tuple[int, ...] | None = None
    ) -> TokenSequence:
        """Prompt, prefix and response of one rollout; `prefix_ids` replaces the forced prefix."""
        prefix = rollout.prefix_ids if prefix_ids is None else prefix_ids
        return TokenSequence(self.prompt, prefix, rollout.token_ids)


class RolloutScorer:
    """Decodes completions, locates their spans and has them verified (Eq. 1)."""

    def __init__(
        self,
        token_text: TokenText,
        verifier: Verifier,
        prompt: PromptSettings,
        tag_patterns: TagPatterns | None = None,
        length_bonus: Callable[[int], float] | None = None,
    ) -> None:
        """`tag_patterns` read responses as the released code does (`preset: official`): spans by
        token ids, of a reflection the new tokens alone; None: by the text. `length_bonus` is what a
        response's length in tokens adds to its reward."""
        self._token_text = token_text
        self._tag_patterns = tag_patterns
        self._length_bonus = length_bonus or (lambda num_tokens: 0.0)
        self.verifier = verifier
        self._tags = (prompt.think_tag, prompt.answer_tag)

    def text(self, completion: Completion) -> str:
        """The response's text, without special tokens."""
        return self._token_text.decode(completion.token_ids)[0]

    def verify(self, groups: Sequence[Group]) -> list[Group]:
        """Line 2: the groups with their rollouts, all verified in one call."""
        answers = [Answer(g.sample, completion) for g in groups for completion in g.completions]
        rollouts = iter(self.score_all(answers))
        return [replace(g, rollouts=tuple(next(rollouts) for _ in g.completions)) for g in groups]

    def verify_reflections(self, groups: Sequence[Group]) -> list[Group]:
        """Line 14: the groups with their verified reflections."""
        repairs = [group.repair for group in groups if group.repair is not None]
        rollouts = iter(self.score_all(repairs, reflected=True))
        return [g if g.repair is None else replace(g, reflected=next(rollouts)) for g in groups]

    def score_all(self, answers: Sequence[Answer], *, reflected: bool = False) -> list[Rollout]:
        """Rollouts of completions, in order, all verified in one call."""
        decoded, responses = [], []
        for sample, completion, prefix in answers:
            read = prefix if self._tag_patterns is None else ()
            text, ends = self._token_text.decode(read + completion.token_ids)
            decoded.append((text, ends))
            response = Response(text, sample, completion.finished, completion.token_ids)
            responses.append(response)
        scores = self.verifier.score_batch(responses)
        return [
            self._rollout(answer, text, ends, score, reflected)
            for answer, (text, ends), score in zip(answers, decoded, scores, strict=True)
        ]

    def _spans(self, answer: Answer, text: str, ends: Sequence[int], score: Score) -> Spans:
        if self._tag_patterns is not None:
            return token_tag_spans(answer.completion.token_ids, self._tag_patterns)
        if answer.completion.finished:
            ends = ends[:-1]
        spans = parse_spans(text, *self._tags)
        if score.wrong_step is not None:
            spans = replace(spans, wrong_step=score.wrong_step)
        return token_spans(spans, ends, len(answer.prefix_ids))

    def _rollout(
        self, answer: Answer, text: str, ends: Sequence[int], score: Score, reflected: bool
    ) -> Rollout:
        completion, prefix_ids = answer.completion, answer.prefix_ids
        return Rollout(
            token_ids=completion.token_ids,
            text=text,
            spans=self._spans(answer, text, ends, score),
            accuracy=score.accuracy,
            format_score=score.format_score,
            reward=score.reward + self._length_bonus(len(completion.token_ids)),
            finished=completion.finished,
            prefix_ids=prefix_ids,
            reflected=reflected,
            verdict=score.reason,
            graded=score.graded,
            format_verdict=score.format_reason,
            rewards=score.rewards,
            log_probs=completion.log_probs,
        )
