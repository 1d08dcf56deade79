"""Algorithm 1 in order. Calls only: each equation lives where its name says.

    select_subgroup      lines 3-12 and 21-25   selection.py, advantages.rescue_rewards
    (the trainer samples the reflection)        selection.reflection_prefix
    subgroup_update      lines 15-19            selection.merge_reflection
                         lines 26-41            advantages.py, region_weights.py

Not the paper's: `anchor: all`, `target_snr`, a `think_weight` in percent and the kinds of `credit`
but `regions` (docs/experiments.md).

Line 41 (Eq. 11) is `care_kernels.token_advantages`, lines 42-43, the clipped surrogate and the KL
(Eqs. 12-13), are `care_kernels.linear_policy_loss`; `training.update` makes their rows.
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
from care_train.algorithm.region_weights import departures, token_credit
from care_train.algorithm.released import released_credit
from care_train.algorithm.selection import (
    choose_reflected_negative,
    failures,
    merge_reflection,
    positives,
    select_anchor,
    select_hard_negatives,
    select_proxy_anchor,
    select_spread,
)
from care_train.algorithm.types import (
    Credit,
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

    def member(i: int, is_negative: bool) -> Member:
        return Member(rollouts[i], rollouts[i].reward, is_negative, index=i)

    others = [member(i, True) for i in chosen]
    if settings.anchor == "all":
        others += [member(i, False) for i in positives(rollouts, by) if i != anchor]
    reflect_on = choose_reflected_negative(len(chosen), settings.reflection, generator)
    return Subgroup(member(anchor, False), tuple(others), reflect_on=reflect_on, scale=scale)


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
    penalizes_repairs = settings.decisions.repaired_advantage == "penalized"
    starts = departures(subgroup) if settings.credit == "departure" else [0] * len(raw)
    sequences = []
    for member, raw_advantage, start in zip(subgroup.members, raw, starts, strict=True):
        is_reflected, advantage = member.rollout.reflected, raw_advantage
        if member is subgroup.anchor:
            advantage = 0.0 if clamped else advantage
        # Eq. 8 names the negatives; line 37 to the letter names a verified repair too.
        elif member.is_negative or (is_reflected and penalizes_repairs):
            has_failed = is_reflected and member.is_negative
            own = settings.reflect_scale if has_failed else settings.neg_scale
            advantage = scale_negative(raw_advantage, subgroup.scale * own)
        if advantage != 0:  # S* = {i : A[y_i] != 0}
            sequence = TrainSequence(
                member.rollout,
                advantage * scale,
                _credit(member, subgroup, settings, start),
                _role(member, subgroup),
                raw_advantage,
            )
            sequences.append(sequence)
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


def _credit(member: Member, subgroup: Subgroup, settings: CareSettings, departure: int) -> Credit:
    # Line 40 reads acc: a pseudo-anchor is a failure, and its rationale earns nothing.
    earns = not member.is_negative and not subgroup.rescued
    if settings.decisions.spans == "tokens" and settings.credit == "regions":
        return released_credit(member.rollout, settings.gamma, earns_rationale=earns)
    return token_credit(
        member.rollout,
        settings,
        is_negative=member.is_negative,
        earns_rationale=earns,
        departure=departure,
    )


def _role(member: Member, subgroup: Subgroup) -> str:
    if member.rollout.reflected:
        return "reflected_failure" if member.is_negative else "reflected_success"
    if member is subgroup.anchor:
        return "proxy_anchor" if subgroup.rescued else "anchor"
    return "negative" if member.is_negative else "positive"
