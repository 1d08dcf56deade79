"""Eq. 11 (Sec. 3.5): from one advantage per sequence to one per token.

    a_it = A_i w_it / (sum_u w_iu + weight_eps)

The weight w is 1 on answer tokens, `think_weight` (gamma+) on the rationale tokens of a positive, 0
on those of a negative and 0 elsewhere. So a sequence's tokens take three values, and the sum needs
no reduction: it follows from the spans' lengths.

Shape letters: B sequences, T tokens, N tokens of all sequences in a row.
"""

import torch
from torch import Tensor

from care_kernels._batch_checks import check_cu_seqlens, check_spans, check_tensor
from care_kernels._checks import FLOAT_DTYPES
from care_kernels._launch import compute_dtype, resolve_backend

THINK_WEIGHT = 0.005
"""gamma+ (Sec. 3.5)."""
WEIGHT_EPS = 1e-8
"""eps_w: keeps a sequence without any weight at zero instead of 0 / 0."""


def token_advantages(
    advantages: Tensor,
    think_spans: Tensor,
    answer_spans: Tensor,
    is_positive: Tensor,
    *,
    seq_len: int | None = None,
    cu_seqlens: Tensor | None = None,
    total_tokens: int | None = None,
    think_weight: float = THINK_WEIGHT,
    weight_eps: float = WEIGHT_EPS,
    backend: str | None = None,
) -> Tensor:
    """Eq. 11 (Sec. 3.5): a_it = A_i w_it / (sum_u w_iu + weight_eps), without gradient.

    Give `seq_len` for padded sequences, or `cu_seqlens` for packed ones. A token inside both spans
    belongs to the answer. A negative's rationale and a sequence without spans get 0.

    Spans that leave their sequence are refused on CPU tensors. The values of CUDA tensors are not
    read; there such spans are cut to the sequence.

    Args:
        advantages: [B] float, A of Eqs. 7-8, one per sequence.
        think_spans: [B, 2] int, half-open token ranges of the rationale, counted from the start of
            their sequence; start == end where there is none.
        answer_spans: [B, 2] int, the same for the answer.
        is_positive: [B] bool, whose rationale tokens weigh `think_weight` (acc = 1, line 40).
        seq_len: T; the result is [B, T].
        cu_seqlens: [B + 1] int, where each packed sequence starts, and the end of the last
            (FlashAttention's convention); the result is [N].
        total_tokens: N, at least cu_seqlens[-1]; tokens beyond it get 0. None: cu_seqlens[-1],
            which costs a host synchronisation on CUDA.
        think_weight: gamma+.
        weight_eps: eps_w.
        backend: None, "triton" or "torch".

    Returns:
        [B, T] or [N] float32 (float64 for float64 advantages).

    Raises:
        ValueError: an argument does not fit; the message names it, its row, what came and what was
            wanted.

    Source: paper Eq. 11; Algorithm 1, lines 40-41.
    """
    chosen = resolve_backend(backend, advantages.device)
    num_sequences = _check_layout(advantages, seq_len, cu_seqlens, total_tokens)
    check_region_options(think_weight, weight_eps)
    lengths = seq_len if cu_seqlens is None else cu_seqlens.long().diff()
    assert lengths is not None
    where = ("advantages", advantages)
    check_spans("think_spans", think_spans, num_sequences, lengths, where)
    check_spans("answer_spans", answer_spans, num_sequences, lengths, where)
    check_tensor("is_positive", is_positive, (num_sequences,), (torch.bool,), where)

    if cu_seqlens is None:
        assert seq_len is not None
        shape: tuple[int, ...] = (num_sequences, seq_len)
    else:
        shape = (int(cu_seqlens[-1]) if total_tokens is None else total_tokens,)
    result = advantages.new_zeros(shape, dtype=compute_dtype(advantages), requires_grad=False)
    if num_sequences == 0 or result.numel() == 0:
        return result
    inputs = (advantages.detach(), think_spans, answer_spans, is_positive, cu_seqlens)
    if chosen == "triton":
        from care_kernels.triton.region_weights import write_token_advantages

        write_token_advantages(result, *inputs, think_weight, weight_eps)
        return result
    return _token_advantages(result, *inputs, think_weight, weight_eps)


def check_region_options(think_weight: float, weight_eps: float) -> None:
    """gamma+ at least 0; eps_w above 0."""
    if not think_weight >= 0:
        raise ValueError(f"think_weight: got {think_weight}; wanted 0 or more")
    if not weight_eps > 0:
        raise ValueError(f"weight_eps: got {weight_eps}; wanted more than 0")


def _check_layout(
    advantages: Tensor, seq_len: int | None, cu_seqlens: Tensor | None, total_tokens: int | None
) -> int:
    """B, once exactly one layout is described and fits."""
    check_tensor("advantages", advantages, (None,), FLOAT_DTYPES, ("advantages", advantages))
    num_sequences = advantages.shape[0]
    if (seq_len is None) == (cu_seqlens is None):
        got = "neither" if seq_len is None else "both"
        raise ValueError(f"seq_len: got {got} of seq_len and cu_seqlens; wanted exactly one")
    if seq_len is not None and seq_len < 0:
        raise ValueError(f"seq_len: got {seq_len}; wanted 0 or more")
    if cu_seqlens is None:
        if total_tokens is not None:
            raise ValueError(f"total_tokens: got {total_tokens}; wanted None without cu_seqlens")
        return num_sequences
    check_cu_seqlens(cu_seqlens, num_sequences, total_tokens, ("advantages", advantages))
    return num_sequences


@torch.no_grad()
def _token_advantages(
    like: Tensor,
    advantages: Tensor,
    think_spans: Tensor,
    answer_spans: Tensor,
    is_positive: Tensor,
    cu_seqlens: Tensor | None,
    think_weight: float,
    weight_eps: float,
) -> Tensor:
    """Eq. 11 on every token at once, in the shape and dtype of `like`."""
    positions = torch.arange(like.shape[-1], device=like.device)
    if cu_seqlens is None:
        owner: tuple = (slice(None), None)
        lengths: Tensor | int = like.shape[1]
    else:
        ends = cu_seqlens.long()
        # Tokens beyond the last sequence count as its own, past its end, where no span reaches.
        sequence = torch.searchsorted(ends[1:], positions, right=True).clamp_(
            max=len(advantages) - 1
        )
        positions = positions - ends[sequence]
        owner, lengths = (sequence,), ends.diff()
    think_start, think_end = _cut(think_spans, lengths)
    answer_start, answer_end = _cut(answer_spans, lengths)

    num_shared = torch.minimum(think_end, answer_end) - torch.maximum(think_start, answer_start)
    num_think = think_end - think_start - num_shared.clamp(min=0)
    # In float64, rounded once, so that every backend returns the same bits.
    rationale_weight = is_positive.double() * think_weight
    total = (answer_end - answer_start) + rationale_weight * num_think + weight_eps
    answer_value = advantages.double() / total
    think_value = (answer_value * rationale_weight).to(like.dtype)[owner]
    answer_value = answer_value.to(like.dtype)[owner]

    in_think = (positions >= think_start[owner]) & (positions < think_end[owner])
    in_answer = (positions >= answer_start[owner]) & (positions < answer_end[owner])
    return torch.where(in_answer, answer_value, torch.where(in_think, think_value, 0.0))


def _cut(spans: Tensor, lengths: Tensor | int) -> tuple[Tensor, Tensor]:
    """Start and end of each span within [0, length], end not before start; each [B] int64."""
    start, end = spans.long().unbind(1)
    limit = torch.as_tensor(lengths, device=spans.device)
    start = start.clamp(min=0).minimum(limit)
    return start, torch.maximum(start, end.minimum(limit))
