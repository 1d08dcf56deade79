"""Forwards without gradient: old log-probs, rationale embeddings, reference log-probs."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch

from care_train.algorithm.care import skip_before_forward
from care_train.algorithm.spans import rationale_span
from care_train.algorithm.types import RolloutGroup
from care_train.config import Config
from care_train.models.batch import ModelBatch, TokenSequence
from care_train.training.engine import PolicyEngine
from care_train.training.micro_batches import MicroBatchLimits, agreed_micro_batches
from care_train.training.mismatch import Mismatch
from care_train.training.sampling import SampledGroup

Forward = Callable[
    [ModelBatch, float, torch.Tensor | None], tuple[torch.Tensor, torch.Tensor | None]
]


class OldPolicyRows(NamedTuple):
    """What the old policy says of a response's tokens, [T] each."""

    log_probs: torch.Tensor
    log_normalizer: torch.Tensor
    """log sum exp of the logits: where the fused loss may anchor its exponentials."""


class SequenceScorer:
    """Runs sequences through a policy in micro-batches."""

    def __init__(self, engine: PolicyEngine, config: Config) -> None:
        self._engine = engine
        self._config = config

    def log_probs(
        self,
        forward: Forward,
        sequences: Sequence[TokenSequence],
        filler: TokenSequence,
        pool_spans: Sequence[tuple[int, int]] | None = None,
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Per sequence its tokens' log-probs [T] and, where spans are given, its embedding [D].

        Every rank runs the same number of forwards, as sharded parameters require; one with fewer
        sequences runs `filler`.
        """
        limits = MicroBatchLimits.of(self._config.train)
        batches, count = agreed_micro_batches(sequences, limits, self._engine.device)
        log_probs: dict[int, torch.Tensor] = {}
        embeddings: dict[int, torch.Tensor] = {}
        for turn in range(count):
            if turn >= len(batches):
                forward(self._engine.collate([filler]), self._config.rollout.temperature, None)
                continue
            places = batches[turn]
            batch = self._engine.collate([sequences[i] for i in places])
            spans = None
            if pool_spans is not None:
                spans = torch.tensor([pool_spans[i] for i in places], device=self._engine.device)
            rows, pooled = forward(batch, self._config.rollout.temperature, spans)
            lengths = [len(sequences[i].response_ids) for i in places]
            log_probs.update(zip(places, rows.split(lengths), strict=True))
            if pooled is not None:
                embeddings.update(zip(places, pooled, strict=True))
        order = range(len(sequences))
        return [log_probs[i] for i in order], [embeddings[i] for i in order if embeddings]

    def old_policy(
        self,
        sequences: Sequence[TokenSequence],
        filler: TokenSequence,
        pool_spans: Sequence[tuple[int, int]] | None = None,
    ) -> tuple[list[OldPolicyRows], list[torch.Tensor]]:
        """`log_probs` by the policy as it is, with the log-normalisers."""
        forward = partial(self._engine.score, with_log_normalizer=True)
        rows, embeddings = self.log_probs(forward, sequences, filler, pool_spans)
        return [OldPolicyRows(*row.unbind(1)) for row in rows], embeddings

    def score_groups(
        self, groups: Sequence[SampledGroup], mismatch: Mismatch
    ) -> list[RolloutGroup]:
        """The old policy's one forward (Secs. 3.3, 3.7) over the groups that are not skipped."""
        needed = [
            place
            for place, group in enumerate(groups)
            if skip_before_forward(group.rollouts, self._config.care) is None
        ]
        sequences = [groups[g].sequence(r) for g in needed for r in groups[g].rollouts]
        spans = [
            _shifted(rationale_span(r), groups[g].sequence(r).response_start)
            for g in needed
            for r in groups[g].rollouts
        ]
        filler = groups[0].sequence(groups[0].rollouts[0])
        rows, embeddings = self.old_policy(sequences, filler, spans)
        rollouts = [(groups[g], r) for g in needed for r in groups[g].rollouts]
        for (group, rollout), row in zip(rollouts, rows, strict=True):
            mismatch.add(group, rollout, *row)
        scored = [RolloutGroup(group.rollouts) for group in groups]
        start = 0
        for place in needed:
            end = start + len(groups[place].rollouts)
            scored[place] = RolloutGroup(
                groups[place].rollouts,
                torch.stack(embeddings[start:end]).cpu(),
                torch.stack([row.log_probs.sum() for row in rows[start:end]]).cpu(),
            )
            start = end
        return scored


def _shifted(span: tuple[int, int], start: int) -> tuple[int, int]:
    return start + span[0], start + span[1]
