"""Group-relative baselines behind CARE's interface: GRPO, DAPO, GSPO, Dr. GRPO (paper Table 5).

They differ here in the group's advantage only. Clipping, the ratio's level, the KL and what the
loss is divided by are the `loss` section's (`config.TABLE_5`).
Sources: arXiv:2402.03300 (GRPO), 2503.14476 (DAPO), 2507.18071 (GSPO), 2503.20783 (Dr. GRPO).
"""

from collections.abc import Sequence

import torch

from care_train.algorithm.advantages import normalize_rewards
from care_train.algorithm.types import Credit, GroupUpdate, Region, Rollout, TrainSequence


def group_advantages(rewards: torch.Tensor, *, divide_by_std: bool = True) -> torch.Tensor:
    """[G] advantages over the whole group: the z-score of Eqs. 5-7, or Dr. GRPO's r - mean(r)."""
    if divide_by_std:
        return normalize_rewards(rewards)
    return rewards - rewards.mean()


def group_update(
    rollouts: Sequence[Rollout],
    *,
    divide_by_std: bool,
    length_normalized: bool,
    keep_without_signal: bool,
) -> GroupUpdate:
    """All G sequences with token-uniform credit; the loss's denominator counts every one.

    Args:
        rollouts: the group.
        divide_by_std: False for Dr. GRPO.
        length_normalized: token weights 1/T, so that a sequence's weights sum to 1 (GRPO, GSPO);
            otherwise 1 (DAPO, Dr. GRPO, whose loss has its own denominator).
        keep_without_signal: keep groups of equal rewards, whose only gradient is the KL's.
    """
    rewards = torch.tensor([rollout.reward for rollout in rollouts], dtype=torch.float64)
    num_tokens = sum(len(rollout.token_ids) for rollout in rollouts)
    spread = bool((rewards != rewards[0]).any())
    if not spread and not keep_without_signal:
        return GroupUpdate((), len(rollouts), num_tokens, skipped="no_signal")
    raw = group_advantages(rewards, divide_by_std=divide_by_std)
    advantages = raw.tolist() if spread else [0.0] * len(rollouts)
    return GroupUpdate(
        tuple(
            _uniform(rollout, advantage, length_normalized)
            for rollout, advantage in zip(rollouts, advantages, strict=True)
        ),
        len(rollouts),
        num_tokens,
    )


def has_mixed_outcomes(rollouts: Sequence[Rollout]) -> bool:
    """DAPO's dynamic sampling keeps a group only if some but not all of its answers are right."""
    num_correct = sum(rollout.accuracy == 1 for rollout in rollouts)
    return 0 < num_correct < len(rollouts)


def _uniform(rollout: Rollout, advantage: float, length_normalized: bool) -> TrainSequence:
    whole = Region(0, len(rollout.token_ids), 1.0)
    credit = Credit((0, 0), (0, 0), False, (whole,), normalize=length_normalized)
    return TrainSequence(rollout, advantage, credit, raw_advantage=advantage)
