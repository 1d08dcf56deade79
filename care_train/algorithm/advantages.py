"""Sequence-level advantages: Eqs. 5-8 and 14 and the equalisation (Secs. 3.4, 3.7; lines 24-39)."""

import math

import torch


def normalize_rewards(shaped_rewards: torch.Tensor, norm_eps: float) -> torch.Tensor:
    """Eqs. 5-7: A_raw = (r - mu_S) / sigma_S with the population std plus eps outside the root.

    Args:
        shaped_rewards: [|S|] r~ of the subgroup's members.
        norm_eps: eps.
    """
    mean = shaped_rewards.mean()
    std = (shaped_rewards - mean).square().mean().sqrt() + norm_eps
    return (shaped_rewards - mean) / std


def normalize_rewards_robust(
    shaped_rewards: torch.Tensor, norm_eps: float, trim: float
) -> torch.Tensor:
    """Sec. 3.4's robust variant of Eq. 7: trimmed mean and median absolute deviation (MAD).

    One anchor and equal negatives have a MAD of 0: Eqs. 5-7 are used there.

    Args:
        shaped_rewards: [|S|].
        norm_eps: eps.
        trim: share of members dropped at each end, rounded down.
    """
    ordered = shaped_rewards.sort().values
    median = ordered.quantile(0.5)
    deviation = (shaped_rewards - median).abs().quantile(0.5)
    if deviation == 0:
        return normalize_rewards(shaped_rewards, norm_eps)
    drop = int(trim * len(ordered))
    center = ordered[drop : len(ordered) - drop].mean()
    return (shaped_rewards - center) / (deviation + norm_eps)


def scale_negative(raw_advantage: float, neg_scale: float) -> float:
    """Eq. 8: A = -s |A_raw| for one negative (s_refl for a failed reflection)."""
    return -neg_scale * abs(raw_advantage)


def equalize_factor(num_negatives: int, max_negatives: int) -> float:
    """sqrt(K / K_S) where K_S < K, else 1 (Sec. 3.4; line 39)."""
    if num_negatives >= max_negatives:
        return 1.0
    return math.sqrt(max_negatives / num_negatives)


def rescue_rewards(num_negatives: int, delta: float, divisor: int | None = None) -> torch.Tensor:
    """Eq. 14: [1 + K'] pseudo-rewards, delta for the pseudo-anchor and -delta/K' for each negative.

    Args:
        num_negatives: how many negatives there are.
        delta: size of the pseudo-contrast.
        divisor: K' in -delta/K'. None: `num_negatives`, which makes the sum zero.
    """
    negative = -delta / (divisor or num_negatives)
    return torch.tensor([delta] + [negative] * num_negatives)
