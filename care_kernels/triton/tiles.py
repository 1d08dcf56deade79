"""Statistics of vocabulary tiles, and of each row from its tiles.

A tile t of a row brings m_t = max_j z_j, s_t = sum_j e^{z_j - m_t} and, for the entropy,
h_t = sum_j e^{z_j - m_t} (z_j - m_t). With m = max_t m_t, d_t = m_t - m and s = sum_t e^{d_t} s_t:

    l = (z_y - m) - log s,  H = log s - sum_t e^{d_t} (h_t + d_t s_t) / s

With an anchor a, which every m_t and m then are, s = e^{L - a} says how far the row's
log-normaliser L has moved from it.

Shape letters: C rows of the chunk, V vocabulary, T vocabulary tiles.
"""

# Kernels are in Triton's language, of which a type checker for Python knows little.
# pyright: reportPossiblyUnboundVariable=false, reportCallIssue=false, reportArgumentType=false
# pyright: reportOperatorIssue=false, reportGeneralTypeIssues=false

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from care_kernels.softmax import RowStatistics
from care_kernels.triton.launch import LN_2, LOG2_E

# The least float32: a finite stand-in for -inf, whose differences are numbers.
LOWEST = tl.constexpr(-3.4028234663852886e38)
# A probability p is stored as e^{z - a} = p e^{drift}, and float32 has no normal number below
# e^-87: at a drift of -60 nats what vanishes has p < 2e-12, less than 1e-6 in all of a vocabulary.
MAX_DRIFT = tl.constexpr(60.0)
COMBINE_BLOCK_C = 16
COMBINE_BLOCK_T = 128
COMBINE_WARPS = 4


class TileStatistics(NamedTuple):
    """What the epilogue saw, logits in base 2: z log2(e).

    Tiles come first, so that neighbouring rows are stored together.
    """

    max_logit: Tensor | None
    """m_t, [T, C]; None where the rows are anchored."""
    total: Tensor
    """s_t, [T, C]."""
    moment: Tensor | None
    """h_t, [T, C]."""
    target_logit: Tensor
    """z_y, [C]; NaN where y is outside the vocabulary."""
    anchor: Tensor | None
    """a, [C], in nats."""
    tile_size: int
    """Columns per tile."""


@triton.jit(do_not_specialize=["num_rows"])
def _combine_kernel(
    tile_max_ptr,
    tile_total_ptr,
    tile_moment_ptr,
    target_logit_ptr,
    anchor_ptr,
    log_probs_ptr,
    max_logit_ptr,
    log_total_ptr,
    entropy_ptr,
    num_rows,
    num_tiles,
    BLOCK_C: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    # One program owns BLOCK_C rows and reads their tiles twice: the maximum, then the sums.
    rows = tl.program_id(0).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = rows < num_rows
    lanes = tl.arange(0, BLOCK_T)
    if anchor_ptr is not None:
        max_logit = tl.load(anchor_ptr + rows, mask=inside, other=0.0) * LOG2_E
    else:
        top = tl.full((BLOCK_T, BLOCK_C), LOWEST, tl.float32)
        for start in range(0, num_tiles, BLOCK_T):
            tiles = (start + lanes).to(tl.int64)[:, None]
            mask = (tiles < num_tiles) & inside[None, :]
            offsets = tiles * num_rows + rows[None, :]
            top = tl.maximum(top, tl.load(tile_max_ptr + offsets, mask=mask, other=LOWEST))
        max_logit = tl.max(top, 0)

    total = tl.zeros((BLOCK_T, BLOCK_C), tl.float32)
    moment = tl.zeros((BLOCK_T, BLOCK_C), tl.float32)
    for start in range(0, num_tiles, BLOCK_T):
        tiles = (start + lanes).to(tl.int64)[:, None]
        mask = (tiles < num_tiles) & inside[None, :]
        offsets = tiles * num_rows + rows[None, :]
        tile_total = tl.load(tile_total_ptr + offsets, mask=mask, other=0.0)
        step = tl.zeros((BLOCK_T, BLOCK_C), tl.float32)
        if anchor_ptr is None:
            step = tl.load(tile_max_ptr + offsets, mask=mask, other=LOWEST) - max_logit[None, :]
        decay = tl.exp2(step)
        total += decay * tile_total
        if tile_moment_ptr is not None:
            tile_moment = tl.load(tile_moment_ptr + offsets, mask=mask, other=0.0)
            moment += decay * (tile_moment + step * tile_total)
    row_total = tl.where(inside, tl.sum(total, 0), 1.0)
    log_total = tl.log2(row_total)
    if anchor_ptr is not None:
        # Beyond, a sum may have overflowed, or lost what fell below the least float32.
        log_total = tl.where(tl.abs(log_total) <= MAX_DRIFT * LOG2_E, log_total, float("nan"))
    target_logit = tl.load(target_logit_ptr + rows, mask=inside, other=0.0)
    log_probs = ((target_logit - max_logit) - log_total) * LN_2
    tl.store(log_probs_ptr + rows, log_probs, mask=inside)
    if max_logit_ptr is not None:
        tl.store(max_logit_ptr + rows, max_logit * LN_2, mask=inside)
    tl.store(log_total_ptr + rows, log_total * LN_2, mask=inside)
    if tile_moment_ptr is not None:
        entropy = (log_total - tl.sum(moment, 0) / row_total) * LN_2
        tl.store(entropy_ptr + rows, entropy, mask=inside)


def combine(tiles: TileStatistics) -> RowStatistics:
    """Statistics of each row from its tiles.

    With an anchor `max_logit` is the anchor and `log_total` = L - anchor, the drift of the row's
    log-normaliser; beyond `MAX_DRIFT` it and the log-prob are NaN.
    """
    num_tiles, num_rows = tiles.total.shape
    options = {"dtype": torch.float32, "device": tiles.total.device}
    max_logit = torch.empty(num_rows, **options) if tiles.anchor is None else None
    stats = RowStatistics(
        log_probs=torch.empty(num_rows, **options),
        max_logit=tiles.anchor if max_logit is None else max_logit,
        log_total=torch.empty(num_rows, **options),
        entropy=None if tiles.moment is None else torch.empty(num_rows, **options),
    )
    if num_rows > 0:
        with torch.cuda.device_of(tiles.total):
            _combine_kernel[(triton.cdiv(num_rows, COMBINE_BLOCK_C),)](
                tiles.max_logit,
                tiles.total,
                tiles.moment,
                tiles.target_logit,
                tiles.anchor,
                stats.log_probs,
                max_logit,
                stats.log_total,
                stats.entropy,
                num_rows,
                num_tiles,
                BLOCK_C=COMBINE_BLOCK_C,
                BLOCK_T=COMBINE_BLOCK_T,
                num_warps=COMBINE_WARPS,
                num_stages=1,
            )
    return stats
