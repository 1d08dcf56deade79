"""What `projection.project` left, made each row's statistics and, in place, the loss's derivative.

From m_t, s_t and h_t of a row's tiles, with m = max_t m_t, d_t = m_t - m, s = sum_t e^{d_t} s_t:

    l = (z_y - m) - log s,  H = log s - sum_t e^{d_t} (h_t + d_t s_t) / s

With an anchor a, which every m_t and m then are, s = e^{L - a} says how far the row's
log-normaliser L has moved from it. From E_j = e^{z_j - m_t}, with g = dL/dl and lambda = -dL/dH:

    p_j       = E_j e^{m_t - m - log s}
    log p_j   = log E_j + m_t - m - log s
    dL/dz_j   = g (1[j=y] - p_j) + lambda p_j (log p_j + H)
    dL/draw_j = dL/dz_j * dz_j/draw_j

1[j=y] - p_j at the target is -expm1(l), from the float32 log-prob. z_j = log E_j + m_t comes back
for the entropy term and the softcap's slope only, where E_j > 0: E's rounding, at most 2^-8 of it
in bfloat16, moves z by at most 0.004.

Anchored exponentials E_j = e^{z_j - a} need one number per row, not a pass over all of them: with
the row factor c = -g e^{a - L} dz/draw taken into X and dX,

    dX = diag(c) E W,  dW = E^T diag(c) X

once E holds expm1(l) e^{L - a} at the target.

Shape letters: C rows of the chunk, V vocabulary, T vocabulary tiles.
"""

# Kernels are in Triton's language, of which a type checker for Python knows little.
# pyright: reportPossiblyUnboundVariable=false, reportCallIssue=false, reportArgumentType=false
# pyright: reportOperatorIssue=false, reportGeneralTypeIssues=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from care_kernels.softmax import LogitTransform, RowGradients, RowStatistics
from care_kernels.triton.launch import LN_2, LOG2_E, expm1, slope_at, transform_arguments
from care_kernels.triton.projection import TileStatistics

# A probability p is stored as e^{z - a} = p e^{drift}, and float32 has no normal number below
# e^-87: at a drift of -60 nats what vanishes has p < 2e-12, less than 1e-6 in all of a vocabulary.
MAX_DRIFT = 60.0
BLOCK_V = 2048
NUM_WARPS = 8


def combine(tiles: TileStatistics) -> RowStatistics:
    """Statistics of each row from its tiles.

    With an anchor `max_logit` is the anchor and `log_total` = L - anchor, the drift of the row's
    log-normaliser; beyond `MAX_DRIFT` it and the log-prob are NaN.
    """
    total, moment = tiles.total, tiles.moment
    if tiles.max_logit is None:
        assert tiles.anchor is not None
        max_logit = tiles.anchor * LOG2_E.value
    else:
        max_logit = tiles.max_logit.amax(0)
        step = tiles.max_logit - max_logit
        decay = step.exp2()
        moment = None if moment is None else step.mul_(total).add_(moment).mul_(decay)
        total = decay.mul_(total)
    row_total = total.sum(0)
    log_total = row_total.log2()
    if tiles.anchor is not None:
        # Beyond, a sum may have overflowed, or lost what fell below the least float32.
        is_near = log_total.abs() <= MAX_DRIFT * LOG2_E.value
        log_total = log_total.where(is_near, torch.nan)
    return RowStatistics(
        log_probs=((tiles.target_logit - max_logit) - log_total) * LN_2.value,
        max_logit=max_logit * LN_2.value if tiles.anchor is None else tiles.anchor,
        log_total=log_total * LN_2.value,
        entropy=None if moment is None else (log_total - moment.sum(0) / row_total) * LN_2.value,
    )


@triton.jit(do_not_specialize=["num_rows"])
def _exp_gradients_kernel(
    exps_ptr,
    tile_max_ptr,
    target_ids_ptr,
    target_logit_ptr,
    log_probs_ptr,
    max_logit_ptr,
    log_total_ptr,
    entropy_ptr,
    d_log_probs_ptr,
    d_entropy_ptr,
    num_rows,
    num_tiles,
    stride_exps,
    inner,
    outer,
    HAS_SOFTCAP: tl.constexpr,
    TILE_V: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    # One program owns one row and walks BLOCK_T vocabulary tiles at a time. An element is stored
    # only once it has been loaded: it is what the stored number is made of.
    row = tl.program_id(0).to(tl.int64)
    exps_row_ptr = exps_ptr + row * stride_exps
    target_id = tl.load(target_ids_ptr + row)
    log_prob = tl.load(log_probs_ptr + row)
    max_logit = tl.load(max_logit_ptr + row) * LOG2_E
    log_total = tl.load(log_total_ptr + row) * LOG2_E
    g = tl.load(d_log_probs_ptr + row)
    weight_at_target = -g * expm1(log_prob)
    if d_entropy_ptr is not None:
        d_entropy = tl.load(d_entropy_ptr + row)
        entropy = tl.load(entropy_ptr + row)
        weight_at_target -= d_entropy * tl.exp(log_prob) * (log_prob + entropy)
    target_logit = tl.load(target_logit_ptr + row)
    at_target = weight_at_target * slope_at(target_logit, inner, outer, HAS_SOFTCAP)

    for start in range(0, num_tiles, BLOCK_T):
        tiles = start + tl.arange(0, BLOCK_T)
        tile_max = tl.load(
            tile_max_ptr + tiles.to(tl.int64) * num_rows + row, mask=tiles < num_tiles, other=0.0
        )
        log_scale = (tile_max - max_logit) - log_total
        columns = tiles[:, None] * TILE_V + tl.arange(0, TILE_V)[None, :]
        # The padding holds zeros, and its derivative is zero too.
        inside = columns < stride_exps
        e = tl.load(exps_row_ptr + columns, mask=inside, other=0.0).to(tl.float32)
        p = e * tl.exp2(log_scale)[:, None]
        weight = p * 0.0 - g
        if (d_entropy_ptr is not None) or HAS_SOFTCAP:
            # Where E is 0 so is p, and any finite logarithm will do.
            log_e = tl.log2(tl.where(e > 0, e, 1.0))
        if d_entropy_ptr is not None:
            weight -= d_entropy * ((log_e + log_scale[:, None]) * LN_2 + entropy)
        grad = p * weight
        z = log_e + tile_max[:, None] if HAS_SOFTCAP else 0.0
        grad *= slope_at(z, inner, outer, HAS_SOFTCAP)
        grad = tl.where(columns == target_id, at_target, grad)
        tl.store(exps_row_ptr + columns, grad.to(exps_ptr.dtype.element_ty), mask=inside)


def exp_gradients_(
    exps: Tensor,
    tiles: TileStatistics,
    target_ids: Tensor,
    stats: RowStatistics,
    gradients: RowGradients,
    transform: LogitTransform,
) -> None:
    """Overwrite E [C, V] with the loss's derivative with respect to the raw logits x W^T + b.

    `tiles` are from the `project` that filled E, without an anchor; `stats` from `combine` on them,
    or of the whole vocabulary that they are a part of. A target of -1 is no column of this head.
    """
    assert tiles.max_logit is not None, "anchored tiles take `anchor_targets_`"
    assert gradients.kl is None, "the exact KL needs two models' logits"
    num_rows = len(exps)
    if num_rows == 0:
        return
    with torch.cuda.device_of(exps):
        _exp_gradients_kernel[(num_rows,)](
            exps,
            tiles.max_logit,
            target_ids.contiguous(),
            tiles.target_logit,
            stats.log_probs,
            stats.max_logit,
            stats.log_total,
            None if gradients.entropy is None else stats.entropy,
            gradients.log_probs.contiguous(),
            None if gradients.entropy is None else gradients.entropy.contiguous(),
            num_rows,
            tiles.total.shape[0],
            exps.stride(0),
            **transform_arguments(transform),
            TILE_V=tiles.tile_size,
            BLOCK_T=BLOCK_V // tiles.tile_size,
            num_warps=NUM_WARPS,
            num_stages=1,
        )


def anchor_targets_(exps: Tensor, target_ids: Tensor, log_probs: Tensor, log_shift: Tensor) -> None:
    """Overwrite anchored E [C, V] at each row's target with expm1(l) e^{L - a}.

    L - a is `log_total` of `combine`. Every target is a column: the head is no shard.
    """
    at_target = torch.expm1(log_probs).mul_(log_shift.exp()).to(exps.dtype)
    exps.scatter_(1, target_ids[:, None], at_target[:, None])
