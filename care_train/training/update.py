"""The optimiser's passes over one batch of rollouts (Eqs. 11-13; Algorithm 1, lines 41-43)."""

from collections.abc import Sequence
from itertools import repeat
from typing import Any, NamedTuple

import torch

from care_kernels import Cispo, Clip, PolicyLoss, Sapo
from care_train.algorithm.region_weights import spread_advantages
from care_train.algorithm.types import GroupUpdate, TrainSequence
from care_train.config import Config, LossSettings
from care_train.distributed import all_sum
from care_train.models.batch import ModelBatch
from care_train.training.engine import MicroBatch, PolicyEngine, StepResult
from care_train.training.groups import Group
from care_train.training.log_probs import Reference, TrainItem
from care_train.training.micro_batches import agreed_micro_batches
from care_train.training.timer import timer


class Denominators(NamedTuple):
    """What the loss of one optimiser step is divided by, summed over ranks and micro-batches."""

    sequences: float
    """|S*| of Eq. 12, or all sampled sequences for a baseline."""
    tokens: float
    """Their response tokens."""
    groups: float
    """Groups that train."""


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
        local = [*_local_denominators(updates), float(len(items))]
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
            columns = [repeat(None) if c is None else c.split(lengths) for c in output[1:]]
            for item, *own in zip(part, *columns, strict=False):
                item.outcome = PolicyLoss(output.loss, *own)
        return result

    def _micro_batch(self, items: Sequence[TrainItem], denominators: Denominators) -> MicroBatch:
        loss, device = self._config.loss, self._engine.device
        scales = [_scale(item.group.update, denominators, self._config) for item in items]
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


def _local_denominators(updates: Sequence[GroupUpdate]) -> Denominators:
    """This rank's share."""
    return Denominators(
        float(sum(update.num_sequences for update in updates)),
        float(sum(update.num_tokens for update in updates)),
        float(sum(bool(update.sequences) for update in updates)),
    )


def _scale(update: GroupUpdate, denominators: Denominators, config: Config) -> float:
    """The factor 1/|S*| of Eq. 12, or what `loss.aggregation` puts in its place."""
    if config.loss.aggregation == "token":
        return 1.0 / denominators.tokens
    if config.loss.aggregation == "max_length":
        return 1.0 / (denominators.sequences * config.rollout.max_new_tokens)
    if config.algorithm == "care" and config.care.decisions.normalize_over == "group":
        return 1.0 / (update.num_sequences * denominators.groups)
    return 1.0 / denominators.sequences


def loss_rows(
    sequences: Sequence[TrainSequence],
    scales: Sequence[float],
    loss: LossSettings,
    device: torch.device,
) -> dict[str, torch.Tensor]:
    """The rows' coefficients of Eqs. 12-13, as arguments of `linear_policy_loss`.

    Args:
        sequences: at least one, whose credit differs in its regions alone.
        scales: what each advantage is multiplied by: 1/|S*|, or what stands in its place.
        loss: aggregation and coefficients.
        device: where the rows go.

    Returns:
        [N] float32 each, for sequences laid end to end: `advantages`, Eq. 11's a_{i,t} over the
        loss's denominator; where there is a KL `kl_weights`, beta times the row's share: the mean
        over the sequence, then over S*; and `entropy_weights` likewise.
    """
    lengths = [len(sequence.rollout.token_ids) for sequence in sequences]
    rows = {"advantages": spread_advantages(sequences, scales, device)}
    # Under a token mean, every token counts alike; otherwise every sequence does.
    is_sequence_mean = loss.aggregation == "sequence"
    shares = [s / n if is_sequence_mean else s for s, n in zip(scales, lengths, strict=True)]
    uniform = torch.tensor(shares, dtype=torch.float32, device=device).repeat_interleave(
        torch.tensor(lengths, device=device), output_size=sum(lengths)
    )
    if loss.kl_coef:
        rows["kl_weights"] = loss.kl_coef * uniform
    if loss.entropy_coef:
        rows["entropy_weights"] = loss.entropy_coef * uniform
    return rows


def surrogate_of(loss: LossSettings) -> Clip | Cispo | Sapo:
    """f of Eq. 12, or what `loss.surrogate` puts in its place."""
    if loss.surrogate == "cispo":
        return Cispo(1 + loss.clip_eps_high, 1 - loss.clip_eps_low)
    if loss.surrogate == "sapo":
        return Sapo()
    return Clip(loss.clip_eps_low, loss.clip_eps_high, loss.dual_clip)
