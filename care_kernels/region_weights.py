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
    """[B, R] float, at least 0."""


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
    belongs to the answer. A negative's rationale and a sequence without spans get 0. Sums and
    quotients are float64, rounded once.

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
        cu_seqlens: [B + 1] int, where each packed sequence starts, and the end of the last
            (FlashAttention's convention); the result is [N].
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
        ValueError: an argument does not fit; the message names it, its row, what came and what was
            wanted.

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
        shapes.check("B R", **{"regions.weights": regions.weights})
        checks.check_spans("regions.spans", regions.spans, lengths)
        spans = torch.cat((spans, regions.spans.long()), 1)
        weights = torch.cat((weights, regions.weights.double()), 1)

    result = advantages.new_zeros(shape, dtype=compute_dtype(advantages))
    if num_sequences > 0 and result.numel() > 0:
        credit = _Credit(advantages, spans, weights, ends, normalize, weight_eps)
        (_launch if chosen == "triton" else _fill)(result.view(-1), credit)
    return result


class _Credit(NamedTuple):
    """What Eq. 11 spreads over sequences that lie one behind the other."""

    advantages: Tensor
    """[B]."""
    spans: Tensor
    """[B, R, 2] int64."""
    weights: Tensor
    """[B, R] float64."""
    ends: Tensor
    """[B + 1] int64, where each sequence starts, and the end of the last."""
    normalize: bool
    weight_eps: float


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


def _fill(result: Tensor, credit: _Credit) -> None:
    """Write Eq. 11 into `result` [N], every token at once; behind the last sequence 0."""
    advantages, spans, weights, ends, normalize, weight_eps = credit
    tokens = torch.arange(len(result), device=result.device)
    # Tokens beyond the last sequence count as its own, past its end, where no span reaches.
    owner = torch.searchsorted(ends[1:], tokens, right=True).clamp_(max=len(advantages) - 1)
    positions, lengths = tokens - ends[owner], ends.diff()[:, None]
    first = spans[..., 0].clamp(min=0).minimum(lengths)
    last = first.maximum(spans[..., 1].minimum(lengths))

    region = torch.full_like(owner, -1)
    for r in range(weights.shape[1]):
        inside = (positions >= first[owner, r]) & (positions < last[owner, r])
        region = region.masked_fill(inside, r)
    total = torch.ones_like(weights[:, 0])
    if normalize:
        total = torch.zeros_like(total)
        for r in range(weights.shape[1]):
            counts = torch.zeros(len(weights), dtype=torch.int64, device=result.device)
            counts.index_put_((owner,), (region == r).long(), accumulate=True)
            total = total + counts * weights[:, r]
        total = total + weight_eps
    values = advantages.double()[:, None] * weights / total[:, None]
    result.copy_(torch.where(region < 0, 0.0, values[owner, region.clamp(min=0)]))


@triton.jit
def load_span(spans_ptr, index, length):
    """Start and end of a span, cut to its sequence."""
    start = tl.load(spans_ptr + 2 * index).to(tl.int64)
    end = tl.load(spans_ptr + 2 * index + 1).to(tl.int64)
    start = tl.minimum(tl.maximum(start, 0), length)
    return start, tl.maximum(start, tl.minimum(end, length))


@triton.jit
def _last_region(token, spans_ptr, sequence, length, NUM_REGIONS: tl.constexpr):
    """Index of the last region that holds each token; -1 where none does."""
    region = tl.zeros_like(token) - 1
    for r in tl.static_range(NUM_REGIONS):
        start, end = load_span(spans_ptr, sequence * NUM_REGIONS + r, length)
        region = tl.where((token >= start) & (token < end), r, region)
    return region


# The number of programs changes with every batch: compiling again for each would cost more.
@triton.jit(do_not_specialize=["num_splits"])
def _token_advantages_kernel(
    out_ptr,  # [N] float32 or float64
    advantages_ptr,  # [B]
    spans_ptr,  # [B, R, 2] int64
    weights_ptr,  # [B, R] float64
    ends_ptr,  # [B + 1] int64
    num_splits,
    weight_eps: tl.float64,  # pyright: ignore[reportInvalidTypeForm]
    NORMALIZE: tl.constexpr,
    NUM_REGIONS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # One program counts all of one sequence's tokens and writes every num_splits-th block of them.
    sequence = (tl.program_id(0) // num_splits).to(tl.int64)
    split = tl.program_id(0) % num_splits
    first = tl.load(ends_ptr + sequence)
    length = tl.load(ends_ptr + sequence + 1) - first

    total = weight_eps * 0.0
    if NORMALIZE:
        for r in tl.static_range(NUM_REGIONS):
            count = tl.zeros((BLOCK,), tl.int64)
            for block_start in range(0, length, BLOCK):
                token = block_start + tl.arange(0, BLOCK)
                region = _last_region(token, spans_ptr, sequence, length, NUM_REGIONS)
                count += (region == r).to(tl.int64)
            region_weight = tl.load(weights_ptr + sequence * NUM_REGIONS + r)
            total += tl.sum(count, 0).to(tl.float64) * region_weight
        total += weight_eps
    else:
        total += 1.0
    advantage = tl.load(advantages_ptr + sequence).to(tl.float64)

    for block_start in range(split * BLOCK, length, num_splits * BLOCK):
        token = block_start + tl.arange(0, BLOCK)
        region = _last_region(token, spans_ptr, sequence, length, NUM_REGIONS)
        weight = tl.load(weights_ptr + sequence * NUM_REGIONS + region, mask=region >= 0, other=0.0)
        value = (advantage * weight / total).to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + first + token, value, mask=token < length)


def _launch(result: Tensor, credit: _Credit) -> None:
    """`_fill` in one kernel; what lies behind the last sequence is left as it is."""
    num_sequences, num_regions = credit.weights.shape
    num_splits = triton.cdiv(triton.cdiv(len(result), num_sequences), BLOCK)
    # Triton launches on the current device, whatever the tensors' own.
    with torch.cuda.device_of(result):
        _token_advantages_kernel[(num_sequences * num_splits,)](
            result,
            credit.advantages.contiguous(),
            credit.spans,
            credit.weights,
            credit.ends.contiguous(),
            num_splits,
            credit.weight_eps,
            NORMALIZE=credit.normalize,
            NUM_REGIONS=num_regions,
            BLOCK=BLOCK,
            num_warps=NUM_WARPS,  # pyright: ignore[reportCallIssue]
        )
