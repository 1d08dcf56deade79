"""An experiment that the sweep times: the training projection behind Hopper's tensor copies (TMA).

Not part of the package. It says what the projection would gain from loads through descriptors, from
a persistent loop and from stores through a descriptor, with the epilogue of plain logits.
"""

# Kernels are in Triton's language, of which a type checker for Python knows little.
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

_LOWEST = tl.constexpr(-3.4028234663852886e38)


class TmaTile(NamedTuple):
    """How one program is cut, and which of the three ideas it uses."""

    BLOCK_C: int
    BLOCK_V: int
    BLOCK_D: int
    GROUP_C: int
    num_warps: int
    num_stages: int
    persistent: bool
    flatten: bool
    store_by_tma: bool


TILES = (
    TmaTile(128, 256, 64, 16, 8, 3, False, False, False),
    TmaTile(128, 256, 64, 16, 8, 4, False, False, False),
    TmaTile(128, 256, 64, 16, 8, 3, False, False, True),
    TmaTile(128, 256, 64, 16, 8, 4, True, False, False),
    TmaTile(128, 256, 64, 16, 8, 3, True, False, True),
    TmaTile(128, 256, 64, 16, 8, 3, True, True, False),
    TmaTile(128, 128, 64, 16, 4, 4, False, False, False),
    TmaTile(128, 128, 64, 16, 8, 4, True, False, False),
    TmaTile(256, 128, 64, 8, 8, 3, False, False, False),
    TmaTile(256, 128, 64, 8, 8, 4, True, False, False),
)


@triton.jit(do_not_specialize=["num_rows", "num_programs"])
def _tma_kernel(
    hidden_desc,
    weight_desc,
    exps_desc,
    exps_ptr,
    target_ids_ptr,
    tile_max_ptr,
    tile_total_ptr,
    target_logit_ptr,
    num_rows,
    vocab_size,
    width,
    stride_exps,
    num_programs,
    BLOCK_C: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP_C: tl.constexpr,
    FLATTEN: tl.constexpr,
    STORE_BY_TMA: tl.constexpr,
):
    # A program owns the BLOCK_C x BLOCK_V tiles of logits num_programs apart, in an order that goes
    # down GROUP_C row blocks of a vocabulary tile before the next.
    row_blocks = tl.cdiv(num_rows, BLOCK_C)
    vocab_blocks = tl.cdiv(vocab_size, BLOCK_V)
    for tile in tl.range(
        tl.program_id(0), row_blocks * vocab_blocks, num_programs, flatten=FLATTEN
    ):
        group = tile // (GROUP_C * vocab_blocks)
        group_size = tl.minimum(row_blocks - group * GROUP_C, GROUP_C)
        in_group = tile - group * GROUP_C * vocab_blocks
        first_row = (group * GROUP_C + in_group % group_size) * BLOCK_C
        vocab_block = in_group // group_size
        first_column = vocab_block * BLOCK_V
        z = tl.zeros((BLOCK_C, BLOCK_V), tl.float32)
        for start in range(0, width, BLOCK_D):
            x = hidden_desc.load([first_row, start])
            w = weight_desc.load([first_column, start])
            z = tl.dot(x, w.T, z)
        rows = first_row + tl.arange(0, BLOCK_C)
        columns = first_column + tl.arange(0, BLOCK_V)
        inside = rows < num_rows
        target_ids = tl.load(target_ids_ptr + rows, mask=inside, other=-1).to(tl.int32)
        is_target = columns[None, :] == target_ids[:, None]
        target_logit = tl.sum(tl.where(is_target, z, 0.0), 1)
        last_column = tl.minimum(first_column + BLOCK_V, vocab_size)
        is_here = (target_ids >= first_column) & (target_ids < last_column)
        tl.store(target_logit_ptr + rows, target_logit, mask=inside & is_here)
        z = tl.where(columns[None, :] < vocab_size, z, _LOWEST)
        tile_max = tl.max(z, 1)
        e = tl.exp(z - tile_max[:, None])
        tile_ptrs = vocab_block.to(tl.int64) * num_rows + rows
        tl.store(tile_max_ptr + tile_ptrs, tile_max, mask=inside)
        tl.store(tile_total_ptr + tile_ptrs, tl.sum(e, 1), mask=inside)
        if STORE_BY_TMA:
            exps_desc.store([first_row, first_column], e.to(tl.bfloat16))
        else:
            ptrs = exps_ptr + rows.to(tl.int64)[:, None] * stride_exps + columns[None, :]
            stored = inside[:, None] & (columns[None, :] < vocab_size)
            tl.store(ptrs, e.to(tl.bfloat16), mask=stored)


def project_by_tma(
    tile: TmaTile, hidden: Tensor, weight: Tensor, target_ids: Tensor, exps: Tensor
) -> Tensor:
    """Log-probs [N]; `exps` [N, V] bfloat16 is overwritten with each tile's exponentials."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    (num_rows, width), vocab_size = hidden.shape, weight.shape[0]
    vocab_blocks = triton.cdiv(vocab_size, tile.BLOCK_V)
    num_tiles = triton.cdiv(num_rows, tile.BLOCK_C) * vocab_blocks
    processors = torch.cuda.get_device_properties(hidden.device).multi_processor_count
    programs = min(processors, num_tiles) if tile.persistent else num_tiles
    tile_max, tile_total = hidden.new_empty((2, vocab_blocks, num_rows), dtype=torch.float32)
    target_logit = hidden.new_empty(num_rows, dtype=torch.float32)

    def descriptor(matrix: Tensor, *block: int) -> TensorDescriptor:
        return TensorDescriptor(matrix, list(matrix.shape), list(matrix.stride()), list(block))

    _tma_kernel[(programs,)](
        descriptor(hidden, tile.BLOCK_C, tile.BLOCK_D),
        descriptor(weight, tile.BLOCK_V, tile.BLOCK_D),
        descriptor(exps, tile.BLOCK_C, tile.BLOCK_V),
        exps,
        target_ids,
        tile_max,
        tile_total,
        target_logit,
        num_rows,
        vocab_size,
        width,
        exps.stride(0),
        programs,
        BLOCK_C=tile.BLOCK_C,
        BLOCK_V=tile.BLOCK_V,
        BLOCK_D=tile.BLOCK_D,
        GROUP_C=tile.GROUP_C,
        FLATTEN=tile.flatten,
        STORE_BY_TMA=tile.store_by_tma,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    row_max = tile_max.amax(0)
    total = ((tile_max - row_max).exp() * tile_total).sum(0)
    return target_logit - row_max - total.log()
