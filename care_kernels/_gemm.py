"""The two gradient GEMMs, dX = dZ W and dW += dZ^T X, in the precision that dZ comes in.

dZ in the operands' own bfloat16 or float16 goes to a library GEMM, which accumulates in float32.
dZ in float32 or float64 takes its partner upcast, tile by tile.

On a CPU with AMX, oneDNN's bfloat16 GEMM reads on from a row's end to the next multiple of its
tile and multiplies what it finds there by zeros. So where rows are longer in memory than the matrix
is wide, zeros must stand behind their end: a NaN times zero is NaN. `in_place` and `empty_exps` see
to the chunk's own rows, `back_project` to a head that is a view over wider rows.
"""

import torch
from torch import Tensor

from care_kernels._native_cpu import native_ops
from care_kernels.row_softmax import vocab_tiles


def back_project(grad_logits: Tensor, weight: Tensor) -> Tensor:
    """dZ [C, V] times W [V, D], in dZ's dtype."""
    if grad_logits.dtype == weight.dtype and (weight.is_cuda or weight.is_contiguous()):
        return grad_logits @ weight
    out = grad_logits.new_zeros(
        (grad_logits.shape[0], weight.shape[1]),
        dtype=torch.promote_types(grad_logits.dtype, torch.float32),
    )
    for tile in vocab_tiles(weight.shape[0]):
        out.addmm_(grad_logits[:, tile].to(out.dtype), weight[tile].to(out.dtype).contiguous())
    return out.to(grad_logits.dtype)


def add_weight_gradient(
    grad_logits: Tensor, inputs: Tensor, into: Tensor, *, is_first: bool
) -> None:
    """into [V, D] += dZ^T [V, C] times X [C, D], or = for the first chunk.

    Args:
        grad_logits: dZ [C, V].
        inputs: [C, D] in dZ's dtype.
        into: [V, D] in any floating dtype; uninitialised where `is_first`.
        is_first: nothing has been added yet.
    """
    is_native = grad_logits.dtype == torch.bfloat16 and not grad_logits.is_cuda
    if is_native and into.dtype in (torch.float32, torch.bfloat16) and into.stride(1) == 1:
        ops = native_ops()
        assert ops is not None, "bfloat16 logits on a CPU come from the C++ kernels"
        ops.add_weight_gradient(grad_logits, inputs, into, is_first)
    elif into.dtype == grad_logits.dtype:
        if is_first:
            torch.mm(grad_logits.T, inputs, out=into)
        else:
            into.addmm_(grad_logits.T, inputs)
    elif into.is_cuda and into.dtype == torch.float32:
        beta = 0.0 if is_first else 1.0
        torch.addmm(into, grad_logits.T, inputs, out_dtype=torch.float32, beta=beta, out=into)
    else:
        for tile in vocab_tiles(grad_logits.shape[1]):
            product = grad_logits[:, tile].T @ inputs
            if is_first:
                into[tile] = product
            else:
                into[tile] += product
