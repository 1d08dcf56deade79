"""One prompt's group on its way through a step: verdicts, subgroup, what it trains, and roles.

All but the verdicts also serve `care-train replay`, for groups of an archive.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch

from care_train.algorithm import baselines, care
from care_train.algorithm.fixability import Fixability
from care_train.algorithm.released import TagPatterns, token_tag_spans, with_rest
from care_train.algorithm.spans import parse_spans, token_spans
from care_train.algorithm.types import (
    GroupUpdate,
    Rollout,
    RolloutGroup,
    Spans,
    Subgroup,
    skipped_update,
)
from care_train.config import Config, PromptSettings
from care_train.data import Sample
from care_train.models.batch import TokenSequence
from care_train.models.prompts import EncodedPrompt, TokenText
from care_train.rollout.engine import Completion, request_seed
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


def choose_subgroup(
    group: RolloutGroup,
    config: Config,
    step: int,
    draw: str,
    fixability: Fixability | None = None,
) -> Subgroup | str:
    """Lines 3-10 and 21-25: CARE's S, or why the group is skipped.

    `group` has distances and log-prob sums, unless it is skipped before them; `step` counts from 0;
    `draw` is the prompt's `Sample.draw`.
    """
    # Beyond the rollouts' and the reflection's own indices.
    index = config.rollout.group_size + 1
    generator = torch.Generator().manual_seed(request_seed(config.seed, step, draw, index))
    return care.select_subgroup(group, config.care, generator, fixability)


def fixability_of(config: Config) -> Fixability | None:
    """What `care.selector: learned` learns into; None under another selector."""
    learns = config.algorithm == "care" and config.care.selector == "learned"
    return Fixability() if learns else None


def group_updates(
    groups: Sequence[RolloutGroup], config: Config, total: Callable[[list[float]], list[float]]
) -> list[GroupUpdate]:
    """Lines 15-19 and 26-41, or a baseline's advantages: what each group trains.

    `total` sums numbers over what else is of the batch, on other ranks; for a baseline alone.
    """
    loss, is_care = config.loss, config.algorithm == "care"
    counts_all = config.care.decisions.beyond_subgroup == "regularized"
    if is_care:
        updates = [_care_update(group, config, counts_all) for group in groups]
    else:
        updates = baselines.baseline_updates(
            [group.rollouts for group in groups],
            config.algorithm,
            total,
            # A token mean or Dr. GRPO's constant divides by length itself.
            length_normalized=loss.aggregation == "sequence",
            keep_without_signal=loss.kl_coef > 0,
        )
    if not loss.mask_truncated:
        return updates
    masked = []
    for group, update in zip(groups, updates, strict=True):
        # The responses that the update's denominators count: S*, or all that were sampled.
        trained = [sequence.rollout for sequence in update.sequences]
        counted = trained if is_care and not counts_all else group.responses
        masked.append(baselines.without_truncated(update, counted))
    return masked


def _care_update(group: RolloutGroup, config: Config, counts_all: bool) -> GroupUpdate:
    if isinstance(group.subgroup, str):
        update = skipped_update(group.subgroup)
    else:
        update = care.subgroup_update(group.subgroup, config.care, group.reflected)
    if counts_all:
        update = with_rest(update, group.responses, has_kl=config.loss.kl_coef > 0)
    return update


def outcome_of(subgroup: Subgroup | str, update: GroupUpdate) -> tuple[str, str]:
    """anchored | rescued | trained | skipped, and why it is skipped: as the archive says it."""
    reason = subgroup if isinstance(subgroup, str) and subgroup else update.skipped
    if reason:
        return "skipped", reason
    if isinstance(subgroup, Subgroup):
        return ("rescued" if update.rescued else "anchored"), ""
    return "trained", ""


def reflected_place(group: RolloutGroup) -> int | None:
    """The place of the negative that was to be repaired; None: none was."""
    subgroup = group.subgroup
    if not isinstance(subgroup, Subgroup) or subgroup.reflect_on is None:
        return None
    return subgroup.others[subgroup.reflect_on].index


def reflection_outcome(group: RolloutGroup) -> str:
    """What became of lines 11-19: none | too_long | repaired | failed | partial."""
    if reflected_place(group) is None:
        return "none"
    if group.reflected is None:
        return "too_long"
    accuracy = group.reflected.accuracy
    return "repaired" if accuracy == 1 else "failed" if accuracy == 0 else "partial"


def roles_of(group: RolloutGroup) -> dict[int, tuple[str, int | None]]:
    """By place in the group, the role of each member of S before the reflection and, of a negative,
    its rank from the anchor on; then that of the reflection, whose place is the group's size."""
    if not isinstance(group.subgroup, Subgroup):
        return {}
    anchor, others = group.subgroup.anchor, group.subgroup.others
    found: dict[int, tuple[str, int | None]] = {}
    if anchor.index is not None:
        found[anchor.index] = ("pseudo_anchor" if group.subgroup.rescued else "anchor", None)
    for rank, member in enumerate(others, start=1):
        if member.index is not None:
            is_negative = member.is_negative
            found[member.index] = ("hard_negative", rank) if is_negative else ("positive", None)
    if group.reflected is not None:
        roles = {"repaired": "reflected_success", "failed": "reflected_failure"}
        role = roles.get(reflection_outcome(group), "reflected_partial")
        found[len(group.rollouts)] = (role, None)
    return found


def telling_rollouts(group: RolloutGroup, update: GroupUpdate) -> list[tuple[str, Rollout]]:
    """The rollouts that say most of a group, each with its role.

    Anchor, nearest hard negative (the one that was repaired where one was) and reflection. Of a
    group without an anchor, such as a baseline's: the rollouts of the highest and of the lowest
    advantage, or the first one where none has any.
    """
    roles = {place: role for place, (role, _) in roles_of(group).items()}
    if not roles:
        trained = sorted(update.sequences, key=lambda sequence: -sequence.advantage)
        ends = trained[:1] + trained[1:][-1:]
        return [("trained", one.rollout) for one in ends] or [("unused", group.rollouts[0])]
    negative = reflected_place(group)
    if negative is None:
        negative = next((p for p, role in roles.items() if role == "hard_negative"), None)
    return [
        (role, group.responses[place])
        for place, role in roles.items()
        if place == negative or role not in ("hard_negative", "positive")
    ]
