"""Eqs. 12-13 on [N] vectors: each row's value, and its derivatives along log-prob, entropy and KL.

Every function is pure, works in the dtype it is given and needs no host synchronisation. With the
ratio rho = exp(l - l_old) of the row, or s = exp(mean of l - l_old) of its sequence (GSPO):

    value_i = kl_weight_i KL_i - entropy_weight_i H_i - f(rho_i, a_i)

f is a surrogate of this module: `Clip` (Eq. 12), `Cispo` or `Sapo`. Advantages arrive multiplied by
the importance weights: a weight w >= 0 moves inside f, w f(rho, a) = f(rho, w a).

Shape letter: N rows.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from care_kernels.softmax import RowGradients, RowStatistics

KL_ESTIMATORS = ("k1", "k2", "k3", "k3_unbiased", "exact")


class PolicyLoss(NamedTuple):
    """The loss and what each row contributed; only `loss` carries gradient.

    Rows that were skipped (see `linear_policy_loss`) read 0 in `log_probs`, `entropy` and `kl`, 1
    in `ratio` and False in both flags, unless `report_all_rows` asks for them.
    """

    loss: Tensor
    """Scalar, the sum over rows; within the package [N], before that sum."""
    log_probs: Tensor
    """[N]."""
    entropy: Tensor | None
    """[N]; None unless weighted or asked for."""
    kl: Tensor | None
    """[N], unweighted; None without kl_weights."""
    ratio: Tensor
    """[N]; at sequence level every row holds its sequence's ratio."""
    clipped_low: Tensor
    """[N] bool: the surrogate's lower bound took the gradient away or capped it."""
    clipped_high: Tensor
    """[N] bool: the surrogate's upper bound did."""
    token_advantages: Tensor | None = None
    """Eq. 11's a_it before the division by |S*|, where `care_loss` made them."""


SKIPPED_ROW = (0.0, 0.0, 0.0, 0.0, 1.0, False, False, 0.0)
"""What `PolicyLoss` holds at a row that was not computed."""


class RowTerms(NamedTuple):
    """The constants of each row, [N], detached and in compute precision."""

    advantages: Tensor
    """Multiplied by the importance weights."""
    old_log_probs: Tensor | None
    ref_log_probs: Tensor | None
    kl_weights: Tensor | None
    entropy_weights: Tensor | None
    old_log_normalizer: Tensor | None = None


class SurrogateRows(NamedTuple):
    """f of each row and its two derivatives, each [N]."""

    value: Tensor
    along_ratio: Tensor
    """df / d log rho, which at sequence level reaches every row of the sequence."""
    along_log_prob: Tensor
    """df / dl at a constant rho: the row's own."""
    clipped_low: Tensor
    clipped_high: Tensor


@dataclass(frozen=True)
class Clip:
    """Eq. 12: f = min(rho a, clip(rho, 1 - low, 1 + high) a), for a < 0 at least dual a.

    On a bound itself the derivative is kept, as autograd's clamp does.
    """

    low: float = 0.2
    high: float = 0.28
    dual: float | None = None
    """For a < 0 the ratio is also clipped at this bound > 1 (arXiv:1912.09729); None: it is not."""

    def __post_init__(self) -> None:
        for name, value in (("Clip.low", self.low), ("Clip.high", self.high)):
            if not value >= 0:
                raise ValueError(f"{name}: got {value}; wanted 0 or more")
        if self.dual is not None and not self.dual > 1:
            raise ValueError(f"Clip.dual: got {self.dual}; wanted None or more than 1")

    def __call__(self, ratio: Tensor, log_probs: Tensor, advantages: Tensor) -> SurrogateRows:
        """f at each row."""
        positive, negative = advantages > 0, advantages < 0
        clipped_low = negative & (ratio < 1 - self.low)
        clipped_high = positive & (ratio > 1 + self.high)
        bounded = torch.where(
            clipped_low, 1 - self.low, torch.where(clipped_high, 1 + self.high, ratio)
        )
        if self.dual is not None:
            beyond_dual = negative & (ratio > self.dual)
            clipped_high = clipped_high | beyond_dual
            bounded = torch.where(beyond_dual, self.dual, bounded)
        slope = torch.where(clipped_low | clipped_high, 0.0, advantages)
        value, nothing = _times(advantages, bounded), torch.zeros_like(ratio)
        return SurrogateRows(value, _times(slope, ratio), nothing, clipped_low, clipped_high)


@dataclass(frozen=True)
class Cispo:
    """CISPO (arXiv:2506.13585): f = sg[clamp(rho, min_ratio, max_ratio)] a l.

    No token's gradient is ever taken away: the ratio weighs it, up to a cap.
    """

    max_ratio: float = 5.0
    min_ratio: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.min_ratio <= self.max_ratio:
            raise ValueError(
                f"Cispo.min_ratio, max_ratio: got {self.min_ratio}, {self.max_ratio}; wanted "
                "0 <= min_ratio <= max_ratio"
            )

    def __call__(self, ratio: Tensor, log_probs: Tensor, advantages: Tensor) -> SurrogateRows:
        """f at each row."""
        weight = _times(advantages, ratio.clamp(self.min_ratio, self.max_ratio))
        value, nothing = _times(weight, log_probs), torch.zeros_like(ratio)
        flags = (ratio < self.min_ratio, ratio > self.max_ratio)
        return SurrogateRows(value, nothing, weight, *flags)


@dataclass(frozen=True)
class Sapo:
    """SAPO (arXiv:2511.20347): f = 4 / t sigmoid(t (rho - 1)) a, with t by the advantage's sign."""

    positive_temperature: float = 1.0
    negative_temperature: float = 1.05

    def __post_init__(self) -> None:
        for name in ("positive_temperature", "negative_temperature"):
            if not getattr(self, name) > 0:
                raise ValueError(f"Sapo.{name}: got {getattr(self, name)}; wanted more than 0")

    def __call__(self, ratio: Tensor, log_probs: Tensor, advantages: Tensor) -> SurrogateRows:
        """f at each row."""
        temperature = torch.full_like(ratio, self.negative_temperature)
        temperature = temperature.masked_fill(advantages > 0, self.positive_temperature)
        gate = torch.sigmoid(temperature * (ratio - 1))
        slope = _times(4 * gate * (1 - gate), ratio)
        nothing = torch.zeros_like(ratio)
        value = _times(advantages, 4 * gate / temperature)
        flags = (nothing.bool(), nothing.bool())
        return SurrogateRows(value, _times(advantages, slope), nothing, *flags)


Surrogate = Clip | Cispo | Sapo


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
        index = torch.empty_like(sorted_index).scatter_(0, order, sorted_index)
        slots = torch.arange(sequence_ids.numel() + 1, device=sequence_ids.device)
        return SequenceGroups(order, index, torch.searchsorted(sorted_index, slots).diff())

    def sum(self, values: Tensor) -> Tensor:
        """Each row's sequence sum of [N] values, back in row order."""
        sums = torch.segment_reduce(values[self.order], "sum", lengths=self.lengths, unsafe=True)
        return sums[self.index]

    def mean(self, values: Tensor) -> Tensor:
        """Each row's sequence mean of [N] values."""
        return self.sum(values) / self.lengths[self.index].to(values.dtype)


def sampled_kl(estimator: str, log_probs: Tensor, ref_log_probs: Tensor) -> tuple[Tensor, Tensor]:
    """KL[pi || ref] estimated at the sampled token: value and derivative, each [N].

    With d = l - l_ref: k1 = d, k2 = d^2 / 2, k3 = exp(-d) - 1 + d. `k3_unbiased` is rho times k3
    (DeepSeek-V3.2, arXiv:2512.02556; TRL's `use_bias_correction_kl`): here its factor k3.
    Source: http://joschu.net/blog/kl-approx.html
    """
    d = log_probs - ref_log_probs
    if estimator == "k1":
        return d, torch.ones_like(d)
    if estimator == "k2":
        return d.square() / 2, d
    # expm1, because exp(-d) - 1 loses every digit of a small d.
    growth = torch.expm1(-d)
    return growth + d, -growth


def row_objective(
    stats: RowStatistics,
    terms: RowTerms,
    surrogate: Surrogate,
    kl_estimator: str,
    *,
    groups: SequenceGroups | None = None,
    along_ratio: Tensor | None = None,
) -> tuple[PolicyLoss, RowGradients]:
    """The summands of Eq. 13 at each row, and the derivatives that reach the logits.

    With `groups` the ratio is that of sequences, whole; `along_ratio` [N] is dL / d log s over the
    sequence's rows, where these need not be whole.
    """
    old = stats.log_probs if terms.old_log_probs is None else terms.old_log_probs
    log_ratio = stats.log_probs - old
    if groups is not None:
        log_ratio = groups.mean(log_ratio)
    ratio = log_ratio.exp()
    rows = surrogate(ratio, stats.log_probs, terms.advantages)
    value, kl, along_log_prob = -rows.value, stats.kl, -rows.along_log_prob
    along_kl = along_entropy = None
    if along_ratio is None:
        along_ratio = -rows.along_ratio
    if terms.kl_weights is not None:
        if kl_estimator == "exact":
            along_kl = terms.kl_weights
        else:
            assert terms.ref_log_probs is not None
            kl, slope = sampled_kl(kl_estimator, stats.log_probs, terms.ref_log_probs)
            if kl_estimator == "k3_unbiased":
                kl, slope = ratio * kl, ratio * slope
                along_ratio = along_ratio + _times(terms.kl_weights, kl)
            along_log_prob = along_log_prob + _times(terms.kl_weights, slope)
        assert kl is not None
        value = value + _times(terms.kl_weights, kl)
    if terms.entropy_weights is not None:
        assert stats.entropy is not None
        along_entropy = -terms.entropy_weights
        value = value + _times(along_entropy, stats.entropy)
    if groups is not None:
        # d log s / dl = 1 / n for each of a sequence's n rows, whether or not it has an advantage.
        along_ratio = groups.mean(along_ratio)
    outcome = PolicyLoss(
        value, stats.log_probs, stats.entropy, kl, ratio, rows.clipped_low, rows.clipped_high
    )
    return outcome, RowGradients(along_log_prob + along_ratio, along_entropy, along_kl)


def _times(factor: Tensor, value: Tensor) -> Tensor:
    """factor * value with 0 * inf = 0: an overflowed ratio stays silent where it has no say."""
    return torch.where(factor == 0, 0.0, factor * value)
