"""From group updates to rows of `care_kernels.linear_policy_loss` (Algorithm 1, lines 41-43)."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from care_train.algorithm.region_weights import token_advantages
from care_train.algorithm.types import GroupUpdate, TrainSequence
from care_train.settings import LossSettings


@dataclass(frozen=True)
class Denominators:
    """What the loss of one optimiser step is divided by, summed over ranks and micro-batches."""

    sequences: float
    """|S*| of Eq. 12, or all sampled sequences for a baseline."""
    tokens: float
    """Their response tokens."""
    groups: float
    """Groups that train."""


def local_denominators(updates: Sequence[GroupUpdate]) -> list[float]:
    """This rank's share of [sequences, tokens, groups]."""
    return [
        float(sum(update.num_sequences for update in updates)),
        float(sum(update.num_tokens for update in updates)),
        float(sum(bool(update.sequences) for update in updates)),
    ]


def sequence_scale(
    update: GroupUpdate,
    denominators: Denominators,
    loss: LossSettings,
    max_new_tokens: int,
    *,
    per_group: bool,
) -> float:
    """The factor 1/|S*| of Eq. 12, or what `loss.aggregation` puts in its place."""
    if loss.aggregation == "token":
        return 1.0 / denominators.tokens
    if loss.aggregation == "max_length":
        return 1.0 / (denominators.sequences * max_new_tokens)
    if per_group:
        return 1.0 / (update.num_sequences * denominators.groups)
    return 1.0 / denominators.sequences


@dataclass(frozen=True)
class LossRows:
    """One sequence's rows of the fused loss, [T] each."""

    advantages: torch.Tensor
    """Eq. 11's a_{i,t}, divided by the loss's denominator."""
    kl_weights: torch.Tensor | None
    """beta times the row's share: the mean over the sequence, then over S*."""
    entropy_weights: torch.Tensor | None


def loss_rows(sequence: TrainSequence, scale: float, loss: LossSettings) -> LossRows:
    """The rows' coefficients of Eqs. 12-13 for one sequence of S*."""
    weights = sequence.token_weights
    num_tokens = len(weights)
    # Under a token mean, every token counts alike; otherwise every sequence does.
    share = scale / num_tokens if loss.aggregation == "sequence" else scale
    uniform = torch.full((num_tokens,), share)
    return LossRows(
        token_advantages(sequence.advantage, weights) * scale,
        loss.kl_coef * uniform if loss.kl_coef else None,
        loss.entropy_coef * uniform if loss.entropy_coef else None,
    )
