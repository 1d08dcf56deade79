"""Eqs. 12-13 of each row and their derivative with respect to its log-prob, in one kernel.

With rho = e^{l - l_old}, d = l - l_ref, advantage a (times the importance weight) and weights b of
the KL and c of the entropy:

    value = b KL - c H - min(rho a, clip(rho) a)          for a < 0 at least dual a
    g     = b dKL/dl - a rho [the unclipped branch is active]

    k1 = d, dk1/dl = 1;  k2 = d^2 / 2, dk2/dl = d;  k3 = e^{-d} - 1 + d, dk3/dl = 1 - e^{-d}

The exact KL and the entropy enter `value` alone: their derivatives are not along l. The torch
version is `care_kernels.objective`. Shape letter: C rows.
"""

# Kernels are in Triton's language, of which a type checker for Python knows little.
# pyright: reportPossiblyUnboundVariable=false, reportCallIssue=false, reportArgumentType=false
# pyright: reportOperatorIssue=false

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from care_kernels.objective import ClipRange
from care_kernels.triton.launch import expm1

BLOCK_C = 256
NUM_WARPS = 4
KL_CODES = {"k1": 1, "k2": 2, "k3": 3, "exact": 4}
NO_KL = 0


class RowObjective(NamedTuple):
    """What each row contributes, each field [C]."""

    value: Tensor
    ratio: Tensor
    kl: Tensor | None
    """The estimate, or the exact KL that came in; None without KL weights."""
    clipped_low: Tensor
    clipped_high: Tensor
    grad_log_probs: Tensor
    """g."""


@triton.jit
def _times(factor, value):
    # 0 * inf = 0: an overflowed value stays silent where it has no say.
    return tl.where(factor == 0, 0.0, factor * value)


@triton.jit(do_not_specialize=["num_rows"])
def _row_objective_kernel(
    log_probs_ptr,
    advantages_ptr,
    old_log_probs_ptr,
    ref_log_probs_ptr,
    kl_weights_ptr,
    exact_kl_ptr,
    entropy_ptr,
    entropy_weights_ptr,
    value_ptr,
    ratio_ptr,
    kl_ptr,
    clipped_low_ptr,
    clipped_high_ptr,
    grad_log_probs_ptr,
    num_rows,
    lower,
    upper,
    dual,
    KL_CODE: tl.constexpr,
    HAS_DUAL: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    # One program owns BLOCK_C consecutive rows.
    rows = tl.program_id(0).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = rows < num_rows
    log_probs = tl.load(log_probs_ptr + rows, mask=inside, other=0.0)
    advantages = tl.load(advantages_ptr + rows, mask=inside, other=0.0)
    old_log_probs = log_probs
    if old_log_probs_ptr is not None:
        old_log_probs = tl.load(old_log_probs_ptr + rows, mask=inside, other=0.0)

    ratio = tl.exp(log_probs - old_log_probs)
    clipped_low = (advantages < 0) & (ratio < lower)
    clipped_high = (advantages > 0) & (ratio > upper)
    bounded = tl.where(clipped_low, lower, tl.where(clipped_high, upper, ratio))
    if HAS_DUAL:
        beyond_dual = (advantages < 0) & (ratio > dual)
        clipped_high = clipped_high | beyond_dual
        bounded = tl.where(beyond_dual, dual, bounded)
    slope = tl.where(clipped_low | clipped_high, 0.0, advantages)
    value = -_times(advantages, bounded)
    grad = -_times(slope, ratio)

    if KL_CODE > 0:
        kl_weights = tl.load(kl_weights_ptr + rows, mask=inside, other=0.0)
        if KL_CODE == 4:
            kl = tl.load(exact_kl_ptr + rows, mask=inside, other=0.0)
        else:
            ref_log_probs = tl.load(ref_log_probs_ptr + rows, mask=inside, other=0.0)
            difference = log_probs - ref_log_probs
            if KL_CODE == 1:
                kl = difference
                kl_slope = tl.full((BLOCK_C,), 1.0, tl.float32)
            if KL_CODE == 2:
                kl = difference * difference * 0.5
                kl_slope = difference
            if KL_CODE == 3:
                growth = expm1(-difference)
                kl = growth + difference
                kl_slope = -growth
            grad += _times(kl_weights, kl_slope)
        value += _times(kl_weights, kl)
        tl.store(kl_ptr + rows, kl, mask=inside)
    if entropy_weights_ptr is not None:
        entropy_weights = tl.load(entropy_weights_ptr + rows, mask=inside, other=0.0)
        entropy = tl.load(entropy_ptr + rows, mask=inside, other=0.0)
        value -= _times(entropy_weights, entropy)

    tl.store(value_ptr + rows, value, mask=inside)
    tl.store(ratio_ptr + rows, ratio, mask=inside)
    tl.store(clipped_low_ptr + rows, clipped_low.to(tl.int8), mask=inside)
    tl.store(clipped_high_ptr + rows, clipped_high.to(tl.int8), mask=inside)
    tl.store(grad_log_probs_ptr + rows, grad, mask=inside)


def row_objective(
    log_probs: Tensor,
    advantages: Tensor,
    clip: ClipRange,
    *,
    old_log_probs: Tensor | None = None,
    kl_estimator: str = "k3",
    kl_weights: Tensor | None = None,
    ref_log_probs: Tensor | None = None,
    exact_kl: Tensor | None = None,
    entropy: Tensor | None = None,
    entropy_weights: Tensor | None = None,
) -> RowObjective:
    """The token-level objective of each row and its derivative along the row's log-prob.

    Args:
        log_probs: [C] float32, as every vector here.
        advantages: [C], times the importance weights.
        clip: Eq. 12's bounds.
        old_log_probs: [C]; None: the ratio is 1.
        kl_estimator: "k1", "k2", "k3" or "exact"; read where `kl_weights` is given.
        kl_weights: [C]; None: no KL.
        ref_log_probs: [C], for a sampled estimate.
        exact_kl: [C], for "exact".
        entropy: [C], where `entropy_weights` is given.
        entropy_weights: [C]; None: no entropy bonus.

    Raises:
        ValueError: an unknown estimator, or a vector that is missing or not [C] float32.
    """
    kl_code = NO_KL
    if kl_weights is not None:
        if kl_estimator not in KL_CODES:
            raise ValueError(f"kl_estimator: got {kl_estimator!r}; wanted one of {(*KL_CODES,)}")
        kl_code = KL_CODES[kl_estimator]
    is_exact = kl_code == KL_CODES["exact"]
    is_sampled = kl_code != NO_KL and not is_exact
    has_entropy = entropy_weights is not None
    inputs = (
        _vector("log_probs", log_probs, log_probs, True),
        _vector("advantages", advantages, log_probs, True),
        _vector("old_log_probs", old_log_probs, log_probs, old_log_probs is not None),
        _vector("ref_log_probs", ref_log_probs, log_probs, is_sampled),
        _vector("kl_weights", kl_weights, log_probs, kl_code != NO_KL),
        _vector("exact_kl", exact_kl, log_probs, is_exact),
        _vector("entropy", entropy, log_probs, has_entropy),
        _vector("entropy_weights", entropy_weights, log_probs, has_entropy),
    )
    num_rows = log_probs.numel()
    result = RowObjective(
        value=log_probs.new_empty(num_rows),
        ratio=log_probs.new_empty(num_rows),
        kl=None if kl_code == NO_KL else log_probs.new_empty(num_rows),
        clipped_low=log_probs.new_empty(num_rows, dtype=torch.bool),
        clipped_high=log_probs.new_empty(num_rows, dtype=torch.bool),
        grad_log_probs=log_probs.new_empty(num_rows),
    )
    if num_rows > 0:
        with torch.cuda.device_of(log_probs):
            _row_objective_kernel[(triton.cdiv(num_rows, BLOCK_C),)](
                *inputs,
                result.value,
                result.ratio,
                result.kl,
                result.clipped_low.view(torch.int8),
                result.clipped_high.view(torch.int8),
                result.grad_log_probs,
                num_rows,
                1 - clip.low,
                1 + clip.high,
                0.0 if clip.dual is None else clip.dual,
                KL_CODE=kl_code,
                HAS_DUAL=clip.dual is not None,
                BLOCK_C=BLOCK_C,
                num_warps=NUM_WARPS,
                num_stages=1,
            )
    return result


def _vector(name: str, value: Tensor | None, like: Tensor, is_used: bool) -> Tensor | None:
    """A used vector, contiguous; None where the kernel does not read it."""
    if not is_used:
        return None
    if value is None or value.shape != (like.numel(),) or value.dtype != torch.float32:
        got = "None" if value is None else f"{value.dtype} of shape {tuple(value.shape)}"
        raise ValueError(f"{name}: got {got}; wanted float32 of shape ({like.numel()},)")
    return value.contiguous()
