"""What a step reports: sums over all ranks, then ratios; and the gap between trainer and engine.

A rollout engine computes the policy with other kernels, batches and caches than the trainer, and
may have other weights without anyone's intent. Engines that return log-probs (vLLM) are measured
on every batch.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, pstdev

import torch

from care_train.algorithm.types import GroupUpdate, Rollout
from care_train.distributed import all_sum, gather, world_size
from care_train.training.engine import StepResult
from care_train.training.failures import EngineError
from care_train.training.groups import Group
from care_train.training.log_probs import TrainItem

_KEYS = (
    "_rollouts",
    "reward/_rollouts",
    "accuracy/_rollouts",
    "format/_rollouts",
    "finished/_rollouts",
    "response_length/_rollouts",
    "think_length/_rollouts",
    "decoded_tokens",
    "sampled_sequences",
    "groups",
    "reward_std/groups",
    "groups_all_correct",
    "groups_all_wrong",
    "groups_skipped",
    "groups_rescued",
    "anchor_clamped",
    "trained_sequences",
    "reflections",
    "reflection_skipped",
    "reflection_success/reflections",
    "_trained_groups",
    "num_negatives/_trained_groups",
    "_anchor",
    "anchor_raw_advantage/_anchor",
    "_negative",
    "negative_raw_advantage/_negative",
    "skipped_updates",
    "_updates",
    "loss/_updates",
    "grad_norm/_updates",
    "_rows",
    "clipped_low/_rows",
    "clipped_high/_rows",
    "kl/_rows",
    "_active_rows",
    "entropy/_active_rows",
)
"""Sums of one step; `a/b` is reported as the ratio of the sums a and b, `_a` not at all."""


def step_metrics(
    groups: Sequence[Group],
    results: Sequence[StepResult],
    device: torch.device,
    dropped: Sequence[Group] = (),
) -> dict[str, float]:
    """A step's metrics over all ranks, ratios formed from the sums. A collective call.

    Args:
        groups: this rank's batch.
        results: of the optimiser's steps.
        device: for the collective.
        dropped: groups that dynamic sampling sampled beside the batch: they cost as much, and say
            as much about the policy.
    """
    # Every rank sums the same keys, whatever its share of the batch holds.
    sums = dict.fromkeys(_KEYS, 0.0)
    reflected = [group.reflected for group in groups if group.reflected is not None]
    everything = [*groups, *dropped]
    sums |= _of_rollouts([rollout for group in everything for rollout in group.rollouts], reflected)
    sums |= _of_groups(groups, reflected)
    sums |= _of_updates([group.update for group in groups])
    sums |= _of_rows(results)
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


def function_metrics(found: Mapping[str, list[float]]) -> dict[str, float]:
    """Mean and standard deviation over all ranks of what reward functions gave. A collective call.

    Args:
        found: this rank's values by name.
    """
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
        "_active_rows": sum(len(rows) for result in applied for rows in result.entropies),
        "entropy/_active_rows": sum(
            float(rows.sum()) for result in applied for rows in result.entropies
        ),
        "kl/_rows": sum(float(o.kl.sum()) for o in outputs if o.kl is not None),
    }


@dataclass(frozen=True)
class WorstToken:
    """Where trainer and engine differ most."""

    gap: float
    """|difference| of the log-probs in nats."""
    location: str = ""
    """The prompt's file and row."""
    place: int = 0
    """Index of the response token."""
    token_id: int = 0
    trainer: float = 0.0
    engine: float = 0.0

    def __str__(self) -> str:
        return (
            f"{self.location}: response token {self.place} (id {self.token_id}): log-prob "
            f"{self.trainer:.4f} in the trainer, {self.engine:.4f} in the engine"
        )


def engine_gap(
    groups: Sequence[Group], items: Sequence[TrainItem], device: torch.device
) -> tuple[dict[str, float], WorstToken | None]:
    """How far the trainer's log-probs are from those of the engine that sampled, over all ranks.

    A collective call.

    Returns:
        `gap_mean` and `gap_max` of |trainer - engine| in nats per token, and `gap_k3`, the k3
        estimate of KL[engine || trainer]; and the worst token. Nothing where nothing was measured.
    """
    sums, worst = [0.0, 0.0, 0.0], WorstToken(-1.0)
    for group, rollout, trainer in _measured(groups, items):
        engine = torch.tensor(rollout.log_probs)
        difference = trainer - engine
        gaps = difference.abs()
        sums[0] += float(gaps.sum())
        sums[1] += float((difference.exp() - 1 - difference).sum())
        sums[2] += len(gaps)
        place = int(gaps.argmax())
        if not float(gaps[place]) <= worst.gap:  # also where it is NaN
            worst = WorstToken(
                float(gaps[place]),
                group.sample.location or group.sample.id,
                place,
                rollout.token_ids[place],
                float(trainer[place]),
                float(engine[place]),
            )
    gap, k3, count = all_sum(sums, device)
    if not count:
        return {}, None
    worst = max(gather(worst), key=lambda token: token.gap)
    return {"gap_mean": gap / count, "gap_k3": k3 / count, "gap_max": worst.gap}, worst


def check_engine_gap(
    values: dict[str, float], worst: WorstToken | None, limit: float | None
) -> None:
    """Stop a run whose engine samples from another policy than the trainer's.

    Args:
        values: `engine_gap`'s.
        worst: its token.
        limit: `rollout.max_log_prob_gap` in nats per token; None: no limit.

    Raises:
        EngineError: the mean gap is over the limit, or not finite.
    """
    if worst is None or limit is None or values["gap_mean"] <= limit:
        return
    raise EngineError(
        f"rollout.max_log_prob_gap: trainer and engine are {values['gap_mean']:.4g} nats per token "
        f"apart, wanted at most {limit:g}: they do not compute the same policy. Worst: {worst}"
    )


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
