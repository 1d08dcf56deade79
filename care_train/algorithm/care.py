"""Algorithm 1 in order. Calls only: each equation lives where its name says.

    select_subgroup      lines 3-10 and 21-25   selection.py, advantages.rescue_rewards
    (the trainer samples the reflection)        reflection.reflection_prefix
    merge_reflection     lines 15-19            reflection.py
    subgroup_update      lines 26-41            advantages.py, region_weights.py

Not the paper's: `anchor: all`, `target_snr`, `think_share` and the kinds of `credit` but `regions`
(docs/experiments.md).

Line 41 (Eq. 11) is `care_kernels.token_advantages`, lines 42-43, the clipped surrogate and the KL
(Eqs. 12-13), are `care_kernels.linear_policy_loss`; `training.loss` hands them their rows.
"""

from dataclasses import replace

import torch

from care_train.algorithm.advantages import (
    adapt_negatives,
    equalize_factor,
    normalize_rewards,
    rescue_rewards,
    scale_negative,
)
from care_train.algorithm.fixability import Fixability
from care_train.algorithm.reflection import choose_reflected_negative, merge_reflection
from care_train.algorithm.region_weights import departures, token_credit
from care_train.algorithm.released import released_credit
from care_train.algorithm.selection import (
    failures,
    positives,
    select_anchor,
    select_hard_negatives,
    select_proxy_anchor,
    select_spread,
)
from care_train.algorithm.types import (
    GroupUpdate,
    Member,
    Rollout,
    RolloutGroup,
    Subgroup,
    TrainSequence,
    skipped_update,
)
from care_train.config import CareSettings


def skip_before_forward(rollouts: tuple[Rollout, ...], settings: CareSettings) -> str | None:
    """Why a group needs no forward of the old policy (line 7); None where it does."""
    num_positives = len(positives(rollouts, settings.decisions.positive))
    num_failures = len(failures(rollouts, settings.decisions.positive))
    if num_positives:
        if num_failures:
            return None
        return "all_correct" if num_positives == len(rollouts) else "no_failures"
    all_wrong = num_failures == len(rollouts)
    # A partially correct rollout carries a real signal: rescue is for groups without any.
    rescuable = all_wrong or settings.decisions.partial == "literal"
    if settings.rescue > 0 and rescuable and num_failures >= 2:
        return None
    return "all_wrong" if all_wrong else "no_positives"


def select_subgroup(
    group: RolloutGroup,
    settings: CareSettings,
    generator: torch.Generator | None = None,
    fixability: Fixability | None = None,
) -> Subgroup | str:
    """Lines 3-10 and 21-25: S, or the reason the group is skipped.

    Args:
        group: with distances and log-prob sums, unless it is skipped before them.
        settings: CARE's.
        generator: for the random selectors.
        fixability: for `selector: learned`.

    Raises:
        ValueError: `selector: learned` without it.
    """
    if settings.selector == "learned" and fixability is None:
        raise ValueError(
            "care.selector: got learned, wanted another one here: it learns from the reflections "
            "of care-train's own trainer"
        )
    skipped = skip_before_forward(group.rollouts, settings)
    if skipped is not None:
        return skipped
    if not positives(group.rollouts, settings.decisions.positive):
        return _rescue_subgroup(group, settings, generator)
    return _anchored_subgroup(group, settings, generator, fixability)


def _anchored_subgroup(
    group: RolloutGroup,
    settings: CareSettings,
    generator: torch.Generator | None,
    fixability: Fixability | None,
) -> Subgroup:
    rollouts, by = group.rollouts, settings.decisions.positive
    pool = failures(rollouts, by)
    anchor = select_anchor(rollouts, positives(rollouts, by), settings, generator)
    count = min(settings.max_negatives, len(pool))  # Eq. 3
    assert group.distances is not None
    likely = fixability.log_odds(group, anchor, pool) if fixability is not None else ()
    chosen = select_hard_negatives(
        pool, count, group.distances, anchor, settings, generator, likely
    )
    scale = 1.0
    if settings.target_snr is not None:
        similarity = 1 - group.distances[chosen][:, chosen]
        count, scale = adapt_negatives(similarity, settings.neg_scale, settings.target_snr)
        chosen = chosen[:count]
    subgroup = Subgroup(
        anchor=Member(rollouts[anchor], rollouts[anchor].reward, is_negative=False, index=anchor),
        others=tuple(Member(rollouts[i], rollouts[i].reward, True, i) for i in chosen),
    )
    reflect_on = choose_reflected_negative(subgroup, settings.reflection, generator)
    more = [i for i in positives(rollouts, by) if settings.anchor == "all" and i != anchor]
    anchors = tuple(Member(rollouts[i], rollouts[i].reward, False, i) for i in more)
    others = subgroup.others + anchors
    return replace(subgroup, others=others, reflect_on=reflect_on, scale=scale)


def _rescue_subgroup(
    group: RolloutGroup, settings: CareSettings, generator: torch.Generator | None
) -> Subgroup | str:
    rollouts = group.rollouts
    pool = failures(rollouts, settings.decisions.positive)
    assert group.log_prob_sums is not None and group.distances is not None
    proxy = select_proxy_anchor(rollouts, pool, group.log_prob_sums, settings.decisions)
    if proxy is None:
        return "no_proxy_anchor"
    rest = [i for i in pool if i != proxy]
    count = min(settings.max_negatives, len(rest))
    if settings.decisions.rescue_negatives == "spread":
        chosen = select_spread(rest, count, group.distances, proxy)
    else:
        chosen = select_hard_negatives(rest, count, group.distances, proxy, settings, generator)
    literal = settings.decisions.rescue_size == "literal"
    divisor = min(settings.max_negatives, len(pool)) if literal else count
    shaped = rescue_rewards(count, divisor).tolist()
    members = [
        Member(rollouts[i], r, is_negative=place > 0, index=i)
        for place, (i, r) in enumerate(zip([proxy, *chosen], shaped, strict=True))
    ]
    return Subgroup(members[0], tuple(members[1:]), rescued=True)


def subgroup_update(
    subgroup: Subgroup, settings: CareSettings, reflected: Rollout | None = None
) -> GroupUpdate:
    """Lines 15-19 and 26-41: advantages and token weights of S*, or why there are none."""
    if reflected is not None:
        subgroup = merge_reflection(subgroup, reflected, settings)
    num_negatives = count_negatives(subgroup, settings)  # line 26
    if num_negatives == 0:
        return skipped_update("no_negatives", rescued=subgroup.rescued)
    if subgroup.rescued and settings.credit == "departure":
        # All are wrong: where one leaves another says nothing about which token went wrong.
        settings = replace(settings, credit="regions")
    if subgroup.rescued and settings.credit == "steps":
        if not all(member.rollout.spans.wrong_step for member in subgroup.members):
            return skipped_update("no_wrong_step", rescued=True)
    shaped = torch.tensor([m.shaped_reward for m in subgroup.members], dtype=torch.float64)
    raw = normalize_rewards(shaped).tolist()
    factor = equalize_factor(num_negatives, settings.max_negatives) if settings.equalize else 1.0
    scale = factor * (settings.rescue if subgroup.rescued else 1.0)
    clamped = settings.decisions.clamp_anchor and raw[0] < 0
    starts = departures(subgroup) if settings.credit == "departure" else [0] * len(raw)
    sequences = []
    for place, (member, raw_advantage) in enumerate(zip(subgroup.members, raw, strict=True)):
        is_anchor = place == 0
        advantage = max(raw_advantage, 0.0) if is_anchor and clamped else raw_advantage
        if not is_anchor and _is_penalized(member, settings):
            advantage = scale_negative(raw_advantage, subgroup.scale * _scale_of(member, settings))
        advantage *= scale
        if advantage != 0:  # S* = {i : A[y_i] != 0}
            sequence = _train_sequence(member, subgroup, advantage, settings, starts[place])
            sequences.append(replace(sequence, raw_advantage=raw_advantage))
    return GroupUpdate(
        tuple(sequences),
        num_sequences=len(sequences),
        num_tokens=sum(len(sequence.rollout.token_ids) for sequence in sequences),
        skipped=None if sequences else "no_signal",
        num_negatives=num_negatives,
        equalize_factor=factor,
        anchor_clamped=clamped,
        rescued=subgroup.rescued,
    )


def count_negatives(subgroup: Subgroup, settings: CareSettings) -> int:
    """Line 26: K_S, the members that failed, or as `count_negatives_by` has it."""
    if settings.decisions.count_negatives_by == "members":
        return len(subgroup.others)
    if settings.decisions.count_negatives_by == "accuracy":
        return subgroup.num_negatives
    bar = subgroup.anchor.shaped_reward
    return sum(member.shaped_reward < bar for member in subgroup.others)


def _is_penalized(member: Member, settings: CareSettings) -> bool:
    """Eq. 8 names the negatives; line 37 to the letter names a verified repair too."""
    if member.is_negative or not member.rollout.reflected:
        return member.is_negative
    return settings.decisions.repaired_advantage == "penalized"


def _scale_of(member: Member, settings: CareSettings) -> float:
    failed_reflection = member.rollout.reflected and member.is_negative
    return settings.reflect_scale if failed_reflection else settings.neg_scale


def _train_sequence(
    member: Member, subgroup: Subgroup, advantage: float, settings: CareSettings, departure: int
) -> TrainSequence:
    is_anchor = member is subgroup.anchor
    # Line 40 reads acc: a pseudo-anchor is a failure, and its rationale earns nothing.
    earns_rationale = not member.is_negative and not subgroup.rescued
    if settings.decisions.spans == "tokens" and settings.credit == "regions":
        credit = released_credit(
            member.rollout, settings.think_weight, earns_rationale=earns_rationale
        )
    else:
        credit = token_credit(
            member.rollout,
            settings,
            is_negative=member.is_negative,
            earns_rationale=earns_rationale,
            departure=departure,
        )
    if member.rollout.reflected:
        role = "reflected_failure" if member.is_negative else "reflected_success"
    elif is_anchor:
        role = "proxy_anchor" if subgroup.rescued else "anchor"
    else:
        role = "negative" if member.is_negative else "positive"
    return TrainSequence(rollout=member.rollout, advantage=advantage, credit=credit, role=role)
