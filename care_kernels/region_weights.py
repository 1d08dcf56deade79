"""Eq. 11 (Sec. 3.5): from one advantage per sequence to one per token.

    a_it = A_i w_it / (sum_u w_iu + weight_eps)

The weight w is a number per region: in the paper 1 on answer tokens, gamma+ on the rationale tokens
of a positive, 0 on those of a negative and 0 elsewhere. A trainer adds regions of its own (tags,
the end token, a malformed response as a whole); where regions overlap the last one counts.

Shape letters: B sequences, R regions of a sequence, T tokens, N tokens of all sequences in a row.
"""

# The kernels are in Triton's language, of which a type checker for Python knows little.
# pyright: reportGeneralTypeIssues=false

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from care_kernels import checks
from care_kernels.backends import compute_dtype, resolve_backend

THINK_WEIGHT = 0.005
"""gamma+ (Sec. 3.5)."""
WEIGHT_EPS = 1e-8
"""eps_w: keeps a sequence without any weight at zero instead of 0 / 0."""
BLOCK = 1024
NUM_WARPS = 4


class Regions(NamedTuple):
    """Token ranges of each sequence and what their tokens weigh; of overlapping ones the last."""

    spans: Tensor
    """[B, R, 2] int, half-open, from the start of their sequence; start == end: no token."""
    weights: Tensor
    """[B, R] float, at least 0; of either sign without `normalize`."""


@torch.no_grad()
def token_advantages(
    advantages: Tensor,
    think_spans: Tensor,
    answer_spans: Tensor,
    is_positive: Tensor,
    *,
    regions: Regions | None = None,
    seq_len: int | None = None,
    cu_seqlens: Tensor | None = None,
    total_tokens: int | None = None,
    think_weight: float = THINK_WEIGHT,
    weight_eps: float = WEIGHT_EPS,
    normalize: bool = True,
    backend: str | None = None,
) -> Tensor:
    """Eq. 11 (Sec. 3.5): a_it = A_i w_it / (sum_u w_iu + weight_eps), without gradient.

    Give `seq_len` for padded sequences, or `cu_seqlens` for packed ones. A token inside both spans
    belongs to the answer. Sums and quotients are float64, rounded once.

    Spans that leave their sequence are refused on CPU tensors. The values of CUDA tensors are not
    read; there such spans are cut to the sequence.

    Args:
        advantages: [B] float, A of Eqs. 7-8, one per sequence.
        think_spans: [B, 2] int, half-open token ranges of the rationale, counted from the start of
            their sequence; start == end where there is none.
        answer_spans: [B, 2] int, the same for the answer.
        is_positive: [B] bool, whose rationale tokens weigh `think_weight` (acc = 1, line 40).
        regions: more of them, laid over the two: tags, the end token, a malformed response.
        seq_len: T; the result is [B, T].
        cu_seqlens: [B + 1] int, where each packed sequence starts, and the end of the last; the
            result is [N].
        total_tokens: N, at least cu_seqlens[-1]; tokens beyond it get 0. None: cu_seqlens[-1],
            which costs a host synchronisation on CUDA.
        think_weight: gamma+.
        weight_eps: eps_w.
        normalize: False leaves the division out: a_it = A_i w_it, as losses with a denominator of
            their own want it.
        backend: None, "triton" or "torch".

    Returns:
        [B, T] or [N] float32 (float64 for float64 advantages).

    Raises:
        ValueError: an argument does not fit; the message names it and its row.

    Source: paper Eq. 11; Algorithm 1, lines 40-41.
    """
    checks.check_options(
        seq_len=seq_len, total_tokens=total_tokens, think_weight=think_weight, weight_eps=weight_eps
    )
    shapes = checks.Shapes()
    shapes.check("B", advantages=advantages)
    chosen, num_sequences = resolve_backend(backend, advantages.device), len(advantages)
    shapes.check_given(str(num_sequences + 1), checks.INT_DTYPES, cu_seqlens=cu_seqlens)
    shapes.check("B 2", checks.INT_DTYPES, think_spans=think_spans, answer_spans=answer_spans)
    shapes.check("B", (torch.bool,), is_positive=is_positive)
    ends, shape = _layout(advantages, seq_len, cu_seqlens, total_tokens)
    lengths = ends.diff()
    checks.check_spans("think_spans", think_spans, lengths)
    checks.check_spans("answer_spans", answer_spans, lengths)
    spans = torch.stack((think_spans.long(), answer_spans.long()), 1)
    rationale = is_positive.double() * think_weight
    weights = torch.stack((rationale, torch.ones_like(rationale)), 1)
    if regions is not None:
        shapes.check("B R 2", checks.INT_DTYPES, **{"regions.spans": regions.spans})
        shapes.check("B R", checks.FLOAT_DTYPES, **{"regions.weights": regions.weights})
        checks.check_spans("regions.spans", regions.spans, lengths)
        spans = torch.cat((spans, regions.spans.long()), 1)
        weights = torch.cat((weights, regions.weights.double()), 1)

    spans, total = cut_spans(spans, lengths[:, None]), torch.ones_like(rationale)
    if normalize:
        # Term by term, so that the sum has one order everywhere.
        terms = (_region_sizes(spans) * weights).unbind(1)
        total = sum(terms, torch.zeros_like(rationale)) + weight_eps
    result = advantages.new_zeros(shape, dtype=compute_dtype(advantages))
    if num_sequences > 0 and result.numel() > 0:
        values = advantages.double()[:, None] * weights / total[:, None]
        paint = _launch if chosen == "triton" else _paint
        paint(result.view(-1), values.to(result.dtype), spans, ends)
    return result


def _layout(
    advantages: Tensor, seq_len: int | None, cu_seqlens: Tensor | None, total_tokens: int | None
) -> tuple[Tensor, tuple[int, ...]]:
    """Where sequences start and the last one ends, [B + 1] int64, and the result's shape."""
    if (seq_len is None) == (cu_seqlens is None):
        got = "neither" if seq_len is None else "both"
        raise checks.wrong("seq_len", f"{got} of seq_len and cu_seqlens", "exactly one")
    if cu_seqlens is not None:
        checks.check_cu_seqlens(cu_seqlens, total_tokens)
        return cu_seqlens.long(), (int(cu_seqlens[-1]) if total_tokens is None else total_tokens,)
    assert seq_len is not None
    if total_tokens is not None:
        raise checks.wrong("total_tokens", total_tokens, "None without cu_seqlens")
    ends = seq_len * torch.arange(len(advantages) + 1, device=advantages.device)
    return ends, (len(advantages), seq_len)


def cut_spans(spans: Tensor, lengths: Tensor) -> Tensor:
    """Half-open ranges [..., 2], cut to their sequences of [...] tokens: start <= end within."""
    start = spans[..., 0].clamp(min=0).minimum(lengths)
    return torch.stack((start, start.maximum(spans[..., 1].minimum(lengths))), -1)


def _region_sizes(spans: Tensor) -> Tensor:
    """[B, R] float64, how many tokens of each region no later one covers, from its spans.

    Between two neighbouring ends of spans all tokens lie in the same regions.
    """
    edges = spans.flatten(1).sort(1).values
    left, regions = edges[:, :-1, None], torch.arange(spans.shape[1], device=spans.device)
    covers = (spans[:, None, :, 0] <= left) & (left < spans[:, None, :, 1])
    last = torch.where(covers, regions, -1).amax(2, keepdim=True)
    return ((last == regions) * edges.diff(dim=1)[..., None]).sum(1).double()


def _paint(result: Tensor, values: Tensor, spans: Tensor, ends: Tensor) -> None:
    """Write each region's number [B, R] into its tokens of a result [N] of zeros.

    `ends` [B + 1] are where each sequence starts, and the end of the last.
    """
    tokens = torch.arange(len(result), device=result.device)
    # Tokens beyond the last sequence count as its own, past its end, where no span reaches.
    owner = torch.searchsorted(ends[1:], tokens, right=True).clamp_(max=len(values) - 1)
    positions = tokens - ends[owner]
    for r in range(values.shape[1]):
        start, end = spans[owner, r].unbind(1)
        inside = (positions >= start) & (positions < end)
        result.copy_(torch.where(inside, values[owner, r], result))


# The number of programs changes with every batch: compiling again for each would cost more.
@triton.jit(do_not_specialize=["num_splits"])
def _paint_kernel(
    result_ptr,  # [N]
    values_ptr,  # [B, R] of the result's type
    spans_ptr,  # [B, R, 2] int64
    ends_ptr,  # [B + 1] int64
    num_splits,
    NUM_REGIONS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # One program writes every num_splits-th block of one sequence's tokens.
    sequence = (tl.program_id(0) // num_splits).to(tl.int64)
    split = tl.program_id(0) % num_splits
    first = tl.load(ends_ptr + sequence)
    length = tl.load(ends_ptr + sequence + 1) - first
    for block_start in range(split * BLOCK, length, num_splits * BLOCK):
        token = block_start + tl.arange(0, BLOCK)
        value = tl.zeros((BLOCK,), result_ptr.dtype.element_ty)
        for r in tl.static_range(NUM_REGIONS):
            region = sequence * NUM_REGIONS + r
            start, end = tl.load(spans_ptr + 2 * region), tl.load(spans_ptr + 2 * region + 1)
            inside = (token >= start) & (token < end)
            value = tl.where(inside, tl.load(values_ptr + region), value)
        tl.store(result_ptr + first + token, value, mask=token < length)


def _launch(result: Tensor, values: Tensor, spans: Tensor, ends: Tensor) -> None:
    """`_paint` in one kernel; what lies behind the last sequence is left as it is."""
    num_sequences, num_regions = values.shape
    num_splits = triton.cdiv(triton.cdiv(len(result), num_sequences), BLOCK)
    with torch.cuda.device_of(result):
        _paint_kernel[(num_sequences * num_splits,)](
            result,
            values,
            spans,
            ends.contiguous(),
            num_splits,
            NUM_REGIONS=num_regions,
            BLOCK=BLOCK,
            num_warps=NUM_WARPS,  # pyright: ignore[reportCallIssue]
        )
