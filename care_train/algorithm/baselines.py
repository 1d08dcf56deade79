"""Baselines behind CARE's interface; they differ here in the advantage of a response only.

    grpo, dapo, gspo, cispo, sapo   z-score within the group
    dr_grpo                         reward less the group's mean
    rloo                            reward less the mean of the others
    reinforce_pp                    z-score within the whole batch

Clipping, the ratio's level, the surrogate, the KL and what the loss is divided by are the `loss`
section's (`config.TABLE_5`). Sources: arXiv:2402.03300 (GRPO), 2503.14476 (DAPO), 2507.18071
(GSPO), 2506.13585 (CISPO), 2511.20347 (SAPO), 2503.20783 (Dr. GRPO), 2402.14740 (RLOO), 2501.03262
(REINFORCE++).
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from care_train.algorithm.advantages import NORM_EPS, normalize_rewards
from care_train.algorithm.types import Credit, GroupUpdate, Region, Rollout, TrainSequence
from care_train.config import Algorithm


def group_advantages(rewards: torch.Tensor, algorithm: Algorithm) -> torch.Tensor:
    """[G] advantages from a group's rewards [G] alone; 0 where all rewards are equal."""
    if bool((rewards == rewards[0]).all()):
        return torch.zeros_like(rewards)
    if algorithm == "dr_grpo":
        return rewards - rewards.mean()
    if algorithm == "rloo":
        # r_i less the mean of the other G - 1 is this multiple of r_i less the mean of all G.
        return (rewards - rewards.mean()) * len(rewards) / (len(rewards) - 1)
    return normalize_rewards(rewards)


def batch_advantages(
    rewards: Sequence[torch.Tensor],
    lengths: Sequence[torch.Tensor],
    total: Callable[[list[float]], Sequence[float]],
) -> list[torch.Tensor]:
    """REINFORCE++ (arXiv:2501.03262): (r - mean) / std over all tokens of the batch.

    Every token has its response's reward, so that a response counts as often as it has tokens. 0
    where all rewards of the batch are equal.

    Args:
        rewards: [G] fp64 of each of this rank's groups.
        lengths: [G] tokens of each response.
        total: sums numbers over all ranks.
    """
    r, n = torch.cat(list(rewards)), torch.cat(list(lengths)).double()
    tokens, first, second = total([float(x) for x in (n.sum(), (n * r).sum(), (n * r * r).sum())])
    mean = first / tokens
    std = max(second / tokens - mean**2, 0.0) ** 0.5
    # Of equal rewards the sums leave a deviation of rounding errors.
    if std < 1e-7 * abs(mean):
        return [torch.zeros_like(group) for group in rewards]
    return [(group - mean) / (std + NORM_EPS) for group in rewards]


def baseline_updates(
    groups: Sequence[Sequence[Rollout]],
    algorithm: Algorithm,
    total: Callable[[list[float]], Sequence[float]],
    *,
    length_normalized: bool,
    keep_without_signal: bool,
) -> list[GroupUpdate]:
    """Each group's G sequences with token-uniform credit; the denominator counts every one.

    Args:
        groups: this rank's rollouts.
        algorithm: a baseline.
        total: sums numbers over all ranks; called once under `reinforce_pp`, else never.
        length_normalized: token weights 1/T (GRPO, GSPO) instead of 1 (DAPO, Dr. GRPO).
        keep_without_signal: keep groups without any advantage, whose only gradient is the KL's.
    """
    rewards = [torch.tensor([r.reward for r in group], dtype=torch.float64) for group in groups]
    if algorithm == "reinforce_pp":
        lengths = [torch.tensor([len(r.token_ids) for r in group]) for group in groups]
        advantages = batch_advantages(rewards, lengths, total)
    else:
        advantages = [group_advantages(own, algorithm) for own in rewards]
    return [
        _group_update(group, own.tolist(), length_normalized, keep_without_signal)
        for group, own in zip(groups, advantages, strict=True)
    ]


def _group_update(
    rollouts: Sequence[Rollout],
    advantages: Sequence[float],
    length_normalized: bool,
    keep_without_signal: bool,
) -> GroupUpdate:
    def trained(rollout: Rollout, advantage: float) -> TrainSequence:
        whole = Region(0, len(rollout.token_ids), 1.0)
        credit = Credit(regions=(whole,), normalize=length_normalized)
        return TrainSequence(rollout, advantage, credit, raw_advantage=advantage)

    has_signal = any(advantages) or keep_without_signal
    return GroupUpdate(
        tuple(map(trained, rollouts, advantages)) if has_signal else (),
        len(rollouts),
        sum(len(rollout.token_ids) for rollout in rollouts),
        skipped=None if has_signal else "no_signal",
    )


def without_truncated(update: GroupUpdate, counted: Sequence[Rollout]) -> GroupUpdate:
    """The update without responses that the length limit cut (`loss.mask_truncated`).

    Their rewards stay in their group's mean and deviation: only their tokens leave the loss.

    Args:
        update: of any algorithm.
        counted: the responses that its denominators count.
    """
    kept = tuple(sequence for sequence in update.sequences if sequence.rollout.finished)
    finished = [rollout for rollout in counted if rollout.finished]
    lost_all = bool(update.sequences) and not kept
    return replace(
        update,
        sequences=kept,
        num_sequences=len(finished),
        num_tokens=sum(len(rollout.token_ids) for rollout in finished),
        skipped="truncated" if lost_all else update.skipped,
    )


def has_mixed_outcomes(rollouts: Sequence[Rollout]) -> bool:
    """DAPO's dynamic sampling keeps a group only if some but not all of its answers are right."""
    num_correct = sum(rollout.accuracy == 1 for rollout in rollouts)
    return 0 < num_correct < len(rollouts)
