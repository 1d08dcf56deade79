"""Sequence-level advantages: Eqs. 5-8 and 14 and the equalisation (Secs. 3.4, 3.7; lines 24-39)."""

import math

import torch

NORM_EPS = 1e-6
"""eps of Eq. 6: far below any gap between rewards, so it decides where all are equal alone."""
RESCUE_DELTA = 0.1
"""delta of Eq. 14, the paper's value: no setting, as the z-score of Eqs. 5-7 cancels it."""


def normalize_rewards(shaped_rewards: torch.Tensor, norm_eps: float = NORM_EPS) -> torch.Tensor:
    """Eqs. 5-7: A_raw = (r - mu_S) / sigma_S with the population std plus eps outside the root.

    Args:
        shaped_rewards: [|S|] r~ of the subgroup's members.
        norm_eps: eps.
    """
    mean = shaped_rewards.mean()
    std = (shaped_rewards - mean).square().mean().sqrt() + norm_eps
    return (shaped_rewards - mean) / std


def scale_negative(raw_advantage: float, neg_scale: float) -> float:
    """Eq. 8: A = -s |A_raw| for one negative (s_refl for a failed reflection)."""
    return -neg_scale * abs(raw_advantage)


def equalize_factor(num_negatives: int, max_negatives: int) -> float:
    """sqrt(K / K_S) where K_S < K, else 1 (Sec. 3.4; line 39)."""
    if num_negatives >= max_negatives:
        return 1.0
    return math.sqrt(max_negatives / num_negatives)


def adapt_negatives(similarity: torch.Tensor, neg_scale: float, target: float) -> tuple[int, float]:
    """How many negatives, and which factor on s, bring a subgroup to a signal-to-noise ratio.

    One anchor among K' negatives has the advantage sqrt(K'), each negative s / sqrt(K'). The signal
    is the anchor's; the noise is the length of the negatives' sum along their rationales' unit
    vectors h: s / sqrt(K') |h_1 + ... + h_K'|. So the ratio is sqrt(K') / s where the rationales
    have nothing in common, and 1 / s however many there are where they are all the same.

    Args:
        similarity: [n, n] h_i . h_j of the chosen negatives, nearest to the anchor first.
        neg_scale: s.
        target: the ratio.

    Returns:
        The fewest negatives that reach the target, or n; and 1, or the factor below 1 with which
        all n do.

    Source: the paper names the aim alone (Sec. 10.2, adaptive subgroup sizing and scaling).
    """
    counts = range(1, len(similarity) + 1)
    noises = [float(similarity[:k, :k].sum().clamp_min(NORM_EPS).sqrt()) for k in counts]
    ratios = [k / (neg_scale * noise) for k, noise in zip(counts, noises, strict=True)]
    enough = [k for k, ratio in zip(counts, ratios, strict=True) if ratio >= target]
    return (enough[0], 1.0) if enough else (len(ratios), ratios[-1] / target)


def rescue_rewards(
    num_negatives: int, divisor: int | None = None, delta: float = RESCUE_DELTA
) -> torch.Tensor:
    """Eq. 14: [1 + K'] pseudo-rewards, delta for the pseudo-anchor and -delta/K' for each negative.

    Args:
        num_negatives: how many negatives there are.
        divisor: K' in -delta/K'. None: `num_negatives`, which makes the sum zero.
        delta: size of the pseudo-contrast.
    """
    negative = -delta / (divisor or num_negatives)
    return torch.tensor([delta] + [negative] * num_negatives)
