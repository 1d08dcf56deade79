"""What a step says of its tokens and advantages: deviation, entropy, and the paper's Fig. 6."""

from collections.abc import Sequence
from statistics import pstdev

import torch

from care_train.algorithm.region_weights import spread_advantages
from care_train.distributed import all_sum
from care_train.training.groups import Group
from care_train.training.log_probs import TrainItem


def token_metrics(
    groups: Sequence[Group], items: Sequence[TrainItem], device: torch.device
) -> dict[str, float]:
    """Diagnostics over all ranks; what nothing was measured of is left out. A collective call.

    Args:
        groups: this rank's batch.
        items: the sequences it trained, with what the update said of them.
        device: for the collective.

    Returns:
        `reward_std`: the rewards' standard deviation within a group, mean over groups.
        `entropy`: in nats per token; estimated without bias from the sampled tokens alone, as the
        mean of -log pi_old.
        `clipped_negative_answer`: share of the answers' tokens with a negative advantage that the
        lower clip bound took the gradient of (Fig. 6, left).
        `advantage_variance_ratio`: Var(A[y-]) / Var(A[y+]) (Fig. 6, right).
    """
    deviations = [pstdev([rollout.reward for rollout in group.rollouts]) for group in groups]
    surprise, sampled = _surprise(groups, items)
    clipped, answers = _clipped_answers(items)
    sums = [sum(deviations), float(len(groups)), surprise, sampled, clipped, answers]
    advantages = [item.sequence.advantage for item in items]
    for part in ([a for a in advantages if a > 0], [a for a in advantages if a < 0]):
        sums += [sum(part), sum(a * a for a in part), float(len(part))]
    total = all_sum(sums, device)
    names = ("reward_std", "entropy", "clipped_negative_answer")
    values = {
        name: above / below
        for name, above, below in zip(names, total[:6:2], total[1:6:2], strict=True)
        if below
    }
    positive, negative = _variance(*total[6:9]), _variance(*total[9:12])
    if positive:
        values["advantage_variance_ratio"] = negative / positive
    return values


def _surprise(groups: Sequence[Group], items: Sequence[TrainItem]) -> tuple[float, float]:
    """Sum of -log pi_old of the rollouts' tokens, and their number.

    A baseline runs the old policy on what it trains alone; that leaves out whole groups that are
    all right or all wrong.
    """
    known = [r.old_log_probs for group in groups for r in group.rollouts]
    if items and all(log_probs is None for log_probs in known):
        sequences = [item.sequence for item in items]
        lengths = [len(sequence.rollout.token_ids) for sequence in sequences]
        credited = spread_advantages(sequences).split(lengths)
        known = list(map(TrainItem.known_old_log_probs, items, credited))
    present = [log_probs for log_probs in known if log_probs is not None]
    if not present:
        return 0.0, 0.0
    joined = torch.cat(present)
    return -float(joined.sum()), float(len(joined))


def _clipped_answers(items: Sequence[TrainItem]) -> tuple[float, float]:
    """How many tokens of negatives' answers were clipped, and how many there are."""
    parts = [
        item.outcome.clipped_low[slice(*item.sequence.rollout.spans.answer)]
        for item in items
        if item.outcome is not None
        and item.sequence.advantage < 0
        and item.sequence.rollout.spans.answer is not None
    ]
    if not parts:
        return 0.0, 0.0
    joined = torch.cat(parts)
    return float(joined.sum()), float(len(joined))


def _variance(total: float, squares: float, count: float) -> float:
    """Population variance; 0 where there is none to speak of."""
    if count < 2:
        return 0.0
    variance = squares / count - (total / count) ** 2
    return variance if variance > 1e-12 else 0.0
