"""Statistics of vocabulary tiles, and of each row from its tiles.

A tile t of a row brings m_t = max_j z_j, s_t = sum_j e^{z_j - m_t} and, for the entropy,
h_t = sum_j e^{z_j - m_t} (z_j - m_t). With m = max_t m_t, d_t = m_t - m and s = sum_t e^{d_t} s_t:

    l = (z_y - m) - log s,  H = log s - sum_t e^{d_t} (h_t + d_t s_t) / s

Shape letters: C rows of the chunk, V vocabulary, T vocabulary tiles.
"""

# Kernels are in Triton's language, of which a type checker for Python knows little.
# pyright: reportPossiblyUnboundVariable=false, reportCallIssue=false, reportArgumentType=false
# pyright: reportOperatorIssue=false

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from care_kernels.softmax import RowStatistics
from care_kernels.triton_backend.compile_cases import (
    NUM_ROWS,
    VOCAB_SIZE,
    CompileCase,
    compile_case,
)

# The least float32: a finite stand-in for -inf, whose differences are numbers.
LOWEST = tl.constexpr(-3.4028234663852886e38)
BLOCK_C = 32
BLOCK_T = 32
NUM_WARPS = 4


class TileStatistics(NamedTuple):
    """What the epilogue saw. Tiles come first, so that neighbouring rows are stored together."""

    max_logit: Tensor
    """m_t, [T, C]."""
    total: Tensor
    """s_t, [T, C]."""
    moment: Tensor | None
    """h_t, [T, C]."""
    target_logit: Tensor
    """z_y, [C]; NaN where y is outside the vocabulary."""
    tile_size: int
    """Columns per tile."""


# The number of rows differs from chunk to chunk: compiling again for it would gain nothing.
@triton.jit(do_not_specialize=["num_rows"])
def _combine_kernel(
    tile_max_ptr,
    tile_total_ptr,
    tile_moment_ptr,
    target_logit_ptr,
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
    top = tl.full((BLOCK_T, BLOCK_C), LOWEST, tl.float32)
    for start in range(0, num_tiles, BLOCK_T):
        tiles = (start + lanes).to(tl.int64)[:, None]
        mask = (tiles < num_tiles) & inside[None, :]
        tile_max = tl.load(tile_max_ptr + tiles * num_rows + rows[None, :], mask=mask, other=LOWEST)
        top = tl.maximum(top, tile_max)
    max_logit = tl.max(top, 0)

    total = tl.zeros((BLOCK_T, BLOCK_C), tl.float32)
    moment = tl.zeros((BLOCK_T, BLOCK_C), tl.float32)
    for start in range(0, num_tiles, BLOCK_T):
        tiles = (start + lanes).to(tl.int64)[:, None]
        mask = (tiles < num_tiles) & inside[None, :]
        offsets = tiles * num_rows + rows[None, :]
        tile_max = tl.load(tile_max_ptr + offsets, mask=mask, other=LOWEST)
        tile_total = tl.load(tile_total_ptr + offsets, mask=mask, other=1.0)
        step = tile_max - max_logit[None, :]
        decay = tl.exp(step)
        total += decay * tile_total
        if tile_moment_ptr is not None:
            tile_moment = tl.load(tile_moment_ptr + offsets, mask=mask, other=0.0)
            moment += decay * (tile_moment + step * tile_total)
    row_total = tl.sum(total, 0)
    log_total = tl.log(row_total)
    target_logit = tl.load(target_logit_ptr + rows, mask=inside, other=0.0)
    tl.store(log_probs_ptr + rows, (target_logit - max_logit) - log_total, mask=inside)
    tl.store(max_logit_ptr + rows, max_logit, mask=inside)
    tl.store(log_total_ptr + rows, log_total, mask=inside)
    if tile_moment_ptr is not None:
        entropy = log_total - tl.sum(moment, 0) / row_total
        tl.store(entropy_ptr + rows, entropy, mask=inside)


def combine(tiles: TileStatistics) -> RowStatistics:
    """Statistics of each row, as `row_statistics` would give them; never the exact KL."""
    num_tiles, num_rows = tiles.max_logit.shape
    options = {"dtype": torch.float32, "device": tiles.max_logit.device}
    stats = RowStatistics(
        log_probs=torch.empty(num_rows, **options),
        max_logit=torch.empty(num_rows, **options),
        log_total=torch.empty(num_rows, **options),
        entropy=None if tiles.moment is None else torch.empty(num_rows, **options),
        kl=None,
        ref_max_logit=None,
        ref_log_total=None,
    )
    if num_rows > 0:
        with torch.cuda.device_of(tiles.max_logit):
            _combine_kernel[(triton.cdiv(num_rows, BLOCK_C),)](
                tiles.max_logit,
                tiles.total,
                tiles.moment,
                tiles.target_logit,
                stats.log_probs,
                stats.max_logit,
                stats.log_total,
                stats.entropy,
                num_rows,
                num_tiles,
                BLOCK_C=BLOCK_C,
                BLOCK_T=BLOCK_T,
                num_warps=NUM_WARPS,
                num_stages=1,
            )
    return stats


def compile_cases() -> list[CompileCase]:
    """With the entropy, for tiles of 128 columns."""
    pointers = [name for name in _combine_kernel.arg_names if name.endswith("_ptr")]
    num_tiles = triton.cdiv(VOCAB_SIZE, 128)
    return [
        compile_case(
            "combine_entropy",
            _combine_kernel,
            dict.fromkeys(pointers, "*fp32"),
            {"BLOCK_C": BLOCK_C, "BLOCK_T": BLOCK_T},
            num_warps=NUM_WARPS,
            grid=f"{NUM_ROWS // BLOCK_C} blocks of {BLOCK_C} rows",
            hbm_bytes=4 * 3 * num_tiles * NUM_ROWS,
        )
    ]
