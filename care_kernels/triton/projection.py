"""hidden x head with the softmax statistics read in the GEMM's epilogue: no float32 logits exist.

z = transform(x W^T + b) lives in registers, tile by tile. For each row and vocabulary tile t:

    m_t = max_j z_j,  s_t = sum_j e^{z_j - m_t},  h_t = sum_j e^{z_j - m_t} (z_j - m_t)

and for training E_j = e^{z_j - m_t}, rounded to the operands' dtype. `softmax` makes each row's
statistics of its tiles', and the gradient of E.

Where the caller knows the row's log-normaliser under an earlier policy, the anchor a, then every
m_t is a: no maximum is taken, and E = e^{z - a} needs no further pass.

The statistics never see a rounded logit, only the products' float32 sums, which are made in the
same order in every run. Shape letters: C rows of the chunk, D hidden, V vocabulary, T vocabulary
tiles.
"""

# Kernels are in Triton's language, of which a type checker for Python knows little.
# pyright: reportPossiblyUnboundVariable=false, reportCallIssue=false, reportArgumentType=false
# pyright: reportOperatorIssue=false, reportGeneralTypeIssues=false, reportOptionalSubscript=false

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from care_kernels.softmax import LogitTransform
from care_kernels.triton.launch import LOG2_E, to_logits, transform_arguments

OPERAND_DTYPES = (torch.bfloat16, torch.float16)
# Triton vectorises loads and stores of rows whose stride it sees to be divisible by 16, and a
# tensor descriptor wants rows that start on multiples of 16 bytes.
ROW_ALIGNMENT = 16
# Stands for a bias of -inf: far below every logit, yet finite after scaling.
LEAST_BIAS = tl.constexpr(-1e30)
# The least float32: a finite stand-in for -inf, whose differences are numbers.
LOWEST = tl.constexpr(-3.4028234663852886e38)


class GemmTile(NamedTuple):
    """How the GEMM is cut into programs."""

    BLOCK_C: int
    BLOCK_V: int
    BLOCK_D: int
    GROUP_C: int
    """The most row blocks that share a vocabulary tile."""
    USE_TMA: bool
    """Tensor descriptors and as many programs as multiprocessors, or pointers and one per tile."""
    num_warps: int
    num_stages: int


class TileStatistics(NamedTuple):
    """What the epilogue saw, logits in base 2: z log2(e).

    Tiles come first, so that neighbouring rows are stored together.
    """

    max_logit: Tensor | None
    """m_t, [T, C]; None where the rows are anchored."""
    total: Tensor
    """s_t, [T, C]."""
    moment: Tensor | None
    """h_t, [T, C]."""
    target_logit: Tensor
    """z_y, [C]; NaN where y is outside the vocabulary."""
    anchor: Tensor | None
    """a, [C], in nats."""
    tile_size: int
    """Columns per tile."""


# The number of rows differs from chunk to chunk: compiling again for it would gain nothing.
@triton.jit(do_not_specialize=["num_rows"])
def _project_kernel(
    hidden,
    weight,
    exps,
    bias_ptr,
    target_ids_ptr,
    anchor_ptr,
    tile_max_ptr,
    tile_total_ptr,
    tile_moment_ptr,
    target_logit_ptr,
    num_rows,
    vocab_size,
    width,
    stride_hidden,
    stride_weight,
    stride_exps,
    inner,
    outer,
    HAS_SOFTCAP: tl.constexpr,
    EVEN_D: tl.constexpr,
    UPCAST: tl.constexpr,
    USE_TMA: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP_C: tl.constexpr,
):
    # A program makes BLOCK_C x BLOCK_V tiles of logits, as many as its share of the grid. The
    # matrices are tensor descriptors with USE_TMA, else pointers. Consecutive tiles go down a group
    # of row blocks before the next vocabulary tile, so that what runs at one time finds its rows
    # and its weights in the L2 cache; all groups are as large as each other, up to one block.
    row_blocks = tl.cdiv(num_rows, BLOCK_C)
    vocab_blocks = tl.cdiv(vocab_size, BLOCK_V)
    group_blocks = tl.cdiv(row_blocks, tl.cdiv(row_blocks, GROUP_C))
    # Flattened into the inner loop, this one is known to run slower on Hopper.
    for tile in tl.range(
        tl.program_id(0), row_blocks * vocab_blocks, tl.num_programs(0), flatten=False
    ):
        group = tile // (group_blocks * vocab_blocks)
        group_size = tl.minimum(row_blocks - group * group_blocks, group_blocks)
        in_group = tile - group * group_blocks * vocab_blocks
        first_row = (group * group_blocks + in_group % group_size) * BLOCK_C
        first_column = in_group // group_size * BLOCK_V
        rows = first_row + tl.arange(0, BLOCK_C)
        inside = rows < num_rows

        raw = tl.zeros((BLOCK_C, BLOCK_V), tl.float32)
        if not USE_TMA:
            columns = first_column + tl.arange(0, BLOCK_V)
            depth = tl.arange(0, BLOCK_D)
            # Rows and columns beyond the edge repeat the last one; their results are dropped.
            safe_rows = tl.minimum(rows, num_rows - 1).to(tl.int64)
            safe_columns = tl.minimum(columns, vocab_size - 1).to(tl.int64)
            hidden_ptrs = hidden + safe_rows[:, None] * stride_hidden + depth[None, :]
            weight_ptrs = weight + safe_columns[None, :] * stride_weight + depth[:, None]
        for start in range(0, width, BLOCK_D):
            if USE_TMA:
                x = hidden.load([first_row, start])
                w = weight.load([first_column, start]).T
            else:
                if EVEN_D:
                    x = tl.load(hidden_ptrs)
                    w = tl.load(weight_ptrs)
                else:
                    within = depth < width - start
                    x = tl.load(hidden_ptrs, mask=within[None, :], other=0.0)
                    w = tl.load(weight_ptrs, mask=within[:, None], other=0.0)
                hidden_ptrs += BLOCK_D
                weight_ptrs += BLOCK_D
            if UPCAST:
                # The interpreter multiplies bfloat16 bit patterns; in float32 products are exact.
                raw = tl.dot(x.to(tl.float32), w.to(tl.float32), raw, input_precision="ieee")
            else:
                raw = tl.dot(x, w, raw)

        target_ids = tl.load(target_ids_ptr + rows, mask=inside, other=-1)
        anchor = None
        if anchor_ptr is not None:
            anchor = tl.load(anchor_ptr + rows, mask=inside, other=0.0) * LOG2_E
        # In two halves, of which the second's exponentials need no registers yet: all at once do
        # not fit beside the products.
        HALF_V: tl.constexpr = BLOCK_V // 2
        halves = tl.permute(tl.reshape(raw, (BLOCK_C, 2, HALF_V)), (0, 2, 1))
        left, right = tl.split(halves)
        for half in tl.static_range(2):
            # All of x W^T for these rows and columns.
            z = left if half == 0 else right
            first_half = first_column + half * HALF_V
            lanes = tl.arange(0, HALF_V)
            columns = first_half + lanes
            within = columns < vocab_size
            if bias_ptr is not None:
                bias = tl.load(bias_ptr + columns, mask=within, other=0.0).to(tl.float32)
                z += tl.maximum(bias, LEAST_BIAS)[None, :]
            z = to_logits(z, inner, outer, HAS_SOFTCAP)

            # Few tiles hold a target of their rows: the others skip a comparison of every column.
            last = tl.minimum(first_half + HALF_V, vocab_size)
            is_here = (target_ids >= first_half) & (target_ids < last)
            if tl.max(is_here.to(tl.int32), 0) > 0:
                target_lane = tl.where(is_here, target_ids - first_half, -1).to(tl.int32)
                is_target = lanes[None, :] == target_lane[:, None]
                target_logit = tl.sum(tl.where(is_target, z, 0.0), 1)
                tl.store(target_logit_ptr + rows, target_logit, mask=is_here)

            tile_offsets = (first_half // HALF_V).to(tl.int64) * num_rows + rows
            if tile_max_ptr is not None:
                z = tl.where(within[None, :], z, LOWEST)
                shift = tl.max(z, 1)
                tl.store(tile_max_ptr + tile_offsets, shift, mask=inside)
                z -= shift[:, None]
                e = tl.exp2(z)
            else:
                # Masked after the subtraction, which then is one instruction with the scaling.
                z -= anchor[:, None]
                e = tl.where(within[None, :], tl.exp2(z), 0.0)
            tl.store(tile_total_ptr + tile_offsets, tl.sum(e, 1), mask=inside)
            if tile_moment_ptr is not None:
                tl.store(tile_moment_ptr + tile_offsets, tl.sum(e * z, 1), mask=inside)
            # Columns between the vocabulary's end and the next row are zeros, for GEMMs on CPUs
            # that read on behind a row; storing them keeps every store a whole vector.
            if exps is not None:
                if USE_TMA:
                    exps.store([first_row, first_half], e.to(exps.dtype))
                else:
                    ptrs = exps + rows.to(tl.int64)[:, None] * stride_exps + columns[None, :]
                    stored = inside[:, None] & (columns < stride_exps)[None, :]
                    tl.store(ptrs, e.to(exps.dtype.element_ty), mask=stored)


FORMS = ("plain", "entropy", "anchored", "softcap")
_HOPPER = GemmTile(128, 256, 64, 16, True, 8, 4)
_NARROW = GemmTile(128, 128, 64, 16, False, 8, 3)
# Loading number by number takes registers for every number's address.
_UNALIGNED = GemmTile(128, 64, 32, 16, False, 8, 2)
# Chosen by ahead-of-time compilation: no form of the kernel spills in its tile, with Triton 3.6 and
# 3.8.
TILES = {
    "8": dict.fromkeys(FORMS, _NARROW) | {"plain": GemmTile(128, 256, 32, 16, False, 8, 4)},
    "9": dict.fromkeys(FORMS, _HOPPER) | {"softcap": _HOPPER._replace(BLOCK_V=128)},
    # With a softcap before a descriptor's store, Triton's pass over tensor memory fails.
    "10": dict.fromkeys(FORMS, _HOPPER)
    | {"anchored": _HOPPER._replace(BLOCK_V=128), "softcap": _NARROW},
    "hip": dict.fromkeys(FORMS, GemmTile(128, 256, 64, 16, False, 8, 2)),
    "interpreter": dict.fromkeys(FORMS, GemmTile(16, 256, 32, 4, False, 1, 1)),
    # Some have no more shared memory than 99 KiB.
    "other": dict.fromkeys(FORMS, _NARROW),
}


def gemm_tile(architecture: str, form: str) -> GemmTile:
    """The tile of a launch on "hip", CUDA's major version such as "9", or the "interpreter".

    The form is "unaligned" where rows of some matrix do not start on multiples of 16 numbers or do
    not hold a multiple of 16, else the first that applies of softcap, anchor and entropy.
    """
    if form == "unaligned":
        return _UNALIGNED
    return TILES.get(architecture, TILES["other"])[form]


def supports(hidden_dtype: torch.dtype, weight: Tensor) -> bool:
    """Whether `project` takes these operands: both bfloat16 or float16, with contiguous rows."""
    same = hidden_dtype == weight.dtype and hidden_dtype in OPERAND_DTYPES
    return same and (weight.shape[1] == 1 or weight.stride(1) == 1)


def empty_exps(
    num_rows: int, vocab_size: int, dtype: torch.dtype, device: torch.device | str
) -> Tensor:
    """A [C, V] buffer for `project`, a view over rows padded to a multiple of 16 numbers.

    `project` writes zeros into the padding of the rows that it fills: oneDNN's bfloat16 GEMM, on a
    CPU with AMX, multiplies what it finds there by zeros, and a NaN times zero is NaN.
    """
    padded = triton.cdiv(vocab_size, ROW_ALIGNMENT) * ROW_ALIGNMENT
    return torch.empty((num_rows, padded), dtype=dtype, device=device)[:, :vocab_size]


def project(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target_ids: Tensor,
    transform: LogitTransform,
    *,
    with_entropy: bool = False,
    anchor: Tensor | None = None,
    exps: Tensor | None = None,
) -> TileStatistics:
    """One GEMM: statistics of each row and vocabulary tile, and the exponentials where wanted.

    Args:
        hidden: [C, D] bfloat16 or float16.
        weight: [V, D] in the same dtype.
        bias: [V] of any float dtype, or None; -inf makes a token impossible.
        target_ids: [C] int; one outside [0, V) has a NaN target logit.
        transform: what makes z of x W^T + b.
        with_entropy: also keep what the entropy needs.
        anchor: [C] float32, each row's log-normaliser under a policy at most `MAX_DRIFT` away.
        exps: from `empty_exps` or its first C rows, in the operands' dtype, filled with E.
    """
    (num_rows, width), vocab_size = hidden.shape, weight.shape[0]
    assert supports(hidden.dtype, weight) and weight.shape[1] == width
    assert width == 1 or hidden.stride(1) == 1, "hidden: rows are contiguous"
    if exps is not None:
        assert exps.shape == (num_rows, vocab_size) and exps.dtype == hidden.dtype
        assert exps.stride(0) % ROW_ALIGNMENT == 0, "exps: rows of `empty_exps`"
    if anchor is not None:
        assert anchor.shape == (num_rows,) and anchor.dtype == torch.float32
        assert transform.softcap is None, "anchor: a softcap's slope needs z"
        # float16 exponentials overflow at a drift of 11 nats.
        assert exps is None or exps.dtype == torch.bfloat16, "anchor: exponentials are bfloat16"

    matrices = [matrix for matrix in (hidden, weight, exps) if matrix is not None]
    forms = {
        "unaligned": width % ROW_ALIGNMENT != 0 or not all(map(_starts_aligned, matrices)),
        "softcap": transform.softcap is not None,
        "anchored": anchor is not None,
        "entropy": with_entropy,
    }
    form = next((name for name, applies in forms.items() if applies), "plain")
    is_compiled = isinstance(_project_kernel, triton.JITFunction)
    tile = gemm_tile(_architecture(hidden.device) if is_compiled else "interpreter", form)
    tile_size = tile.BLOCK_V // 2
    num_blocks = triton.cdiv(vocab_size, tile.BLOCK_V)
    options = {"dtype": torch.float32, "device": hidden.device}

    def empty_tiles() -> Tensor:
        # The last block's second half may lie beyond the vocabulary: written, but read by nobody.
        rows = torch.empty((2 * num_blocks, num_rows), **options)
        return rows[: triton.cdiv(vocab_size, tile_size)]

    tiles = TileStatistics(
        max_logit=empty_tiles() if anchor is None else None,
        total=empty_tiles(),
        moment=empty_tiles() if with_entropy else None,
        target_logit=torch.full((num_rows,), float("nan"), **options),
        anchor=None if anchor is None else anchor.contiguous(),
        tile_size=tile_size,
    )
    if num_rows == 0:
        return tiles
    num_programs = triton.cdiv(num_rows, tile.BLOCK_C) * num_blocks
    operands: list[Tensor | TensorDescriptor | None] = [hidden, weight, exps]
    if tile.USE_TMA:
        operands = [
            _descriptor(hidden, width, (tile.BLOCK_C, tile.BLOCK_D)),
            _descriptor(weight, width, (tile.BLOCK_V, tile.BLOCK_D)),
            None if exps is None else _descriptor(exps, exps.stride(0), (tile.BLOCK_C, tile_size)),
        ]
        # The interpreter gets two, so that its programs too make several tiles each.
        processors = 2
        if is_compiled:
            processors = torch.cuda.get_device_properties(hidden.device).multi_processor_count
        num_programs = min(num_programs, processors)
    with torch.cuda.device_of(hidden):
        _project_kernel[(num_programs,)](
            *operands,
            None if bias is None else bias.contiguous(),
            target_ids.contiguous(),
            tiles.anchor,
            tiles.max_logit,
            tiles.total,
            tiles.moment,
            tiles.target_logit,
            num_rows,
            vocab_size,
            width,
            hidden.stride(0),
            weight.stride(0),
            0 if exps is None else exps.stride(0),
            **transform_arguments(transform),
            EVEN_D=width % tile.BLOCK_D == 0,
            UPCAST=not is_compiled,
            **tile._asdict(),
        )
    return tiles


def _starts_aligned(matrix: Tensor) -> bool:
    return matrix.stride(0) % ROW_ALIGNMENT == 0 and matrix.data_ptr() % 16 == 0


def _descriptor(matrix: Tensor, num_columns: int, block: tuple[int, int]) -> TensorDescriptor:
    shape = [matrix.shape[0], num_columns]
    return TensorDescriptor(matrix, shape, [matrix.stride(0), 1], list(block))


def _architecture(device: torch.device) -> str:
    return "hip" if torch.version.hip else str(torch.cuda.get_device_capability(device)[0])
