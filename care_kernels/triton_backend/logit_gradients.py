"""The loss's derivative with respect to the raw logits, from float32 logits and row statistics.

With p = softmax(z), g = dL/dl, lambda = -dL/dH, kappa = dL/dK and r_j = log p_j - log q_j:

    dL/dz_j   = g (1[j=y] - p_j) + lambda p_j (log p_j + H) + kappa p_j (r_j - K)
    dL/draw_j = dL/dz_j * dz_j/draw_j

The sum, 1[j=y] included, is made in float32 and rounded once, to the dtype of the output. The
output may lie in the logits' own memory, at half their width: a 16-bit row then fills the first
half of its float32 row.

Shape letters: C rows of the chunk, V vocabulary.
"""

# Kernels are in Triton's language, of which a type checker for Python knows little.
# pyright: reportPossiblyUnboundVariable=false, reportCallIssue=false, reportArgumentType=false
# pyright: reportOperatorIssue=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from care_kernels.row_softmax import LogitTransform, RowGradients, RowStatistics
from care_kernels.triton_backend.compile_cases import (
    NUM_ROWS,
    VOCAB_SIZE,
    CompileCase,
    compile_case,
)
from care_kernels.triton_backend.launching import check_apart, check_rows, check_walkable, overlap
from care_kernels.triton_backend.transforms import (
    TRANSFORM_TYPES,
    slope_at,
    transform_arguments,
)

BLOCK_V = 2048
NUM_WARPS = 8
SIGNALLING_NAN = tl.constexpr(0x7F800001)
OUT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@triton.jit
def _logit_gradients_kernel(
    logits_ptr,
    ref_logits_ptr,
    target_ids_ptr,
    max_logit_ptr,
    log_total_ptr,
    entropy_ptr,
    kl_ptr,
    ref_max_logit_ptr,
    ref_log_total_ptr,
    d_log_probs_ptr,
    d_entropy_ptr,
    d_kl_ptr,
    out_ptr,
    vocab_size,
    stride_logits,
    stride_ref_logits,
    stride_out,
    inner,
    outer,
    slope,
    uncap,
    HAS_SOFTCAP: tl.constexpr,
    NARROWS_IN_PLACE: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    # One program owns one row and walks it left to right: it alone reads and writes that row.
    row = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, BLOCK_V)
    logits_row_ptr = logits_ptr + row * stride_logits
    out_row_ptr = out_ptr + row * stride_out
    target_id = tl.load(target_ids_ptr + row)
    max_logit = tl.load(max_logit_ptr + row)
    log_total = tl.load(log_total_ptr + row)
    g = tl.load(d_log_probs_ptr + row)
    if d_entropy_ptr is not None:
        d_entropy = tl.load(d_entropy_ptr + row)
        entropy = tl.load(entropy_ptr + row)
    if d_kl_ptr is not None:
        ref_row_ptr = ref_logits_ptr + row * stride_ref_logits
        ref_max_logit = tl.load(ref_max_logit_ptr + row)
        ref_log_total = tl.load(ref_log_total_ptr + row)
        d_kl = tl.load(d_kl_ptr + row)
        kl = tl.load(kl_ptr + row)

    for start in range(0, vocab_size, BLOCK_V):
        columns = start + lanes
        inside = columns < vocab_size
        z = tl.load(logits_row_ptr + columns, mask=inside, other=max_logit)
        log_p = (z - max_logit) - log_total
        weight = z * 0.0 - g
        if d_entropy_ptr is not None:
            weight -= d_entropy * (log_p + entropy)
        if d_kl_ptr is not None:
            ref_z = tl.load(ref_row_ptr + columns, mask=inside, other=ref_max_logit)
            log_ratio = log_p - ((ref_z - ref_max_logit) - ref_log_total)
            weight += d_kl * (log_ratio - kl)
        grad = tl.exp(log_p) * weight + tl.where(columns == target_id, g, 0.0)
        grad *= slope_at(z, slope, uncap, HAS_SOFTCAP)
        if NARROWS_IN_PLACE:
            # This block's stores land on columns up to this block's end at most, on nothing still
            # unread once every warp has this block's values in its registers. A barrier alone does
            # not say that (on AMD a load may be in flight across one), so the stores wait on a
            # number made of all values: never the one signalling NaN, as no arithmetic makes one.
            bits = tl.max(z.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 0)
            inside = inside & (bits != SIGNALLING_NAN)
        tl.store(out_row_ptr + columns, grad.to(out_ptr.dtype.element_ty), mask=inside)


def logit_gradients(
    logits: Tensor,
    target_ids: Tensor,
    stats: RowStatistics,
    gradients: RowGradients,
    transform: LogitTransform,
    *,
    out: Tensor,
    ref_logits: Tensor | None = None,
) -> None:
    """Write the loss's derivative with respect to the raw logits x W^T + b into `out`.

    Args:
        logits: [C, V] float32, z; any row stride.
        target_ids: [C] int.
        stats: from `row_statistics` on these logits.
        gradients: g, dL/dH and kappa of each row.
        transform: what made z of the raw logits.
        out: [C, V] bfloat16, float16 or float32; its own memory, or the logits': either `logits`
            itself or `logits.view(torch.bfloat16)[:, :V]`, whose rows start where theirs do.
        ref_logits: [C, V] float32, needed where `gradients.kl` is given.

    Raises:
        ValueError: a dtype, shape or stride the kernel does not take, an overlap other than above,
            or a gradient whose statistics are missing.
    """
    check_rows("logits", logits, (torch.float32,))
    check_rows("out", out, OUT_DTYPES)
    check_walkable(logits, out)
    with_entropy, with_kl = gradients.entropy is not None, gradients.kl is not None
    if with_entropy and stats.entropy is None:
        raise ValueError("stats.entropy: got None; wanted [C], as gradients.entropy is given")
    if with_kl:
        if ref_logits is None or stats.kl is None:
            raise ValueError("ref_logits and stats.kl: got None; wanted both, for gradients.kl")
        check_rows("ref_logits", ref_logits, (torch.float32,))
        check_apart(ref_logits, out)
    num_rows, vocab_size = logits.shape
    if num_rows == 0:
        return
    with torch.cuda.device_of(logits):
        _logit_gradients_kernel[(num_rows,)](
            logits,
            ref_logits if with_kl else None,
            target_ids.contiguous(),
            stats.max_logit,
            stats.log_total,
            stats.entropy if with_entropy else None,
            stats.kl if with_kl else None,
            stats.ref_max_logit if with_kl else None,
            stats.ref_log_total if with_kl else None,
            gradients.log_probs.contiguous(),
            gradients.entropy.contiguous() if gradients.entropy is not None else None,
            gradients.kl.contiguous() if gradients.kl is not None else None,
            out,
            vocab_size,
            logits.stride(0),
            ref_logits.stride(0) if with_kl and ref_logits is not None else 0,
            out.stride(0),
            **transform_arguments(transform),
            NARROWS_IN_PLACE=overlap(logits, out) and out.element_size() < logits.element_size(),
            BLOCK_V=BLOCK_V,
            num_warps=NUM_WARPS,
            num_stages=1,
        )


def compile_cases() -> list[CompileCase]:
    """Plain, and with every term and the softcap, into bfloat16 in place."""
    pointers = [name for name in _logit_gradients_kernel.arg_names if name.endswith("_ptr")]
    types = dict.fromkeys(pointers, "*fp32")
    types |= {"target_ids_ptr": "*i64", "out_ptr": "*bf16"} | TRANSFORM_TYPES
    kl = ("ref_logits_ptr", "kl_ptr", "ref_max_logit_ptr", "ref_log_total_ptr", "d_kl_ptr")
    elements = NUM_ROWS * VOCAB_SIZE
    return [
        compile_case(
            f"logit_gradients{suffix}",
            _logit_gradients_kernel,
            types,
            {"BLOCK_V": BLOCK_V, "HAS_SOFTCAP": has_softcap, "NARROWS_IN_PLACE": True}
            | dict.fromkeys(absent),
            num_warps=NUM_WARPS,
            grid=f"{NUM_ROWS} rows",
            hbm_bytes=elements * bytes_each,
        )
        for suffix, absent, has_softcap, bytes_each in (
            ("", (*kl, "entropy_ptr", "d_entropy_ptr"), False, 6),
            ("_entropy_kl_softcap", (), True, 10),
        )
    ]
