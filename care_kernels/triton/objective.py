"""`care_kernels.objective.row_objective` at token level, in one kernel; not of the exact KL.

Shape letter: C rows.
"""

# Kernels are in Triton's language, of which a type checker for Python knows little.
# pyright: reportPossiblyUnboundVariable=false, reportCallIssue=false, reportArgumentType=false
# pyright: reportOperatorIssue=false

import torch
import triton
import triton.language as tl

from care_kernels.objective import (
    Cispo,
    Clip,
    PolicyLoss,
    RowTerms,
    Surrogate,
    row_gradients,
)
from care_kernels.softmax import RowGradients, RowStatistics
from care_kernels.triton.launch import expm1

BLOCK_C = 256
NUM_WARPS = 4
KL_CODES = {"k1": 1, "k2": 2, "k3": 3, "k3_unbiased": 4}
NO_KL = 0
CLIP, CISPO, SAPO = 0, 1, 2


@triton.jit
def _times(factor, value):
    # 0 * inf = 0: an overflowed value stays silent where it has no say.
    return tl.where(factor == 0, 0.0, factor * value)


@triton.jit(do_not_specialize=["num_rows"])
def _row_objective_kernel(
    log_probs_ptr,  # [C] float32, as every vector here that is not said to be something else
    advantages_ptr,
    old_log_probs_ptr,  # or None
    ref_log_probs_ptr,  # or None
    kl_weights_ptr,  # or None
    entropy_ptr,  # or None
    entropy_weights_ptr,  # or None
    value_ptr,
    ratio_ptr,
    kl_ptr,  # or None
    clipped_low_ptr,  # [C] int8
    clipped_high_ptr,  # [C] int8
    grad_log_probs_ptr,
    num_rows,
    first,  # Clip: 1 - low; Cispo: min_ratio; Sapo: positive_temperature
    second,  # Clip: 1 + high; Cispo: max_ratio; Sapo: negative_temperature
    dual,
    SURROGATE: tl.constexpr,
    HAS_DUAL: tl.constexpr,
    KL_CODE: tl.constexpr,
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

    if SURROGATE == 0:
        clipped_low = (advantages < 0) & (ratio < first)
        clipped_high = (advantages > 0) & (ratio > second)
        bounded = tl.where(clipped_low, first, tl.where(clipped_high, second, ratio))
        if HAS_DUAL:
            beyond_dual = (advantages < 0) & (ratio > dual)
            clipped_high = clipped_high | beyond_dual
            bounded = tl.where(beyond_dual, dual, bounded)
        slope = tl.where(clipped_low | clipped_high, 0.0, advantages)
        value = -_times(advantages, bounded)
        grad = -_times(slope, ratio)
    elif SURROGATE == 1:
        clipped_low = ratio < first
        clipped_high = ratio > second
        weight = _times(advantages, tl.minimum(tl.maximum(ratio, first), second))
        value = -_times(weight, log_probs)
        grad = -weight
    else:
        clipped_low = ratio < 0.0
        clipped_high = ratio < 0.0
        temperature = tl.where(advantages > 0, first, second)
        gate = 1.0 / (1.0 + tl.exp(-temperature * (ratio - 1.0)))
        value = -_times(advantages, 4.0 * gate / temperature)
        grad = -_times(advantages, _times(4.0 * gate * (1.0 - gate), ratio))

    if KL_CODE > 0:
        kl_weights = tl.load(kl_weights_ptr + rows, mask=inside, other=0.0)
        ref_log_probs = tl.load(ref_log_probs_ptr + rows, mask=inside, other=0.0)
        difference = log_probs - ref_log_probs
        if KL_CODE == 1:
            kl = difference
            kl_slope = tl.full((BLOCK_C,), 1.0, tl.float32)
        elif KL_CODE == 2:
            kl = difference * difference * 0.5
            kl_slope = difference
        else:
            growth = expm1(-difference)
            kl = growth + difference
            kl_slope = -growth
        if KL_CODE == 4:
            # The ratio is differentiated too: d rho / dl = rho.
            kl_slope = ratio * (kl_slope + kl)
            kl = ratio * kl
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
    stats: RowStatistics, terms: RowTerms, surrogate: Surrogate, kl_estimator: str
) -> tuple[PolicyLoss, RowGradients]:
    """The summands of Eq. 13 at each row, and the derivatives that reach the logits.

    Args:
        stats: of the rows, float32.
        terms: the rows' constants, float32.
        surrogate: f.
        kl_estimator: one of `KL_CODES`; read where there are KL weights.
    """
    kl_code = NO_KL if terms.kl_weights is None else KL_CODES[kl_estimator]
    log_probs, num_rows = stats.log_probs, stats.log_probs.numel()
    has_bonus = terms.entropy_weights is not None
    inputs = (
        log_probs,
        terms.advantages,
        terms.old_log_probs,
        None if kl_code == NO_KL else terms.ref_log_probs,
        terms.kl_weights,
        stats.entropy if has_bonus else None,
        terms.entropy_weights,
    )
    outcome = PolicyLoss(
        loss=log_probs.new_empty(num_rows),
        log_probs=log_probs,
        entropy=stats.entropy,
        kl=None if kl_code == NO_KL else log_probs.new_empty(num_rows),
        ratio=log_probs.new_empty(num_rows),
        clipped_low=log_probs.new_empty(num_rows, dtype=torch.bool),
        clipped_high=log_probs.new_empty(num_rows, dtype=torch.bool),
    )
    grad_log_probs = log_probs.new_empty(num_rows)
    code, first, second, dual = _numbers(surrogate)
    if num_rows > 0:
        with torch.cuda.device_of(log_probs):
            _row_objective_kernel[(triton.cdiv(num_rows, BLOCK_C),)](
                *(None if vector is None else vector.contiguous() for vector in inputs),
                outcome.loss,
                outcome.ratio,
                outcome.kl,
                outcome.clipped_low.view(torch.int8),
                outcome.clipped_high.view(torch.int8),
                grad_log_probs,
                num_rows,
                first,
                second,
                0.0 if dual is None else dual,
                SURROGATE=code,
                HAS_DUAL=dual is not None,
                KL_CODE=kl_code,
                BLOCK_C=BLOCK_C,
                num_warps=NUM_WARPS,
                num_stages=1,
            )
    return outcome, row_gradients(grad_log_probs, terms, kl_estimator)


def _numbers(surrogate: Surrogate) -> tuple[int, float, float, float | None]:
    """A surrogate's code, and its numbers as the kernel takes them."""
    if isinstance(surrogate, Clip):
        return CLIP, 1 - surrogate.low, 1 + surrogate.high, surrogate.dual
    if isinstance(surrogate, Cispo):
        return CISPO, surrogate.min_ratio, surrogate.max_ratio, None
    return SAPO, surrogate.positive_temperature, surrogate.negative_temperature, None
