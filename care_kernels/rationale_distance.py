"""Eq. 4 (Sec. 3.3): how far each response's rationale is from its group's anchor.

    d_cos(i) = 1 - h_i . h_anchor(i)

with h the mean of the final hidden states over the think span, scaled to unit L2 norm.

Shape letters: B sequences, T tokens, N tokens of all sequences in a row, D hidden.
"""

from itertools import pairwise

import torch
from torch import Tensor

from care_kernels._batch_checks import (
    check_cu_seqlens,
    check_spans,
    check_tensor,
    first_true,
)
from care_kernels._checks import FLOAT_DTYPES, INT_DTYPES
from care_kernels._launch import compute_dtype, resolve_backend

NORM_EPS = 1e-12
"""Shorter means count as this long, so that a zero vector stays zero."""
BLOCK_TOKENS = 1024
"""Hidden states converted to float32 at a time."""


@torch.no_grad()
def rationale_distance(
    hidden: Tensor,
    think_spans: Tensor,
    anchors: Tensor,
    *,
    cu_seqlens: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Eq. 4 (Sec. 3.3): cosine distance of each rationale to its anchor's, without gradient.

    Sums are float32 whatever the dtype of `hidden`, of which no float32 copy is made. An empty span
    embeds to the zero vector, which is at distance 1 from everything, itself included.

    Spans that leave their sequence and anchors that are no sequence are refused on CPU tensors. The
    values of CUDA tensors are not read, save by the torch backend, whose loop over spans costs a
    host synchronisation there: such spans are cut to the sequence, such anchors are undefined.

    Args:
        hidden: [B, T, D] final hidden states, after the last norm; or [N, D] with cu_seqlens.
        think_spans: [B, 2] int, half-open token ranges of the rationale, counted from the start of
            their sequence; start == end where there is none.
        anchors: [B] int, index in this batch of the sequence that anchors i's group. Groups may be
            mixed in any order.
        cu_seqlens: [B + 1] int, where each packed sequence starts, and the end of the last
            (FlashAttention's convention).
        backend: None, "triton" or "torch".

    Returns:
        [B] float32 (float64 for float64 hidden), in [0, 2] up to rounding.

    Raises:
        ValueError: an argument does not fit; the message names it, its row, what came and what was
            wanted.

    Source: paper Eq. 4; Algorithm 1, lines 6 and 23.
    """
    chosen = resolve_backend(backend, hidden.device)
    _check_arguments(hidden, think_spans, anchors, cu_seqlens)
    dtype = compute_dtype(hidden)
    if chosen == "triton":
        from care_kernels.triton import rationale_distance as kernels

        means = kernels.span_means(hidden, think_spans, cu_seqlens, dtype)
        return kernels.cosine_distances(means, anchors, NORM_EPS)
    return _cosine_distances(_span_means(hidden, think_spans, cu_seqlens, dtype), anchors)


def _check_arguments(
    hidden: Tensor, think_spans: Tensor, anchors: Tensor, cu_seqlens: Tensor | None
) -> None:
    where = ("hidden", hidden)
    if cu_seqlens is None:
        check_tensor("hidden", hidden, (None, None, None), FLOAT_DTYPES, where)
        num_sequences, lengths = hidden.shape[:2]
    else:
        check_tensor("hidden", hidden, (None, None), FLOAT_DTYPES, where)
        check_tensor("cu_seqlens", cu_seqlens, (None,), INT_DTYPES, where)
        num_sequences, lengths = cu_seqlens.shape[0] - 1, cu_seqlens.long().diff()
        if num_sequences < 0:
            raise ValueError("cu_seqlens: got shape (0,); wanted (B + 1,)")
        check_cu_seqlens(cu_seqlens, num_sequences, hidden.shape[0], where)
    check_spans("think_spans", think_spans, num_sequences, lengths, where)
    check_tensor("anchors", anchors, (num_sequences,), INT_DTYPES, where)
    if anchors.device.type == "cpu":
        row = first_true((anchors.long() < 0) | (anchors.long() >= num_sequences))
        if row is not None:
            raise ValueError(
                f"anchors: got {int(anchors[row])} at row {row}; wanted 0 to {num_sequences - 1}"
            )


def _span_means(
    hidden: Tensor, spans: Tensor, cu_seqlens: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """[B, D] mean of each span, zero where it is empty."""
    means = hidden.new_zeros((spans.shape[0], hidden.shape[-1]), dtype=dtype)
    sequences = hidden if cu_seqlens is None else _unpack(hidden, cu_seqlens)
    for mean, states, (start, end) in zip(means, sequences, spans.tolist(), strict=True):
        inside = states[max(start, 0) : max(end, 0)]
        # In blocks: on the CPU a sum into another dtype converts all of its input first.
        for block in inside.split(BLOCK_TOKENS):
            mean += block.sum(0, dtype=dtype)
        mean /= max(len(inside), 1)
    return means


def _unpack(hidden: Tensor, cu_seqlens: Tensor) -> list[Tensor]:
    """Views [T_i, D] of the packed sequences."""
    ends = cu_seqlens.tolist()
    return [hidden[start:end] for start, end in pairwise(ends)]


def _cosine_distances(means: Tensor, anchors: Tensor) -> Tensor:
    """[B]: 1 - cosine of each row and its anchor's row."""
    norms = means.norm(dim=1).clamp(min=NORM_EPS)
    anchors = anchors.long()
    return 1 - (means * means[anchors]).sum(1) / (norms * norms[anchors])
