"""What a step reports: sums over all ranks, then ratios."""

from collections.abc import Sequence

import torch

from care_train.algorithm.types import GroupUpdate, Rollout
from care_train.distributed import all_sum, world_size
from care_train.training.engine import StepResult
from care_train.training.sampling import SampledGroup

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
)
"""Sums of one step; `a/b` is reported as the ratio of the sums a and b, `_a` not at all."""


class StepStatistics:
    """Counts of one step on this rank; `reduce` makes them the run's."""

    def __init__(
        self,
        groups: Sequence[SampledGroup],
        updates: Sequence[GroupUpdate],
        reflected: Sequence[Rollout | None],
        num_reflections_wanted: int,
        results: Sequence[StepResult],
        dropped: Sequence[SampledGroup] = (),
    ) -> None:
        """Count.

        Args:
            groups: the batch.
            updates: what each group trains.
            reflected: each group's reflection.
            num_reflections_wanted: reflections that groups asked for.
            results: of the optimiser's steps.
            dropped: groups that dynamic sampling sampled beside the batch: they cost as much, and
                say as much about the policy.
        """
        # Every rank sums the same keys, whatever its share of the batch holds.
        self._sums: dict[str, float] = dict.fromkeys(_KEYS, 0.0)
        repairs = [rollout for rollout in reflected if rollout is not None]
        self._count_rollouts([*groups, *dropped], repairs)
        self._count_groups(groups, updates, repairs)
        self._add("reflection_skipped", num_reflections_wanted - len(repairs))
        self._count_rows(results)

    def reduce(self, device: torch.device) -> dict[str, float]:
        """Metrics over all ranks, ratios formed from the sums."""
        keys = sorted(self._sums)
        total = dict(zip(keys, all_sum([self._sums[key] for key in keys], device), strict=True))
        values = {}
        for key, value in total.items():
            name, _, base = key.partition("/")
            if not base:
                values[name] = value
            elif total[base] > 0:
                values[name] = value / total[base]
        return {key: value for key, value in values.items() if not key.startswith("_")}

    def _add(self, key: str, value: float) -> None:
        self._sums[key] += float(value)

    def _count_rollouts(self, groups: Sequence[SampledGroup], repairs: Sequence[Rollout]) -> None:
        rollouts = [rollout for group in groups for rollout in group.rollouts]
        self._add("_rollouts", len(rollouts))
        self._add("reward/_rollouts", sum(r.reward for r in rollouts))
        self._add("accuracy/_rollouts", sum(r.accuracy for r in rollouts))
        self._add("format/_rollouts", sum(r.format_score for r in rollouts))
        self._add("finished/_rollouts", sum(r.finished for r in rollouts))
        self._add("response_length/_rollouts", sum(len(r.token_ids) for r in rollouts))
        self._add("think_length/_rollouts", sum(r.spans.think_length for r in rollouts))
        self._add("decoded_tokens", sum(len(r.token_ids) for r in [*rollouts, *repairs]))
        self._add("sampled_sequences", len(rollouts) + len(repairs))

    def _count_groups(
        self,
        groups: Sequence[SampledGroup],
        updates: Sequence[GroupUpdate],
        repairs: Sequence[Rollout],
    ) -> None:
        self._add("groups", len(groups))
        for group in groups:
            correct = [rollout.accuracy == 1 for rollout in group.rollouts]
            self._add("groups_all_correct", all(correct))
            self._add("groups_all_wrong", not any(correct))
        self._add("reflections", len(repairs))
        self._add("reflection_success/reflections", sum(r.accuracy == 1 for r in repairs))
        for update in updates:
            trains = bool(update.sequences)
            self._add("groups_skipped", not trains)
            self._add("groups_rescued", trains and update.rescued)
            self._add("anchor_clamped", update.anchor_clamped)
            self._add("trained_sequences", len(update.sequences))
            self._add("_trained_groups", trains)
            if trains:
                self._add("num_negatives/_trained_groups", update.num_negatives)
            for sequence in update.sequences:
                # The signature of Eqs. 9-10 is about these two.
                if sequence.role in ("anchor", "negative"):
                    self._add(f"_{sequence.role}", 1)
                    self._add(
                        f"{sequence.role}_raw_advantage/_{sequence.role}", sequence.raw_advantage
                    )

    def _count_rows(self, results: Sequence[StepResult]) -> None:
        applied = [result for result in results if result.applied]
        # Every rank makes the same updates, with the same gradient and a part of the loss.
        own_share = 1 / world_size()
        self._add("skipped_updates", (len(results) - len(applied)) * own_share)
        self._add("_updates", len(applied) * own_share)
        self._add("loss/_updates", sum(result.loss for result in applied))
        self._add("grad_norm/_updates", sum(result.grad_norm for result in applied) * own_share)
        for output in [output for result in applied for output in result.outputs]:
            self._add("_rows", len(output.log_probs))
            self._add("clipped_low/_rows", output.clipped_low.sum())
            self._add("clipped_high/_rows", output.clipped_high.sum())
            if output.kl is not None:
                self._add("kl/_rows", output.kl.sum())
