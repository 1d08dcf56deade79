"""The rows of the fused loss, without an engine (Eqs. 11-13; Algorithm 1, lines 41-43)."""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from care_kernels import Cispo, Clip, Sapo
from care_train.algorithm.region_weights import spread_advantages
from care_train.algorithm.types import GroupUpdate, TrainSequence
from care_train.config import LossSettings


class Denominators(NamedTuple):
    """What the loss of one optimiser step is divided by, summed over ranks and micro-batches."""

    sequences: float
    """|S*| of Eq. 12, or all sampled sequences for a baseline."""
    tokens: float
    """Their response tokens."""
    groups: float
    """Groups that train."""


def local_denominators(updates: Sequence[GroupUpdate]) -> list[float]:
    """This rank's share of `Denominators`."""
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


def loss_rows(
    sequences: Sequence[TrainSequence],
    scales: Sequence[float],
    loss: LossSettings,
    device: torch.device,
) -> dict[str, torch.Tensor]:
    """The rows' coefficients of Eqs. 12-13, as arguments of `linear_policy_loss`.

    Args:
        sequences: at least one, whose credit differs in its regions alone.
        scales: `sequence_scale` of each.
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
