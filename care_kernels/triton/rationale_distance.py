"""Eq. 4 in two kernels: the mean of each span, then the cosine distance of pairs of means.

    m_i = 1/n_i sum_{t in span_i} h_t,  d_i = 1 - m_i . m_a / (max(|m_i|, eps) max(|m_a|, eps))

with a the anchor of i's group. The distance kernel needs one walk over both means for the product
and both norms, so no unit vectors are written. Sums are float32 in a fixed order, without atomics.

Shape letters: B sequences, T tokens, N tokens of all sequences in a row, D hidden.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from care_kernels.triton.region_weights import load_span

BLOCK_T = 64
BLOCK_D = 64
DISTANCE_BLOCK_D = 1024
NUM_WARPS = 8


# T changes with every batch: compiling again for each would cost more.
@triton.jit(do_not_specialize=["seq_len"])
def _span_means_kernel(
    means_ptr,
    hidden_ptr,
    spans_ptr,
    cu_seqlens_ptr,
    seq_len,
    width,
    stride_sequence,
    stride_token,
    stride_column,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    # One program owns BLOCK_D columns of one sequence's mean. BLOCK_T partial sums run side by side
    # and meet once, after the walk.
    num_column_blocks = tl.cdiv(width, BLOCK_D)
    sequence = (tl.program_id(0) // num_column_blocks).to(tl.int64)
    column = (tl.program_id(0) % num_column_blocks) * BLOCK_D + tl.arange(0, BLOCK_D)
    if cu_seqlens_ptr is None:
        length = seq_len.to(tl.int64)
        first_ptr = hidden_ptr + sequence * stride_sequence
    else:
        first = tl.load(cu_seqlens_ptr + sequence).to(tl.int64)
        length = tl.load(cu_seqlens_ptr + sequence + 1).to(tl.int64) - first
        first_ptr = hidden_ptr + first * stride_token
    start, end = load_span(spans_ptr, sequence, length)

    column_ptr = first_ptr + column.to(tl.int64)[None, :] * stride_column
    inside = column < width
    total = tl.zeros((BLOCK_T, BLOCK_D), means_ptr.dtype.element_ty)
    for block_start in range(start, end, BLOCK_T):
        token = block_start + tl.arange(0, BLOCK_T)
        mask = (token < end)[:, None] & inside[None, :]
        h = tl.load(column_ptr + token[:, None] * stride_token, mask=mask, other=0.0)
        total += h.to(means_ptr.dtype.element_ty)
    mean = tl.sum(total, 0) / tl.maximum(end - start, 1)
    tl.store(means_ptr + sequence * width + column, mean, mask=inside)


@triton.jit(do_not_specialize=["num_sequences"])
def _cosine_distance_kernel(
    distances_ptr,
    means_ptr,
    anchors_ptr,
    num_sequences,
    width,
    eps,
    BLOCK_D: tl.constexpr,
):
    # One program owns one sequence.
    sequence = tl.program_id(0).to(tl.int64)
    anchor = tl.load(anchors_ptr + sequence).to(tl.int64)
    # An anchor that is no sequence gives NaN rather than a read outside the means.
    known = (anchor >= 0) & (anchor < num_sequences)
    product = tl.zeros((BLOCK_D,), means_ptr.dtype.element_ty)
    square = tl.zeros((BLOCK_D,), means_ptr.dtype.element_ty)
    anchor_square = tl.zeros((BLOCK_D,), means_ptr.dtype.element_ty)
    for start in range(0, width, BLOCK_D):
        column = start + tl.arange(0, BLOCK_D)
        inside = column < width
        h = tl.load(means_ptr + sequence * width + column, mask=inside, other=0.0)
        h_anchor = tl.load(
            means_ptr + anchor * width + column, mask=inside & known, other=float("nan")
        )
        h_anchor = tl.where(inside, h_anchor, 0.0)
        product += h * h_anchor
        square += h * h
        anchor_square += h_anchor * h_anchor
    norm = tl.maximum(tl.sqrt(tl.sum(square, 0)), eps)
    anchor_norm = tl.maximum(tl.sqrt(tl.sum(anchor_square, 0)), eps)
    tl.store(distances_ptr + sequence, 1.0 - tl.sum(product, 0) / (norm * anchor_norm))


def span_means(
    hidden: Tensor, spans: Tensor, cu_seqlens: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """Mean hidden state of each sequence's span; of an empty span, zero.

    Args:
        hidden: [B, T, D], or [N, D] with cu_seqlens; any strides.
        spans: [B, 2] int, cut to their sequence.
        cu_seqlens: [B + 1] int; None where `hidden` is padded.
        dtype: of the sums and the result, float32 or float64.

    Returns:
        [B, D].
    """
    num_sequences, width = spans.shape[0], hidden.shape[-1]
    means = hidden.new_empty((num_sequences, width), dtype=dtype)
    if means.numel() == 0:
        return means
    stride_sequence = hidden.stride(0) if cu_seqlens is None else 0
    with torch.cuda.device_of(hidden):
        _span_means_kernel[(num_sequences * triton.cdiv(width, BLOCK_D),)](
            means,
            hidden,
            spans.contiguous(),
            None if cu_seqlens is None else cu_seqlens.contiguous(),
            hidden.shape[-2],
            width,
            stride_sequence,
            hidden.stride(-2),
            hidden.stride(-1),
            BLOCK_T=BLOCK_T,
            BLOCK_D=BLOCK_D,
            num_warps=NUM_WARPS,  # pyright: ignore[reportCallIssue]
        )
    return means


def cosine_distances(means: Tensor, anchors: Tensor, eps: float) -> Tensor:
    """1 - cosine of each row and its anchor's row; against a zero row, 1.

    Args:
        means: [B, D] float32 or float64, contiguous.
        anchors: [B] int; an index outside [0, B) gives NaN.
        eps: norms below it count as it.

    Returns:
        [B] in the dtype of `means`.
    """
    num_sequences, width = means.shape
    distances = means.new_empty(num_sequences)
    if num_sequences == 0:
        return distances
    with torch.cuda.device_of(means):
        _cosine_distance_kernel[(num_sequences,)](
            distances,
            means,
            anchors.contiguous(),
            num_sequences,
            width,
            eps,
            BLOCK_D=DISTANCE_BLOCK_D,
            num_warps=NUM_WARPS,  # pyright: ignore[reportCallIssue]
        )
    return distances
