"""Eq. 4 (Sec. 3.3): how far each response's rationale is from its group's anchor.

    d_cos(i) = 1 - h_i . h_anchor(i)

with h the mean of the final hidden states over the think span, scaled to unit L2 norm.

Shape letters: B sequences, T tokens, N tokens of all sequences in a row, D hidden.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from care_kernels import checks
from care_kernels.backends import compute_dtype, resolve_backend
from care_kernels.region_weights import cut_spans

BLOCK_TOKENS = 1024
"""Hidden states converted to float32 at a time, on the CPU."""
BLOCK_T, BLOCK_D, NUM_WARPS = 64, 64, 8


@torch.no_grad()
def pool_rationale(
    hidden: Tensor,
    think_spans: Tensor,
    *,
    cu_seqlens: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """h of Eq. 4: the mean hidden state of each span at unit L2 norm, without gradient.

    Sums are float32 whatever the dtype of `hidden`, of which no float32 copy is made. Spans that
    leave their sequence are refused on CPU tensors. The values of CUDA tensors are not read, save
    by the torch backend, whose loop over spans costs a host synchronisation there: such spans are
    cut to the sequence.

    Args:
        hidden: [B, T, D] final hidden states, after the last norm; or [N, D] with cu_seqlens.
        think_spans: [B, 2] int, half-open token ranges of the rationale, counted from the start of
            their sequence; start == end where there is none.
        cu_seqlens: [B + 1] int, where each packed sequence starts, and the end of the last.
        backend: None, "triton" or "torch".

    Returns:
        [B, D] float32 (float64 for float64 hidden); of an empty span the zero vector, which is at
        distance 1 from everything, itself included.

    Raises:
        ValueError: an argument does not fit; the message names it and its row.
    """
    shapes = checks.Shapes()
    shapes.check("B T D" if cu_seqlens is None else "N D", hidden=hidden)
    checks.check_numbers("hidden", hidden)
    starts, lengths = torch.arange(len(hidden), device=hidden.device), hidden.shape[1]
    if cu_seqlens is not None:
        shapes.check("S", checks.INT_DTYPES, cu_seqlens=cu_seqlens)
        if len(cu_seqlens) == 0:
            raise checks.wrong("cu_seqlens", "shape (0,)", "(B + 1,)")
        checks.check_cu_seqlens(cu_seqlens, len(hidden))
        starts, lengths = cu_seqlens[:-1].long(), cu_seqlens.long().diff()
    shapes.check(f"{len(starts)} 2", checks.INT_DTYPES, think_spans=think_spans)
    checks.check_spans("think_spans", think_spans, lengths)
    spans = cut_spans(think_spans.long(), torch.as_tensor(lengths, device=hidden.device))
    is_fused = resolve_backend(backend, hidden.device) == "triton"
    span_means = _launch if is_fused else _span_means
    return F.normalize(span_means(hidden, starts, spans), dim=1)


def cosine_distance(embeddings: Tensor, others: Tensor) -> Tensor:
    """1 - cosine of unit vectors [..., D] and [..., D], which broadcast; [...]."""
    return 1 - (embeddings * others).sum(-1)


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

    The other arguments, and errors, are `pool_rationale`'s.

    Args:
        anchors: [B] int, index in this batch of the sequence that anchors i's group. Groups may be
            mixed in any order. One that is no sequence is refused on the CPU, and gives NaN where
            values are not read.

    Returns:
        [B] float32 (float64 for float64 hidden), in [0, 2] up to rounding.

    Source: paper Eq. 4; Algorithm 1, lines 6 and 23.
    """
    embeddings = pool_rationale(hidden, think_spans, cu_seqlens=cu_seqlens, backend=backend)
    shapes = checks.Shapes()
    shapes.check("B D", hidden=embeddings)
    shapes.check("B", checks.INT_DTYPES, anchors=anchors)
    anchors = anchors.long()
    is_known = (anchors >= 0) & (anchors < len(embeddings))
    if anchors.device.type == "cpu" and (place := checks.first_true(~is_known)) is not None:
        got = f"{int(anchors[place])} at row {place[0]}"
        raise checks.wrong("anchors", got, f"0 to {len(embeddings) - 1}")
    # Near misses are nearly parallel: in float32 the last digits of 1 - cosine would be rounding.
    others = embeddings[anchors.where(is_known, 0)].double()
    distance = cosine_distance(embeddings.double(), others).to(embeddings.dtype)
    return distance.masked_fill(~is_known, torch.nan)


def _span_means(hidden: Tensor, starts: Tensor, spans: Tensor) -> Tensor:
    """[B, D] mean of each span, zero where it is empty; float32, or float64 for float64.

    `starts` [B] are where each sequence starts along the first dimension of `hidden`.
    """
    means = hidden.new_zeros((len(spans), hidden.shape[-1]), dtype=compute_dtype(hidden))
    for mean, first, (start, end) in zip(means, starts.tolist(), spans.tolist(), strict=True):
        states = hidden[first] if hidden.dim() == 3 else hidden[first:]
        # In blocks: on the CPU a sum into another dtype converts all of its input first.
        for block in states[start:end].split(BLOCK_TOKENS):
            mean += block.sum(0, dtype=means.dtype)
        mean /= max(end - start, 1)
    return means


@triton.jit
def _span_means_kernel(
    means_ptr,  # [B, D] float32 or float64
    hidden_ptr,  # [B, T, D] or [N, D]; any strides
    starts_ptr,  # [B] int64, along the first dimension
    spans_ptr,  # [B, 2] int64
    width,
    stride_start,
    stride_token,
    stride_column,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    # One program owns BLOCK_D columns of one sequence's mean. BLOCK_T partial sums run side by side
    # and meet once, after the walk, so that no order depends on timing.
    num_column_blocks = tl.cdiv(width, BLOCK_D)
    sequence = (tl.program_id(0) // num_column_blocks).to(tl.int64)
    column = (tl.program_id(0) % num_column_blocks) * BLOCK_D + tl.arange(0, BLOCK_D)
    first_ptr = hidden_ptr + tl.load(starts_ptr + sequence) * stride_start
    start, end = tl.load(spans_ptr + 2 * sequence), tl.load(spans_ptr + 2 * sequence + 1)

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


def _launch(hidden: Tensor, starts: Tensor, spans: Tensor) -> Tensor:
    """`_span_means` in one kernel."""
    num_sequences, width = len(spans), hidden.shape[-1]
    means = hidden.new_empty((num_sequences, width), dtype=compute_dtype(hidden))
    if means.numel() == 0:
        return means
    with torch.cuda.device_of(hidden):
        _span_means_kernel[(num_sequences * triton.cdiv(width, BLOCK_D),)](
            means,
            hidden,
            starts,
            spans,
            width,
            hidden.stride(0),
            hidden.stride(-2),
            hidden.stride(-1),
            BLOCK_T=BLOCK_T,
            BLOCK_D=BLOCK_D,
            num_warps=NUM_WARPS,  # pyright: ignore[reportCallIssue]
        )
    return means
