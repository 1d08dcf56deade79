"""What a step reports: sums over all ranks, then ratios; and the gap between trainer and engine.

A rollout engine computes the policy with other kernels, batches and caches than the trainer, and
may have other weights without anyone's intent. Engines that return log-probs (vLLM) are measured
on every batch.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from statistics import fmean, pstdev

import torch

from care_train.algorithm.types import GroupUpdate, Rollout
from care_train.distributed import all_sum, gather, world_size
from care_train.training.engine import StepResult
from care_train.training.failures import EngineError
from care_train.training.groups import Group
from care_train.training.log_probs import TrainItem, known_old_log_probs


def step_metrics(
    groups: Sequence[Group],
    dropped: Sequence[Group],
    items: Sequence[TrainItem],
    results: Sequence[StepResult],
    device: torch.device,
) -> dict[str, float]:
    """A step's metrics over all ranks, ratios formed from the sums. A collective call.

    What nothing was measured of is left out.

    Args:
        groups: the batch.
        dropped: those that dynamic sampling sampled beside it: they cost as much, and say as much
            about the policy.
        items: what the batch trained.
        results: of the updates.
        device: this rank's.
    """
    reflected = [group.reflected for group in groups if group.reflected is not None]
    rollouts = [rollout for group in [*groups, *dropped] for rollout in group.rollouts]
    sums = _of_rollouts(rollouts, reflected) | _of_groups(groups, reflected)
    sums |= _of_updates([group.update for group in groups]) | _of_rows(results)
    sums |= _surprise(groups, items) | _clipped_answers(items) | _moments(items)
    values = _ratios(sums, device)
    positive, negative = (
        _variance(*(values.pop(f"{sign}_{name}") for name in ("sum", "squares", "count")))
        for sign in ("positive", "negative")
    )
    if positive:  # Var(A[y-]) / Var(A[y+]) (Fig. 6, right)
        values["advantage_variance_ratio"] = negative / positive
    return values


def function_metrics(found: Mapping[str, list[float]]) -> dict[str, float]:
    """Mean and deviation over all ranks of what reward functions gave. A collective call."""
    merged: dict[str, list[float]] = {}
    for own in gather(dict(found)):
        for name, values in own.items():
            merged.setdefault(name, []).extend(values)
    return {
        f"reward_{name}_{kind}": value
        for name, values in sorted(merged.items())
        if values
        for kind, value in (("mean", fmean(values)), ("std", pstdev(values)))
    }


def _ratios(sums: Mapping[str, float], device: torch.device) -> dict[str, float]:
    """This rank's sums, added up over ranks: `a/b` becomes the ratio of the sums a and b, left out
    where b is 0, and `_a` is not reported. Every rank has the same keys."""
    keys = sorted(sums)
    total = dict(zip(keys, all_sum([sums[key] for key in keys], device), strict=True))
    values = {}
    for key, value in total.items():
        name, _, base = key.partition("/")
        if not base:
            values[name] = value
        elif total[base] > 0:
            values[name] = value / total[base]
    return {key: value for key, value in values.items() if not key.startswith("_")}


def _of_rollouts(rollouts: Sequence[Rollout], reflected: Sequence[Rollout]) -> dict[str, float]:
    return {
        "_rollouts": len(rollouts),
        "reward/_rollouts": sum(r.reward for r in rollouts),
        "accuracy/_rollouts": sum(r.accuracy for r in rollouts),
        "format/_rollouts": sum(r.format_score for r in rollouts),
        "finished/_rollouts": sum(r.finished for r in rollouts),
        "response_length/_rollouts": sum(len(r.token_ids) for r in rollouts),
        "think_length/_rollouts": sum(r.spans.think_length for r in rollouts),
        "decoded_tokens": sum(len(r.token_ids) for r in [*rollouts, *reflected]),
        "sampled_sequences": len(rollouts) + len(reflected),
    }


def _of_groups(groups: Sequence[Group], reflected: Sequence[Rollout]) -> dict[str, float]:
    correct = [[rollout.accuracy == 1 for rollout in group.rollouts] for group in groups]
    subgroups = [group.subgroup for group in groups if not isinstance(group.subgroup, str)]
    wanted = sum(subgroup.reflect_on is not None for subgroup in subgroups)
    return {
        "groups": len(groups),
        # The standard deviation within a group, mean over groups.
        "reward_std/groups": sum(pstdev(r.reward for r in group.rollouts) for group in groups),
        "groups_all_correct": sum(map(all, correct)),
        "groups_all_wrong": sum(not any(found) for found in correct),
        "reflections": len(reflected),
        "reflection_skipped": wanted - len(reflected),
        "reflection_success/reflections": sum(r.accuracy == 1 for r in reflected),
    }


def _of_updates(updates: Sequence[GroupUpdate]) -> dict[str, float]:
    trained = [update for update in updates if update.sequences]
    sequences = [sequence for update in trained for sequence in update.sequences]
    sums: dict[str, float] = {
        "groups_skipped": sum(update.skipped is not None for update in updates),
        "groups_rescued": sum(update.rescued for update in trained),
        "anchor_clamped": sum(update.anchor_clamped for update in updates),
        "trained_sequences": len(sequences),
        "_trained_groups": len(trained),
        "num_negatives/_trained_groups": sum(update.num_negatives for update in trained),
    }
    for role in ("anchor", "negative"):  # The signature of Eqs. 9-10 is about these two.
        raw = [s.raw_advantage for s in sequences if s.role == role]
        sums |= {f"_{role}": len(raw), f"{role}_raw_advantage/_{role}": sum(raw)}
    return sums


def _of_rows(results: Sequence[StepResult]) -> dict[str, float]:
    applied = [result for result in results if result.applied]
    outputs = [output for result in applied for output in result.outputs]
    # Every rank makes the same updates, with the same gradient and a part of the loss.
    own_share = 1 / world_size()
    return {
        "skipped_updates": (len(results) - len(applied)) * own_share,
        "_updates": len(applied) * own_share,
        "loss/_updates": sum(result.loss for result in applied),
        "grad_norm/_updates": sum(result.grad_norm for result in applied) * own_share,
        "_rows": sum(len(output.log_probs) for output in outputs),
        "clipped_low/_rows": sum(float(output.clipped_low.sum()) for output in outputs),
        "clipped_high/_rows": sum(float(output.clipped_high.sum()) for output in outputs),
        "kl/_rows": sum(float(o.kl.sum()) for o in outputs if o.kl is not None),
    }


def _surprise(groups: Sequence[Group], items: Sequence[TrainItem]) -> dict[str, float]:
    """`entropy` in nats per token, estimated without bias from the sampled tokens alone: the mean
    of -log pi_old over the rollouts' tokens.

    A baseline runs the old policy on what it trains alone; that leaves out whole groups that are
    all right or all wrong.
    """
    known = [r.old_log_probs for group in groups for r in group.rollouts]
    if all(log_probs is None for log_probs in known):
        known = known_old_log_probs(items)
    total, count = _sum([log_probs for log_probs in known if log_probs is not None])
    return {"_sampled": count, "entropy/_sampled": -total}


def _clipped_answers(items: Sequence[TrainItem]) -> dict[str, float]:
    """`clipped_negative_answer`: the share of the answers' tokens with a negative advantage that
    the lower clip bound took the gradient of (Fig. 6, left)."""
    parts = [
        item.outcome.clipped_low[slice(*item.sequence.rollout.spans.answer)]
        for item in items
        if item.outcome is not None
        and item.sequence.advantage < 0
        and item.sequence.rollout.spans.answer is not None
    ]
    clipped, count = _sum(parts)
    return {"_answers": count, "clipped_negative_answer/_answers": clipped}


def _sum(parts: Sequence[torch.Tensor]) -> tuple[float, float]:
    """The sum of the parts' numbers, fetched from their device at once, and how many there are."""
    if not parts:
        return 0.0, 0.0
    joined = torch.cat(list(parts))
    return float(joined.sum()), float(len(joined))


def _moments(items: Sequence[TrainItem]) -> dict[str, float]:
    """Of the sequences' advantages, by their sign."""
    advantages = [item.sequence.advantage for item in items]
    sums = {}
    for sign, own in (
        ("positive", [a for a in advantages if a > 0]),
        ("negative", [a for a in advantages if a < 0]),
    ):
        moments = {"sum": sum(own), "squares": sum(a * a for a in own), "count": float(len(own))}
        sums |= {f"{sign}_{name}": value for name, value in moments.items()}
    return sums


def _variance(total: float, squares: float, count: float) -> float:
    """Population variance; 0 where there is none to speak of."""
    if count < 2:
        return 0.0
    variance = squares / count - (total / count) ** 2
    return variance if variance > 1e-12 else 0.0


def engine_gap(
    groups: Sequence[Group],
    items: Sequence[TrainItem],
    device: torch.device,
    limit: float | None = None,
) -> dict[str, float]:
    """How far the trainer's log-probs are from those of the engine that sampled, over all ranks.

    A collective call.

    Returns:
        `gap_mean` and `gap_max` of |trainer - engine| in nats per token, and `gap_k3`, the k3
        estimate of KL[engine || trainer]. Nothing where nothing was measured.

    Raises:
        EngineError: the mean is over `limit`, or not finite: the engine samples from another
            policy than the trainer's.
    """
    sums, largest, worst = [0.0, 0.0, 0.0], -1.0, ""
    for group, rollout, trainer in _measured(groups, items):
        engine = torch.tensor(rollout.log_probs)
        difference = trainer - engine
        gaps = difference.abs()
        sums[0] += float(gaps.sum())
        sums[1] += float((difference.exp() - 1 - difference).sum())
        sums[2] += len(gaps)
        place = int(gaps.argmax())  # a NaN's, where there is one
        gap = float(gaps[place].nan_to_num(nan=math.inf))
        if gap > largest:
            largest = gap
            worst = (
                f"{group.sample.where}: response token {place} (id "
                f"{rollout.token_ids[place]}): log-prob {trainer[place]:.4f} in the trainer, "
                f"{engine[place]:.4f} in the engine"
            )
    total, k3, count = all_sum(sums, device)
    if not count:
        return {}
    largest, worst = max(gather((largest, worst)))
    mean = total / count
    if limit is not None and not mean <= limit:
        raise EngineError(
            f"rollout.max_log_prob_gap: trainer and engine are {mean:.4g} nats per token apart, "
            f"wanted at most {limit:g}: they do not compute the same policy. Worst: {worst}"
        )
    return {"gap_mean": mean, "gap_k3": k3 / count, "gap_max": largest}


def _measured(
    groups: Sequence[Group], items: Sequence[TrainItem]
) -> Iterator[tuple[Group, Rollout, torch.Tensor]]:
    """Each rollout once that both trainer and engine have log-probs of, with the trainer's."""
    found = [(g, r, r.old_log_probs) for g in groups for r in g.rollouts]
    found += [
        (item.group, item.sequence.rollout, item.sampled_log_probs)
        for item in items
        if item.sequence.rollout.old_log_probs is None
    ]
    for group, rollout, trainer in found:
        if trainer is not None and rollout.log_probs is not None:
            yield group, rollout, trainer
