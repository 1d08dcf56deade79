"""Eqs. 12-13 on [N] vectors: each row's value and its derivative with respect to the log-prob.

The one production copy of the per-token maths. Every function is pure, works in the dtype it is
given and needs no host synchronisation. Advantages arrive already multiplied by the importance
weights: a weight w >= 0 moves inside the minimum, -w min(x, y) = -min(w x, w y).
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

SAMPLED_KL_ESTIMATORS = ("k1", "k2", "k3")


@dataclass(frozen=True)
class ClipRange:
    """Eq. 12's interval [1 - low, 1 + high], and the dual clip's bound for negative advantages."""

    low: float
    high: float
    dual: float | None = None


class Surrogate(NamedTuple):
    """The clipped surrogate of each row, each field [N]."""

    value: Tensor
    grad_log_probs: Tensor
    ratio: Tensor
    clipped_low: Tensor
    clipped_high: Tensor


@dataclass(frozen=True)
class SequenceGroups:
    """Rows sorted by sequence, so that per-sequence sums need no atomics and no host sync.

    `order` [N] sorts the rows, `index` [N] is each row's sequence (0, 1, ...) in row order and
    `lengths` [N] the number of rows of each sequence, zero beyond the last.
    """

    order: Tensor
    index: Tensor
    lengths: Tensor

    @staticmethod
    def from_ids(sequence_ids: Tensor) -> "SequenceGroups":
        """Group [N] ids: any integers, in any order."""
        sorted_ids, order = torch.sort(sequence_ids, stable=True)
        starts_sequence = torch.ones_like(sorted_ids)
        starts_sequence[1:] = sorted_ids[1:] != sorted_ids[:-1]
        sorted_index = starts_sequence.cumsum(0) - 1
        slots = torch.arange(sequence_ids.numel(), device=sequence_ids.device)
        first = torch.searchsorted(sorted_index, slots)
        last = torch.searchsorted(sorted_index, slots, right=True)
        index = torch.empty_like(sorted_index).scatter_(0, order, sorted_index)
        return SequenceGroups(order, index, last - first)

    def sum(self, values: Tensor) -> Tensor:
        """Each row's sequence sum of [N] values, back in row order."""
        sums = torch.segment_reduce(values[self.order], "sum", lengths=self.lengths, unsafe=True)
        return sums[self.index]

    def count(self, dtype: torch.dtype) -> Tensor:
        """Each row's sequence length, [N]."""
        return self.lengths[self.index].to(dtype)


def token_surrogate(log_ratio: Tensor, advantages: Tensor, clip: ClipRange) -> Surrogate:
    """Eq. 12's summand, min(rho a, clip(rho) a), with rho = exp(log_ratio) of the row itself."""
    ratio = log_ratio.exp()
    value, slope, clipped_low, clipped_high = _clip(ratio, advantages, clip)
    return Surrogate(value, _times(slope, ratio), ratio, clipped_low, clipped_high)


def sequence_surrogate(
    log_ratio: Tensor, advantages: Tensor, clip: ClipRange, groups: SequenceGroups
) -> Surrogate:
    """Eq. 12 with GSPO's ratio (arXiv:2507.18071): s = exp(mean over the sequence of log_ratio).

    s depends on every log-prob of its sequence, so ds/dl_t = s / n for each of the n rows, and a
    row with no advantage of its own still receives the gradient of the others.
    """
    num_rows = groups.count(log_ratio.dtype)
    ratio = (groups.sum(log_ratio) / num_rows).exp()
    value, slope, clipped_low, clipped_high = _clip(ratio, advantages, clip)
    grad = _times(groups.sum(slope) / num_rows, ratio)
    return Surrogate(value, grad, ratio, clipped_low, clipped_high)


def sampled_kl(estimator: str, log_probs: Tensor, ref_log_probs: Tensor) -> tuple[Tensor, Tensor]:
    """KL[pi || ref] estimated at the sampled token: value and derivative, each [N].

    With d = l - l_ref: k1 = d, k2 = d^2 / 2, k3 = exp(-d) - 1 + d.
    Source: http://joschu.net/blog/kl-approx.html
    """
    d = log_probs - ref_log_probs
    if estimator == "k1":
        return d, torch.ones_like(d)
    if estimator == "k2":
        return d.square() / 2, d
    if estimator == "k3":
        # expm1, because exp(-d) - 1 loses every digit of a small d.
        growth = torch.expm1(-d)
        return growth + d, -growth
    raise ValueError(f"kl_estimator: got {estimator!r}; wanted one of {SAMPLED_KL_ESTIMATORS}")


def weighted(weights: Tensor | None, values: Tensor | None) -> Tensor | float:
    """weights * values; a zero weight silences even an infinite value, None counts as zero."""
    if weights is None or values is None:
        return 0.0
    return _times(weights, values)


def _clip(
    ratio: Tensor, advantages: Tensor, clip: ClipRange
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Value, d value / d ratio, and where the lower or the upper bound cut that derivative to 0.

    On a bound itself the derivative is kept, as autograd's clamp does.
    """
    positive, negative = advantages > 0, advantages < 0
    clipped_low = negative & (ratio < 1 - clip.low)
    clipped_high = positive & (ratio > 1 + clip.high)
    bounded = torch.where(
        clipped_low, 1 - clip.low, torch.where(clipped_high, 1 + clip.high, ratio)
    )
    if clip.dual is not None:
        beyond_dual = negative & (ratio > clip.dual)
        clipped_high = clipped_high | beyond_dual
        bounded = torch.where(beyond_dual, clip.dual, bounded)
    slope = torch.where(clipped_low | clipped_high, 0.0, advantages)
    return _times(advantages, bounded), slope, clipped_low, clipped_high


def _times(factor: Tensor, value: Tensor) -> Tensor:
    """factor * value with 0 * inf = 0: an overflowed ratio stays silent where it has no say."""
    return torch.where(factor == 0, 0.0, factor * value)
