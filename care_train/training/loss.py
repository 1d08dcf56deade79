"""From group updates to rows of `care_kernels.linear_policy_loss` (Algorithm 1, lines 41-43)."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch

from care_kernels import Regions, token_advantages
from care_train.algorithm.types import Credit, GroupUpdate, Region, TrainSequence
from care_train.config import LossSettings


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
    """Rows of the fused loss for sequences laid end to end, [N] float32 each."""

    advantages: torch.Tensor
    """Eq. 11's a_{i,t}, divided by the loss's denominator."""
    kl_weights: torch.Tensor | None
    """beta times the row's share: the mean over the sequence, then over S*."""
    entropy_weights: torch.Tensor | None


def loss_rows(
    sequences: Sequence[TrainSequence],
    scales: Sequence[float],
    loss: LossSettings,
    device: torch.device,
) -> LossRows:
    """The rows' coefficients of Eqs. 12-13 for sequences of S*.

    Args:
        sequences: at least one, whose credit differs in its regions alone.
        scales: `sequence_scale` of each.
        loss: aggregation and coefficients.
        device: where the rows go.
    """
    lengths = [len(sequence.rollout.token_ids) for sequence in sequences]
    credits = [sequence.credit for sequence in sequences]
    first = credits[0]
    scaled = [s.advantage * scale for s, scale in zip(sequences, scales, strict=True)]
    advantages = token_advantages(
        torch.tensor(scaled, dtype=torch.float32, device=device),
        torch.tensor([credit.think for credit in credits], device=device),
        torch.tensor([credit.answer for credit in credits], device=device),
        torch.tensor([credit.earns_rationale for credit in credits], device=device),
        regions=_stacked_regions(credits, device),
        cu_seqlens=torch.tensor([0, *accumulate(lengths)], device=device),
        total_tokens=sum(lengths),
        think_weight=max(credit.think_weight for credit in credits),
        weight_eps=first.weight_eps,
        normalize=first.normalize,
    )
    # Under a token mean, every token counts alike; otherwise every sequence does.
    is_sequence_mean = loss.aggregation == "sequence"
    shares = [s / n if is_sequence_mean else s for s, n in zip(scales, lengths, strict=True)]
    uniform = torch.tensor(shares, dtype=torch.float32, device=device).repeat_interleave(
        torch.tensor(lengths, device=device), output_size=sum(lengths)
    )
    return LossRows(
        advantages,
        loss.kl_coef * uniform if loss.kl_coef else None,
        loss.entropy_coef * uniform if loss.entropy_coef else None,
    )


def _stacked_regions(credits: Sequence[Credit], device: torch.device) -> Regions:
    """[B, R, 2] spans and [B, R] weights, with empty regions where a sequence has fewer."""
    most = max(len(credit.regions) for credit in credits)
    padded = [(*c.regions, *[Region(0, 0, 0.0)] * (most - len(c.regions))) for c in credits]
    spans = torch.tensor([[(r.start, max(r.start, r.end)) for r in row] for row in padded])
    weights = torch.tensor([[r.weight for r in row] for row in padded], dtype=torch.float64)
    shape = (len(credits), most)
    return Regions(spans.long().reshape(*shape, 2).to(device), weights.reshape(shape).to(device))
