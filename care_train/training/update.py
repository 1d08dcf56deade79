"""The optimiser's passes over one batch of rollouts (Algorithm 1, lines 42-43)."""

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch

from care_train.algorithm.types import GroupUpdate
from care_train.config import Config
from care_train.distributed import all_sum
from care_train.models.batch import ModelBatch
from care_train.training.engine import MicroBatch, PolicyEngine, StepResult
from care_train.training.groups import Group
from care_train.training.log_probs import Reference, TokenOutcome, TrainItem
from care_train.training.loss import (
    Denominators,
    local_denominators,
    loss_rows,
    sequence_scale,
    surrogate_of,
)
from care_train.training.micro_batches import agreed_micro_batches
from care_train.training.timer import timer


class PolicyUpdater:
    """Turns what groups train into micro-batches of the fused loss, and steps."""

    def __init__(self, engine: PolicyEngine, config: Config, reference: Reference | None) -> None:
        self._engine, self._config, self._reference = engine, config, reference

    def update(self, groups: Sequence[Group], items: Sequence[TrainItem]) -> list[StepResult]:
        """`train.num_iterations` passes of `train.mini_batches` optimiser steps each."""
        train = self._config.train
        size = -(-len(groups) // train.mini_batches)
        parts = [groups[part * size : (part + 1) * size] for part in range(train.mini_batches)]
        results = [
            self._update_once(
                [group.update for group in part],
                [item for item in items if any(item.group is group for group in part)],
            )
            for part in parts * train.num_iterations
        ]
        return [result for result in results if result is not None]

    def _update_once(
        self, updates: Sequence[GroupUpdate], items: Sequence[TrainItem]
    ) -> StepResult | None:
        """One optimiser step; None where no rank has anything to train, so not even KL moves."""
        local = [*local_denominators(updates), float(len(items))]
        *sums, trained = all_sum(local, self._engine.device)
        if trained == 0:
            return None
        with timer("collate"):
            own = [item.tokens for item in items]
            batches, count = agreed_micro_batches(own, self._config.train, self._engine.device)
            parts = [[items[i] for i in places] for places in batches]
            micro = [self._micro_batch(part, Denominators(*sums)) for part in parts]
            for _ in range(count - len(micro)):  # a forward of sharded weights takes all ranks
                self._exact_kl_arguments(self._engine.collate([self._engine.filler]))
        with timer("update"):
            result = self._engine.step(micro, self._config.rollout.temperature)
        for part, output in zip(parts, result.outputs, strict=True):
            lengths = [len(item.tokens.response_ids) for item in part]
            for item, length, end in zip(part, lengths, accumulate(lengths), strict=True):
                item.outcome = TokenOutcome(output, slice(end - length, end))
        return result

    def _micro_batch(self, items: Sequence[TrainItem], denominators: Denominators) -> MicroBatch:
        config, loss, device = self._config, self._config.loss, self._engine.device
        per_group = config.algorithm == "care" and config.care.decisions.normalize_over == "group"
        limit = config.rollout.max_new_tokens
        scales = [
            sequence_scale(item.group.update, denominators, loss, limit, per_group=per_group)
            for item in items
        ]
        batch = self._engine.collate([item.tokens for item in items])
        arguments: dict[str, Any] = {
            **loss_rows([item.sequence for item in items], scales, loss, device),
            "old_log_probs": self._join([item.old_log_probs for item in items]),
            "ref_log_probs": self._join([item.ref_log_probs for item in items]),
            "surrogate": surrogate_of(loss),
            "return_entropy": True,
            "kl_estimator": loss.kl_estimator,
            "ratio_level": loss.ratio_level,
        }
        normalizers = [item.old_log_normalizer for item in items]
        if all(normalizer is not None for normalizer in normalizers):
            arguments["old_log_normalizer"] = self._join(normalizers)
        weights = [item.importance_weights for item in items]
        if any(weight is not None for weight in weights):
            ones = [torch.ones(len(item.tokens.response_ids)) for item in items]
            arguments["importance_weights"] = self._join(
                [one if w is None else w for w, one in zip(weights, ones, strict=True)]
            )
        if loss.ratio_level == "sequence":
            arguments["sequence_ids"] = batch.sequence_ids
        arguments |= self._exact_kl_arguments(batch)
        labels = tuple(item.tokens.prompt.location or "a prompt" for item in items)
        return MicroBatch(batch, arguments, labels)

    def _exact_kl_arguments(self, batch: ModelBatch) -> dict[str, Any]:
        """Of the loss, where its KL sums over the vocabulary. All ranks call it equally often."""
        if self._reference is None or self._config.loss.kl_estimator != "exact":
            return {}
        with timer("reference"):
            return self._reference.exact_kl_arguments(batch)

    def _join(self, rows: Sequence[torch.Tensor | None]) -> torch.Tensor | None:
        """[N] on this rank's device, or None where the sequences carry none."""
        present = [row for row in rows if row is not None]
        if not present:
            return None
        assert len(present) == len(rows)
        return torch.cat([row.to(self._engine.device, torch.float32) for row in present])
