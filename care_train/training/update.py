"""The optimiser's passes over one batch of rollouts (Algorithm 1, lines 42-43)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from care_kernels import Clip
from care_train.algorithm.types import GroupUpdate, Rollout, TrainSequence
from care_train.config import Config
from care_train.distributed import all_sum
from care_train.models.batch import ModelBatch, TokenSequence
from care_train.training.engine import MicroBatch, PolicyEngine, StepResult
from care_train.training.loss import (
    Denominators,
    LossRows,
    local_denominators,
    loss_rows,
    sequence_scale,
)
from care_train.training.micro_batches import MicroBatchLimits, agreed_micro_batches
from care_train.training.mismatch import Mismatch, importance_weights
from care_train.training.reference import Reference
from care_train.training.sampling import SampledGroup
from care_train.training.scoring import SequenceScorer
from care_train.training.timer import timer

IMPORTANCE_CAP = 2.0
"""Truncation of the importance weight of a reflection trained without its context."""


@dataclass(frozen=True)
class TrainItem:
    """One sequence of S* ready for the optimiser."""

    place: int
    """Its group's place in the batch."""
    update: GroupUpdate
    sequence: TrainSequence
    tokens: TokenSequence = field(repr=False)
    old_log_probs: torch.Tensor | None = field(default=None, repr=False)
    old_log_normalizer: torch.Tensor | None = field(default=None, repr=False)
    """None where the old policy did not see the sequence in the context it is trained in."""
    ref_log_probs: torch.Tensor | None = field(default=None, repr=False)
    importance_weights: torch.Tensor | None = field(default=None, repr=False)


class PolicyUpdater:
    """Scores what an update needs, then steps."""

    def __init__(
        self,
        engine: PolicyEngine,
        config: Config,
        scorer: SequenceScorer,
        reference: Reference | None,
    ) -> None:
        self._engine = engine
        self._config = config
        self._scorer = scorer
        self._reference = reference

    def update(
        self,
        groups: Sequence[SampledGroup],
        updates: Sequence[GroupUpdate],
        mismatch: Mismatch | None = None,
        check: Callable[[Mismatch], None] = lambda mismatch: None,
    ) -> list[StepResult]:
        """`train.num_iterations` passes of `train.mini_batches` optimiser steps each.

        Args:
            groups: the batch.
            updates: what each group trains.
            mismatch: gets the trained sequences that it does not have yet.
            check: called with it before the first step.
        """
        mismatch = Mismatch() if mismatch is None else mismatch
        train = self._config.train
        filler = groups[0].sequence(groups[0].rollouts[0])
        items = self._items(groups, updates, filler, mismatch)
        check(mismatch)
        size = -(-len(groups) // train.mini_batches)
        results = []
        for _ in range(train.num_iterations):
            for part in range(train.mini_batches):
                places = range(part * size, (part + 1) * size)
                chosen = [item for item in items if item.place in places]
                part_updates = updates[places.start : places.stop]
                result = self._update_once(chosen, part_updates, filler)
                if result is not None:
                    results.append(result)
        return results

    def _items(
        self,
        groups: Sequence[SampledGroup],
        updates: Sequence[GroupUpdate],
        filler: TokenSequence,
        mismatch: Mismatch,
    ) -> list[TrainItem]:
        pairs = [(p, s) for p, update in enumerate(updates) for s in update.sequences]
        owners = [groups[place] for place, _ in pairs]
        sequences = [sequence for _, sequence in pairs]
        tokens = list(map(self._trained_tokens, owners, sequences))
        with timer("old_forward" if self._has_several_updates else "gap"):
            rooted = self._score_missing(owners, sequences, tokens, filler, mismatch)
        reference: Sequence[torch.Tensor | None] = [None] * len(tokens)
        if self._reference is not None and self._config.loss.kl_estimator != "exact":
            with timer("reference"):
                reference, _ = self._scorer.log_probs(self._reference.score, tokens, filler)
        items = []
        for i, ((place, sequence), ref) in enumerate(zip(pairs, reference, strict=True)):
            sampled, trained = mismatch.trainer_log_probs(sequence.rollout), rooted.get(i)
            # One update per batch needs none: the old policy is the current one and the ratio 1.
            old = None
            if self._has_several_updates:
                old = sampled if trained is None else trained
            weights = None
            if trained is not None:
                # min(pi(y | x) / pi(y | x, prefix, cue), cap): trained without its context.
                assert sampled is not None
                weights = (trained - sampled).exp().clamp(max=IMPORTANCE_CAP)
            weights = self._corrected(weights, sequence.rollout, sampled)
            normalizer = mismatch.log_normalizer(sequence.rollout) if trained is None else None
            items.append(
                TrainItem(place, updates[place], sequence, tokens[i], old, normalizer, ref, weights)
            )
        return items

    @property
    def _has_several_updates(self) -> bool:
        train = self._config.train
        return train.num_iterations * train.mini_batches > 1

    def _score_missing(
        self,
        owners: Sequence[SampledGroup],
        sequences: Sequence[TrainSequence],
        tokens: Sequence[TokenSequence],
        filler: TokenSequence,
        mismatch: Mismatch,
    ) -> dict[int, torch.Tensor]:
        """One forward of the old policy over what it was not asked about yet.

        Puts log-probs in the sampled context into `mismatch`, for all sequences where an old policy
        or an engine's log-probs are compared with them; returns those in the context of training,
        by index, of the sequences whose context is another.
        """
        elsewhere = [i for i, s in enumerate(sequences) if self._trains_off_context(s)]
        every = self._has_several_updates or self._config.rollout.engine != "transformers"
        missing = [
            i
            for i in (range(len(sequences)) if every else elsewhere)
            if mismatch.trainer_log_probs(sequences[i].rollout) is None
        ]
        wanted = [owners[i].sequence(sequences[i].rollout) for i in missing]
        wanted += [tokens[i] for i in elsewhere]
        if not every and not self._may_train_off_context:
            return {}  # by the configuration: all ranks must agree on running forwards
        rows, _ = self._scorer.old_policy(wanted, filler)
        for i, row in zip(missing, rows[: len(missing)], strict=True):
            mismatch.add(owners[i], sequences[i].rollout, *row)
        trained = [row.log_probs.float().cpu() for row in rows[len(missing) :]]
        return dict(zip(elsewhere, trained, strict=True))

    def _trained_tokens(self, group: SampledGroup, sequence: TrainSequence) -> TokenSequence:
        """The context a sequence is trained in: its own, or the prompt alone (`x_only`)."""
        if self._trains_off_context(sequence):
            # The response continues an open think span.
            opening = self._opening_ids()
            return group.sequence(sequence.rollout, opening)
        return group.sequence(sequence.rollout)

    def _trains_off_context(self, sequence: TrainSequence) -> bool:
        return sequence.rollout.reflected and self._may_train_off_context

    @property
    def _may_train_off_context(self) -> bool:
        config = self._config
        return config.algorithm == "care" and config.care.reflection.context == "x_only"

    def _opening_ids(self) -> tuple[int, ...]:
        tag = f"<{self._config.prompt.think_tag}>"
        encoded = self._engine.loaded.tokenizer(tag, add_special_tokens=False)
        return tuple(encoded["input_ids"])

    def _corrected(
        self, weights: torch.Tensor | None, rollout: Rollout, trainer: torch.Tensor | None
    ) -> torch.Tensor | None:
        """`weights` times the correction for an engine that computes otherwise."""
        if trainer is None or rollout.log_probs is None:
            return weights
        if self._config.loss.importance_sampling == "none":
            return weights
        correction = importance_weights(trainer, rollout.log_probs, self._config.loss)
        return correction if weights is None else weights * correction

    def _update_once(
        self,
        items: Sequence[TrainItem],
        updates: Sequence[GroupUpdate],
        filler: TokenSequence,
    ) -> StepResult | None:
        """One optimiser step; None where no rank has anything to train, so not even KL moves."""
        local = [*local_denominators(updates), float(len(items))]
        sequences, tokens, groups, trained = all_sum(local, self._engine.device)
        if trained == 0:
            return None
        denominators = Denominators(sequences, tokens, groups)
        with timer("collate"):
            micro = self._micro_batches(items, denominators, filler)
        with timer("update"):
            result = self._engine.step(micro, self._config.rollout.temperature)
        # The filler's rows are none of the step's.
        return result if items else replace(result, outputs=[])

    def _micro_batches(
        self, items: Sequence[TrainItem], denominators: Denominators, filler: TokenSequence
    ) -> list[MicroBatch]:
        limits = MicroBatchLimits.of(self._config.train)
        own = [item.tokens for item in items]
        batches, _ = agreed_micro_batches(own, limits, self._engine.device)
        micro = [self._micro_batch([items[i] for i in batch], denominators) for batch in batches]
        return micro or [self._silent_micro_batch(filler)]

    def _micro_batch(self, items: Sequence[TrainItem], denominators: Denominators) -> MicroBatch:
        config = self._config
        per_group = config.algorithm == "care" and config.care.decisions.normalize_over == "group"
        scales = [
            sequence_scale(
                item.update,
                denominators,
                config.loss,
                config.rollout.max_new_tokens,
                per_group=per_group,
            )
            for item in items
        ]
        sequences = [item.sequence for item in items]
        rows = loss_rows(sequences, scales, config.loss, self._engine.device)
        batch = self._engine.collate([item.tokens for item in items])
        labels = tuple(item.tokens.prompt.location or "a prompt" for item in items)
        return MicroBatch(batch, self._loss_arguments(items, rows, batch), labels)

    def _loss_arguments(
        self, items: Sequence[TrainItem], rows: LossRows, batch: ModelBatch
    ) -> dict[str, Any]:
        loss = self._config.loss
        join = self._join
        arguments: dict[str, Any] = {
            "advantages": rows.advantages,
            "kl_weights": rows.kl_weights,
            "entropy_weights": rows.entropy_weights,
            "old_log_probs": join([item.old_log_probs for item in items]),
            "ref_log_probs": join([item.ref_log_probs for item in items]),
            "surrogate": Clip(loss.clip_eps_low, loss.clip_eps_high, loss.dual_clip),
            "kl_estimator": loss.kl_estimator,
            "ratio_level": loss.ratio_level,
        }
        if all(item.old_log_normalizer is not None for item in items):
            arguments["old_log_normalizer"] = join([item.old_log_normalizer for item in items])
        if any(item.importance_weights is not None for item in items):
            ones = [torch.ones(len(item.tokens.response_ids)) for item in items]
            arguments["importance_weights"] = join(
                [
                    one if item.importance_weights is None else item.importance_weights
                    for item, one in zip(items, ones, strict=True)
                ]
            )
        if loss.ratio_level == "sequence":
            arguments["sequence_ids"] = batch.sequence_ids
        if self._reference is not None and loss.kl_estimator == "exact":
            arguments |= self._reference.exact_kl_arguments(batch)
        return arguments

    def _silent_micro_batch(self, filler: TokenSequence) -> MicroBatch:
        batch = self._engine.collate([filler])
        zeros = torch.zeros(len(filler.response_ids), device=self._engine.device)
        return MicroBatch(batch, {"advantages": zeros})

    def _join(self, rows: Sequence[torch.Tensor | None]) -> torch.Tensor | None:
        """[N] on this rank's device, or None where the sequences carry none."""
        present = [row for row in rows if row is not None]
        if not present:
            return None
        assert len(present) == len(rows)
        return torch.cat([row.to(self._engine.device, torch.float32) for row in present])
