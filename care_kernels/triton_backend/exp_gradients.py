"""The loss's derivative from the exponentials that `fused_projection.project` kept, in place.

With E_j = e^{z_j - m_t}, tile t's maximum m_t, the row's m and log s, g = dL/dl, lambda = -dL/dH:

    p_j       = E_j e^{m_t - m - log s}
    log p_j   = log E_j + m_t - m - log s
    dL/dz_j   = g (1[j=y] - p_j) + lambda p_j (log p_j + H)
    dL/draw_j = dL/dz_j * dz_j/draw_j

1[j=y] - p_j at the target is -expm1(l), from the float32 log-prob. z_j = log E_j + m_t comes back
for the entropy term and the softcap's slope only, where E_j > 0: E's rounding, 2^-9 of E, moves z
by at most 0.002.

Shape letters: C rows of the chunk, V vocabulary.
"""

# Kernels are in Triton's language, of which a type checker for Python knows little.
# pyright: reportPossiblyUnboundVariable=false, reportCallIssue=false, reportArgumentType=false
# pyright: reportOperatorIssue=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from care_kernels.softmax import LogitTransform, RowGradients, RowStatistics
from care_kernels.triton_backend.compile_cases import (
    NUM_ROWS,
    VOCAB_SIZE,
    CompileCase,
    compile_case,
)
from care_kernels.triton_backend.fused_projection import TILE
from care_kernels.triton_backend.launching import check_rows
from care_kernels.triton_backend.tile_statistics import TileStatistics
from care_kernels.triton_backend.transforms import (
    TRANSFORM_TYPES,
    expm1,
    slope_at,
    transform_arguments,
)

BLOCK_V = 2048
NUM_WARPS = 8


@triton.jit(do_not_specialize=["num_rows"])
def _exp_gradients_kernel(
    exps_ptr,
    tile_max_ptr,
    target_ids_ptr,
    target_logit_ptr,
    log_probs_ptr,
    max_logit_ptr,
    log_total_ptr,
    entropy_ptr,
    d_log_probs_ptr,
    d_entropy_ptr,
    num_rows,
    vocab_size,
    stride_exps,
    inner,
    outer,
    slope,
    uncap,
    HAS_SOFTCAP: tl.constexpr,
    TILE_V: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    # One program owns one row. An element is stored only once it has been loaded: it is what the
    # stored number is made of.
    row = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, BLOCK_V)
    exps_row_ptr = exps_ptr + row * stride_exps
    target_id = tl.load(target_ids_ptr + row)
    log_prob = tl.load(log_probs_ptr + row)
    max_logit = tl.load(max_logit_ptr + row)
    log_total = tl.load(log_total_ptr + row)
    g = tl.load(d_log_probs_ptr + row)
    weight_at_target = -g * expm1(log_prob)
    if d_entropy_ptr is not None:
        d_entropy = tl.load(d_entropy_ptr + row)
        entropy = tl.load(entropy_ptr + row)
        weight_at_target -= d_entropy * tl.exp(log_prob) * (log_prob + entropy)
    target_logit = tl.load(target_logit_ptr + row)
    at_target = weight_at_target * slope_at(target_logit, slope, uncap, HAS_SOFTCAP)

    for start in range(0, vocab_size, BLOCK_V):
        columns = start + lanes
        inside = columns < vocab_size
        e = tl.load(exps_row_ptr + columns, mask=inside, other=0.0).to(tl.float32)
        tiles = (columns // TILE_V).to(tl.int64)
        tile_max = tl.load(tile_max_ptr + tiles * num_rows + row, mask=inside, other=0.0)
        log_scale = (tile_max - max_logit) - log_total
        p = e * tl.exp(log_scale)
        weight = p * 0.0 - g
        if (d_entropy_ptr is not None) or HAS_SOFTCAP:
            # Where E is 0 so is p, and any finite logarithm will do.
            log_e = tl.log(tl.where(e > 0, e, 1.0))
        if d_entropy_ptr is not None:
            weight -= d_entropy * ((log_e + log_scale) + entropy)
        grad = p * weight
        if HAS_SOFTCAP:
            grad *= slope_at(log_e + tile_max, slope, uncap, HAS_SOFTCAP)
        else:
            grad *= slope
        grad = tl.where(columns == target_id, at_target, grad)
        tl.store(exps_row_ptr + columns, grad.to(exps_ptr.dtype.element_ty), mask=inside)


def exp_gradients_(
    exps: Tensor,
    tiles: TileStatistics,
    target_ids: Tensor,
    stats: RowStatistics,
    gradients: RowGradients,
    transform: LogitTransform,
) -> None:
    """Overwrite E with the loss's derivative with respect to the raw logits x W^T + b.

    Args:
        exps: [C, V] bfloat16, as `project` filled it.
        tiles: from the same `project`.
        target_ids: [C] int.
        stats: from `combine` on these tiles.
        gradients: g and dL/dH of each row; never the exact KL's.
        transform: what made z of the raw logits.

    Raises:
        ValueError: a gradient that this path does not have, or another dtype or shape.
    """
    check_rows("exps", exps, (torch.bfloat16,))
    if gradients.kl is not None:
        raise ValueError("gradients.kl: got a tensor; wanted None, this path has no exact KL")
    with_entropy = gradients.entropy is not None
    if with_entropy and stats.entropy is None:
        raise ValueError("stats.entropy: got None; wanted [C], as gradients.entropy is given")
    num_rows, vocab_size = exps.shape
    if num_rows == 0:
        return
    with torch.cuda.device_of(exps):
        _exp_gradients_kernel[(num_rows,)](
            exps,
            tiles.max_logit,
            target_ids.contiguous(),
            tiles.target_logit,
            stats.log_probs,
            stats.max_logit,
            stats.log_total,
            stats.entropy if with_entropy else None,
            gradients.log_probs.contiguous(),
            gradients.entropy.contiguous() if gradients.entropy is not None else None,
            num_rows,
            vocab_size,
            exps.stride(0),
            **transform_arguments(transform),
            TILE_V=tiles.tile_size,
            BLOCK_V=BLOCK_V,
            num_warps=NUM_WARPS,
            num_stages=1,
        )


def compile_cases() -> list[CompileCase]:
    """Plain, and with entropy and softcap."""
    pointers = [name for name in _exp_gradients_kernel.arg_names if name.endswith("_ptr")]
    types = dict.fromkeys(pointers, "*fp32") | TRANSFORM_TYPES
    types |= {"exps_ptr": "*bf16", "target_ids_ptr": "*i64"}
    return [
        compile_case(
            f"exp_gradients{suffix}",
            _exp_gradients_kernel,
            types,
            {"HAS_SOFTCAP": has_softcap, "TILE_V": TILE.BLOCK_V, "BLOCK_V": BLOCK_V}
            | dict.fromkeys(absent),
            num_warps=NUM_WARPS,
            grid=f"{NUM_ROWS} rows",
            hbm_bytes=4 * NUM_ROWS * VOCAB_SIZE,
        )
        for suffix, absent, has_softcap in (
            ("", ("entropy_ptr", "d_entropy_ptr"), False),
            ("_entropy_softcap", (), True),
        )
    ]
