"""Eq. 11 as one kernel: spans in, token advantages out, padded or packed.

    a_it = A_i w_it / (sum_u w_iu + weight_eps),  w in {0, think_weight, 1}

The sum follows from the spans' lengths, so a program needs six numbers and writes its tokens.

Shape letters: B sequences, T tokens, N tokens of all sequences in a row.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024
NUM_WARPS = 4


@triton.jit
def load_span(spans_ptr, sequence, length):
    """Start and end of a span, cut to its sequence."""
    start = tl.load(spans_ptr + 2 * sequence).to(tl.int64)
    end = tl.load(spans_ptr + 2 * sequence + 1).to(tl.int64)
    start = tl.minimum(tl.maximum(start, 0), length)
    return start, tl.maximum(start, tl.minimum(end, length))


# T and the number of programs change with every batch: compiling again for each would cost more.
@triton.jit(do_not_specialize=["seq_len", "num_splits"])
def _token_advantages_kernel(
    out_ptr,
    advantages_ptr,
    think_spans_ptr,
    answer_spans_ptr,
    is_positive_ptr,
    cu_seqlens_ptr,
    seq_len,
    num_splits,
    think_weight: tl.float64,  # pyright: ignore[reportInvalidTypeForm]
    weight_eps: tl.float64,  # pyright: ignore[reportInvalidTypeForm]
    BLOCK: tl.constexpr,
):
    # One program owns every num_splits-th block of one sequence's tokens.
    sequence = (tl.program_id(0) // num_splits).to(tl.int64)
    split = tl.program_id(0) % num_splits
    if cu_seqlens_ptr is None:
        length = seq_len.to(tl.int64)
        first = sequence * length
    else:
        first = tl.load(cu_seqlens_ptr + sequence).to(tl.int64)
        length = tl.load(cu_seqlens_ptr + sequence + 1).to(tl.int64) - first
    think_start, think_end = load_span(think_spans_ptr, sequence, length)
    answer_start, answer_end = load_span(answer_spans_ptr, sequence, length)

    num_shared = tl.minimum(think_end, answer_end) - tl.maximum(think_start, answer_start)
    num_think = think_end - think_start - tl.maximum(num_shared, 0)
    # In float64, rounded once, so that every backend returns the same bits.
    is_positive = tl.load(is_positive_ptr + sequence) != 0
    rationale_weight = is_positive.to(tl.float64) * think_weight
    total = (answer_end - answer_start) + rationale_weight * num_think + weight_eps
    answer_value = tl.load(advantages_ptr + sequence).to(tl.float64) / total
    think_value = (answer_value * rationale_weight).to(out_ptr.dtype.element_ty)
    answer_value = answer_value.to(out_ptr.dtype.element_ty)

    for block_start in range(split * BLOCK, length, num_splits * BLOCK):
        token = block_start + tl.arange(0, BLOCK)
        in_think = (token >= think_start) & (token < think_end)
        in_answer = (token >= answer_start) & (token < answer_end)
        value = tl.where(in_answer, answer_value, tl.where(in_think, think_value, 0.0))
        tl.store(out_ptr + first + token, value, mask=token < length)


def write_token_advantages(
    out: Tensor,
    advantages: Tensor,
    think_spans: Tensor,
    answer_spans: Tensor,
    is_positive: Tensor,
    cu_seqlens: Tensor | None,
    think_weight: float,
    weight_eps: float,
) -> None:
    """Fill `out` with Eq. 11's token advantages.

    Args:
        out: [B, T], or [N] with cu_seqlens, float32 or float64, contiguous, not empty. Tokens
            beyond the last sequence are left as they are.
        advantages: [B] float.
        think_spans: [B, 2] int, cut to their sequence.
        answer_spans: [B, 2] int, the same.
        is_positive: [B] bool.
        cu_seqlens: [B + 1] int; None where `out` is padded.
        think_weight: gamma+.
        weight_eps: eps_w.
    """
    num_sequences = advantages.shape[0]
    num_splits = triton.cdiv(triton.cdiv(out.numel(), num_sequences), BLOCK)
    with torch.cuda.device_of(out):
        _token_advantages_kernel[(num_sequences * num_splits,)](
            out,
            advantages.contiguous(),
            think_spans.contiguous(),
            answer_spans.contiguous(),
            is_positive.contiguous(),
            None if cu_seqlens is None else cu_seqlens.contiguous(),
            out.shape[-1],
            num_splits,
            think_weight,
            weight_eps,
            BLOCK=BLOCK,
            num_warps=NUM_WARPS,  # pyright: ignore[reportCallIssue]
        )
