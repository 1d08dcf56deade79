"""Statistics of each row of a chunk of float32 logits, in one pass over the vocabulary.

With m = max_j z_j, s = sum_j e^{z_j - m} and p = softmax(z):

    l = (z_y - m) - log s
    H = log s - h / s          h = sum_j e^{z_j - m} (z_j - m)
    K = a / s - log s + log s' a = sum_j e^{z_j - m} ((z_j - m) - (z'_j - m'))

where a prime marks the reference. Every sum is shifted by the running maximum, so no digit is lost
to large logits; when the maximum grows by d, s becomes e^{-d} s and h becomes e^{-d} (h - d s).

The gradient is in `logit_gradients`. Shape letters: C rows of the chunk, V vocabulary.
"""

# Kernels are in Triton's language, of which a type checker for Python knows little.
# pyright: reportPossiblyUnboundVariable=false, reportCallIssue=false, reportArgumentType=false
# pyright: reportOperatorIssue=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from care_kernels.row_softmax import RowStatistics
from care_kernels.triton_backend.compile_cases import (
    NUM_ROWS,
    VOCAB_SIZE,
    CompileCase,
    compile_case,
)
from care_kernels.triton_backend.launching import check_rows
from care_kernels.triton_backend.tile_statistics import LOWEST

BLOCK_V = 2048
NUM_WARPS = 8


@triton.jit
def _row_statistics_kernel(
    logits_ptr,
    ref_logits_ptr,
    target_ids_ptr,
    log_probs_ptr,
    max_logit_ptr,
    log_total_ptr,
    entropy_ptr,
    kl_ptr,
    ref_max_logit_ptr,
    ref_log_total_ptr,
    vocab_size,
    stride_logits,
    stride_ref_logits,
    BLOCK_V: tl.constexpr,
):
    # One program owns one row. Each of its BLOCK_V lanes keeps the running sums of the columns it
    # meets, every BLOCK_V-th one; the lanes meet once, after the walk.
    row = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, BLOCK_V)
    logits_row_ptr = logits_ptr + row * stride_logits
    top = tl.full((BLOCK_V,), LOWEST, tl.float32)
    total = tl.zeros((BLOCK_V,), tl.float32)
    if entropy_ptr is not None:
        moment = tl.zeros((BLOCK_V,), tl.float32)
    if ref_logits_ptr is not None:
        ref_row_ptr = ref_logits_ptr + row * stride_ref_logits
        ref_top = tl.full((BLOCK_V,), LOWEST, tl.float32)
        ref_total = tl.zeros((BLOCK_V,), tl.float32)
        gap_moment = tl.zeros((BLOCK_V,), tl.float32)

    for start in range(0, vocab_size, BLOCK_V):
        columns = start + lanes
        inside = columns < vocab_size
        z = tl.load(logits_row_ptr + columns, mask=inside, other=LOWEST)
        new_top = tl.maximum(top, z)
        step = top - new_top
        decay = tl.exp(step)
        shifted = z - new_top
        e = tl.exp(shifted)
        if entropy_ptr is not None:
            moment = decay * (moment + step * total) + e * shifted
        if ref_logits_ptr is not None:
            ref_z = tl.load(ref_row_ptr + columns, mask=inside, other=LOWEST)
            ref_new_top = tl.maximum(ref_top, ref_z)
            ref_step = ref_top - ref_new_top
            ref_shifted = ref_z - ref_new_top
            gap_moment = decay * (gap_moment + (step - ref_step) * total)
            gap_moment += e * (shifted - ref_shifted)
            ref_total = ref_total * tl.exp(ref_step) + tl.exp(ref_shifted)
            ref_top = ref_new_top
        total = total * decay + e
        top = new_top

    row_top = tl.max(top, 0)
    step = top - row_top
    decay = tl.exp(step)
    row_total = tl.sum(total * decay, 0)
    log_total = tl.log(row_total)
    target_id = tl.load(target_ids_ptr + row)
    # An id outside the vocabulary gives NaN rather than a read outside the row.
    known = (target_id >= 0) & (target_id < vocab_size)
    target_logit = tl.load(logits_row_ptr + target_id, mask=known, other=float("nan"))
    tl.store(log_probs_ptr + row, (target_logit - row_top) - log_total)
    tl.store(max_logit_ptr + row, row_top)
    tl.store(log_total_ptr + row, log_total)
    if entropy_ptr is not None:
        row_moment = tl.sum(decay * (moment + step * total), 0)
        tl.store(entropy_ptr + row, log_total - row_moment / row_total)
    if ref_logits_ptr is not None:
        ref_row_top = tl.max(ref_top, 0)
        ref_step = ref_top - ref_row_top
        ref_log_total = tl.log(tl.sum(ref_total * tl.exp(ref_step), 0))
        row_gap = tl.sum(decay * (gap_moment + (step - ref_step) * total), 0)
        tl.store(kl_ptr + row, row_gap / row_total + (ref_log_total - log_total))
        tl.store(ref_max_logit_ptr + row, ref_row_top)
        tl.store(ref_log_total_ptr + row, ref_log_total)


def row_statistics(
    logits: Tensor, target_ids: Tensor, *, with_entropy: bool, ref_logits: Tensor | None = None
) -> RowStatistics:
    """Statistics of each row of a chunk; the contract of `care_kernels.row_softmax`.

    Args:
        logits: [C, V] float32, finite, any row stride.
        target_ids: [C] int; an id outside [0, V) gives a NaN log-prob.
        with_entropy: also compute H.
        ref_logits: [C, V] float32 of the reference; given, the exact K is computed.

    Raises:
        ValueError: a dtype, shape or column stride that the kernel does not read.
    """
    check_rows("logits", logits, (torch.float32,))
    if ref_logits is not None:
        check_rows("ref_logits", ref_logits, (torch.float32,))
        if ref_logits.shape != logits.shape:
            raise ValueError(
                f"ref_logits: got shape {tuple(ref_logits.shape)}; wanted {tuple(logits.shape)}"
            )
    num_rows, vocab_size = logits.shape

    def vector(wanted: bool = True) -> Tensor | None:
        return logits.new_empty(num_rows) if wanted else None

    has_ref = ref_logits is not None
    stats = RowStatistics(
        log_probs=logits.new_empty(num_rows),
        max_logit=logits.new_empty(num_rows),
        log_total=logits.new_empty(num_rows),
        entropy=vector(with_entropy),
        kl=vector(has_ref),
        ref_max_logit=vector(has_ref),
        ref_log_total=vector(has_ref),
    )
    if num_rows > 0:
        with torch.cuda.device_of(logits):
            _row_statistics_kernel[(num_rows,)](
                logits,
                ref_logits,
                target_ids.contiguous(),
                *stats,
                vocab_size,
                logits.stride(0),
                0 if ref_logits is None else ref_logits.stride(0),
                BLOCK_V=BLOCK_V,
                num_warps=NUM_WARPS,
            )
    return stats


def compile_cases() -> list[CompileCase]:
    """Log-probs alone, with entropy, and with both entropy and exact KL."""
    pointers = [name for name in _row_statistics_kernel.arg_names if name.endswith("_ptr")]
    types = dict.fromkeys(pointers, "*fp32") | {"target_ids_ptr": "*i64"}
    ref = ("ref_logits_ptr", "kl_ptr", "ref_max_logit_ptr", "ref_log_total_ptr")
    logit_bytes = NUM_ROWS * VOCAB_SIZE * 4
    return [
        compile_case(
            f"row_statistics{suffix}",
            _row_statistics_kernel,
            types,
            {"BLOCK_V": BLOCK_V} | dict.fromkeys(absent),
            num_warps=NUM_WARPS,
            grid=f"{NUM_ROWS} rows",
            hbm_bytes=matrices * logit_bytes,
        )
        for suffix, absent, matrices in (
            ("", (*ref, "entropy_ptr"), 1),
            ("_entropy", ref, 1),
            ("_entropy_kl", (), 2),
        )
    ]
