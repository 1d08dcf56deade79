"""Reflection-guided resampling (Sec. 3.6; Algorithm 1, lines 11-20): what to ask, where it goes."""

import re
from dataclasses import replace

import torch

from care_train.algorithm.selection import is_failure, is_positive
from care_train.algorithm.types import Member, Rollout, Subgroup
from care_train.config import CareSettings, ReflectionSettings


def choose_reflected_negative(
    subgroup: Subgroup, settings: ReflectionSettings, generator: torch.Generator | None = None
) -> int | None:
    """Line 12: which of `subgroup.others` reflects; None in a rescue or with reflection off.

    The others stand nearest to the anchor first, so the hardest by d_cos is the first.
    """
    if not settings.enabled or subgroup.rescued or not subgroup.others:
        return None
    if settings.negative == "random":
        return int(torch.randint(len(subgroup.others), (1,), generator=generator))
    return 0


def reflection_prefix(negative: Rollout, cue: str, think_tag: str, answer_tag: str) -> str:
    """Line 13: the text forced after the prompt: `<think>`, the failed rationale, the cue.

    The think span stays open, so that the policy re-derives, and the failed answer is dropped. A
    failure that never thought contributes what it wrote before its answer.
    """
    before, opening, after = negative.text.partition(f"<{think_tag}>")
    # Up to the first tag: one left in would close or reopen the span that the cue belongs to.
    tags = rf"</?(?:{re.escape(think_tag)}|{re.escape(answer_tag)})>"
    rationale = re.split(tags, after if opening else before, maxsplit=1)[0]
    return repair_prefix(rationale, cue, think_tag)


def repair_prefix(failed_rationale: str, cue: str, think_tag: str) -> str:
    """`<think>`, a failed rationale and the repair cue, with the think span left open."""
    return f"<{think_tag}>{failed_rationale.strip()}\n{cue}\n"


def merge_reflection(subgroup: Subgroup, reflected: Rollout, settings: CareSettings) -> Subgroup:
    """Lines 15-19: a verified repair replaces its negative; a failed one joins S.

    The reflected rollout never becomes the anchor. One with 0 < acc < 1 is neither and is dropped,
    unless `partial` is `literal`, where all that is not a success has failed.
    """
    position = subgroup.reflect_on
    assert position is not None
    decisions = settings.decisions
    succeeded = is_positive(reflected, decisions.positive)
    failed = is_failure(reflected, decisions.positive) or decisions.partial == "literal"
    if not succeeded and not failed:
        return subgroup
    member = Member(reflected, reflected.reward, is_negative=not succeeded)
    others = list(subgroup.others)
    if succeeded or decisions.failed_reflection == "replace":
        others[position] = member
    else:
        others.append(member)
    return replace(subgroup, others=tuple(others))
