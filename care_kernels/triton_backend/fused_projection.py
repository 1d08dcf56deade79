"""hidden x head with the softmax statistics read in the GEMM's epilogue: no float32 logits exist.

z = transform(x W^T + b) lives in registers, tile by tile. For each row and vocabulary tile t:

    m_t = max_j z_j,  s_t = sum_j e^{z_j - m_t},  h_t = sum_j e^{z_j - m_t} (z_j - m_t)

and for training E_j = e^{z_j - m_t}, rounded to bfloat16. `tile_statistics` combines the tiles,
`exp_gradients` turns E into the gradient in place. The statistics never see a rounded logit, only
the products' float32 sums, which are made in the same order in every run.

Shape letters: C rows of the chunk, D hidden, V vocabulary, T vocabulary tiles.
"""

# Kernels are in Triton's language, of which a type checker for Python knows little.
# pyright: reportPossiblyUnboundVariable=false, reportCallIssue=false, reportArgumentType=false
# pyright: reportOperatorIssue=false

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from care_kernels.backends import clear_padding
from care_kernels.softmax import LogitTransform
from care_kernels.triton_backend.compile_cases import (
    NUM_ROWS,
    VOCAB_SIZE,
    WIDTH,
    CompileCase,
    compile_case,
)
from care_kernels.triton_backend.launching import check_rows, is_interpreted
from care_kernels.triton_backend.tile_statistics import LOWEST, TileStatistics
from care_kernels.triton_backend.transforms import (
    TRANSFORM_TYPES,
    to_logits,
    transform_arguments,
)

OPERAND_DTYPES = (torch.bfloat16, torch.float16)
# Triton vectorises loads and stores of rows whose stride it sees to be divisible by 16.
ROW_ALIGNMENT = 16


class GemmTile(NamedTuple):
    """How one program of the GEMM is cut, and how many neighbours share a vocabulary tile."""

    BLOCK_C: int
    BLOCK_V: int
    BLOCK_D: int
    GROUP_C: int
    num_warps: int
    num_stages: int


# Chosen by ahead-of-time compilation, so that nothing spills: the wide tile keeps its epilogue in
# registers unless the softcap or the entropy is in it, and never does on Blackwell; unaligned rows
# are loaded number by number, which takes registers for their addresses.
TILE = GemmTile(128, 128, 64, 16, 8, 3)
WIDE_TILE = TILE._replace(BLOCK_V=256)
UNALIGNED_TILE = GemmTile(64, 128, 32, 16, 8, 2)
INTERPRETER_TILE = GemmTile(16, 256, 32, 4, 1, 1)


# The number of rows differs from chunk to chunk: compiling again for it would gain nothing.
@triton.jit(do_not_specialize=["num_rows"])
def _project_kernel(
    hidden_ptr,
    weight_ptr,
    bias_ptr,
    target_ids_ptr,
    exps_ptr,
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
    slope,
    uncap,
    HAS_SOFTCAP: tl.constexpr,
    EVEN_D: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP_C: tl.constexpr,
):
    # One program owns a BLOCK_C x BLOCK_V tile of logits. Consecutive programs go down GROUP_C row
    # blocks of one vocabulary tile before the next tile, so that a wave of programs finds both its
    # rows and its weights in the L2 cache.
    program = tl.program_id(0)
    row_blocks = tl.cdiv(num_rows, BLOCK_C)
    vocab_blocks = tl.cdiv(vocab_size, BLOCK_V)
    group = program // (GROUP_C * vocab_blocks)
    group_size = tl.minimum(row_blocks - group * GROUP_C, GROUP_C)
    in_group = program - group * GROUP_C * vocab_blocks
    row_block = group * GROUP_C + in_group % group_size
    vocab_block = in_group // group_size

    rows = row_block * BLOCK_C + tl.arange(0, BLOCK_C)
    columns = vocab_block * BLOCK_V + tl.arange(0, BLOCK_V)
    depth = tl.arange(0, BLOCK_D)
    # Rows and columns beyond the edge repeat the last one; their results are dropped below.
    safe_rows = tl.minimum(rows, num_rows - 1).to(tl.int64)
    safe_columns = tl.minimum(columns, vocab_size - 1).to(tl.int64)
    hidden_ptrs = hidden_ptr + safe_rows[:, None] * stride_hidden + depth[None, :]
    weight_ptrs = weight_ptr + safe_columns[None, :] * stride_weight + depth[:, None]

    z = tl.zeros((BLOCK_C, BLOCK_V), tl.float32)
    for start in range(0, width, BLOCK_D):
        if EVEN_D:
            x = tl.load(hidden_ptrs)
            w = tl.load(weight_ptrs)
        else:
            within = depth < width - start
            x = tl.load(hidden_ptrs, mask=within[None, :], other=0.0)
            w = tl.load(weight_ptrs, mask=within[:, None], other=0.0)
        if UPCAST:
            # The interpreter multiplies bfloat16 bit patterns; in float32 the products are exact.
            z = tl.dot(x.to(tl.float32), w.to(tl.float32), z, input_precision="ieee")
        else:
            z = tl.dot(x, w, z)
        hidden_ptrs += BLOCK_D
        weight_ptrs += BLOCK_D

    if bias_ptr is not None:
        z += tl.load(bias_ptr + safe_columns)[None, :].to(tl.float32)
    z = to_logits(z, inner, outer, HAS_SOFTCAP)
    inside = rows < num_rows
    target_ids = tl.load(target_ids_ptr + rows, mask=inside, other=-1)
    # In 32 bits, like the columns: a tile of 64-bit comparisons would not stay in registers.
    is_target = columns[None, :] == target_ids.to(tl.int32)[:, None]
    target_logit = tl.sum(tl.where(is_target, z, 0.0), 1)
    # Exactly one tile holds a row's target.
    first = vocab_block * BLOCK_V
    last = tl.minimum(first + BLOCK_V, vocab_size)
    is_here = (target_ids >= first) & (target_ids < last)
    tl.store(target_logit_ptr + rows, target_logit, mask=inside & is_here)

    z = tl.where(columns[None, :] < vocab_size, z, LOWEST)
    tile_max = tl.max(z, 1)
    z -= tile_max[:, None]
    e = tl.exp(z)
    tile_ptrs = vocab_block.to(tl.int64) * num_rows + rows
    tl.store(tile_max_ptr + tile_ptrs, tile_max, mask=inside)
    tl.store(tile_total_ptr + tile_ptrs, tl.sum(e, 1), mask=inside)
    if tile_moment_ptr is not None:
        tl.store(tile_moment_ptr + tile_ptrs, tl.sum(e * z, 1), mask=inside)
    if exps_ptr is not None:
        exps_ptrs = exps_ptr + rows.to(tl.int64)[:, None] * stride_exps + columns[None, :]
        stored = inside[:, None] & (columns[None, :] < vocab_size)
        tl.store(exps_ptrs, e.to(tl.bfloat16), mask=stored)


def gemm_tile(architecture: str, *, is_plain: bool, is_aligned: bool = True) -> GemmTile:
    """The tile for an architecture ("hip", or CUDA's major version: "8", "9", "10").

    `is_plain` says that the epilogue has neither softcap nor entropy, `is_aligned` that rows of
    every matrix start on multiples of 16 numbers and hold multiples of 16.
    """
    if not is_aligned:
        return UNALIGNED_TILE
    if architecture == "hip":
        # Two stages are what 64 KiB of local memory hold.
        return (WIDE_TILE if is_plain else TILE)._replace(num_stages=2)
    return WIDE_TILE if is_plain and architecture in ("8", "9") else TILE


def supports(
    hidden_dtype: torch.dtype, weight: Tensor, *, with_exact_kl: bool, with_gradients: bool
) -> bool:
    """Whether this path applies; if not, library logits in float32 and the row kernels do.

    It takes bfloat16 and float16 operands with contiguous rows. It does not take the exact KL,
    which needs two models' logits at once, nor float16 gradients: dL/dz below 6e-8 would vanish.
    """
    same = hidden_dtype == weight.dtype and hidden_dtype in OPERAND_DTYPES
    contiguous = weight.shape[1] == 1 or weight.stride(1) == 1
    trainable = hidden_dtype == torch.bfloat16 or not with_gradients
    return same and contiguous and trainable and not with_exact_kl


def empty_exps(num_rows: int, vocab_size: int, device: torch.device) -> Tensor:
    """A [C, V] bfloat16 buffer for `project`: rows on multiples of 16 numbers, zeros between."""
    stride = triton.cdiv(vocab_size, ROW_ALIGNMENT) * ROW_ALIGNMENT
    buffer = torch.empty((num_rows, stride), dtype=torch.bfloat16, device=device)[:, :vocab_size]
    clear_padding(buffer)
    return buffer


def project(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target_ids: Tensor,
    transform: LogitTransform,
    *,
    with_entropy: bool,
    exps: Tensor | None = None,
) -> TileStatistics:
    """One GEMM: statistics of each row and vocabulary tile, and the exponentials where wanted.

    Args:
        hidden: [C, D] bfloat16 or float16.
        weight: [V, D] in the same dtype.
        bias: [V] of any float dtype, or None.
        target_ids: [C] int.
        transform: what makes z of x W^T + b.
        with_entropy: also keep what the entropy needs.
        exps: [C, V] bfloat16, filled with E; None: log-probs alone are wanted.

    Raises:
        ValueError: a dtype, shape or stride that the kernel does not take.
    """
    check_rows("hidden", hidden, OPERAND_DTYPES)
    check_rows("weight", weight, (hidden.dtype,))
    if exps is not None:
        check_rows("exps", exps, (torch.bfloat16,))
    (num_rows, width), vocab_size = hidden.shape, weight.shape[0]
    if weight.shape[1] != width or (exps is not None and exps.shape != (num_rows, vocab_size)):
        raise ValueError(
            f"weight, exps: got shapes {tuple(weight.shape)}, "
            f"{None if exps is None else tuple(exps.shape)}; wanted [V, {width}], [{num_rows}, V]"
        )
    interpreted = is_interpreted(_project_kernel)
    tile = INTERPRETER_TILE
    if not interpreted:
        is_plain = transform.softcap is None and not with_entropy
        is_aligned = width % ROW_ALIGNMENT == 0 and all(
            matrix is None or _starts_aligned(matrix) for matrix in (hidden, weight, exps)
        )
        architecture = _architecture(hidden.device)
        tile = gemm_tile(architecture, is_plain=is_plain, is_aligned=is_aligned)
    num_tiles = triton.cdiv(vocab_size, tile.BLOCK_V)
    options = {"dtype": torch.float32, "device": hidden.device}
    tiles = TileStatistics(
        max_logit=torch.empty((num_tiles, num_rows), **options),
        total=torch.empty((num_tiles, num_rows), **options),
        moment=torch.empty((num_tiles, num_rows), **options) if with_entropy else None,
        target_logit=torch.full((num_rows,), float("nan"), **options),
        tile_size=tile.BLOCK_V,
    )
    if num_rows > 0:
        with torch.cuda.device_of(hidden):
            _project_kernel[(triton.cdiv(num_rows, tile.BLOCK_C) * num_tiles,)](
                hidden,
                weight,
                None if bias is None else bias.contiguous(),
                target_ids.contiguous(),
                exps,
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
                UPCAST=interpreted,
                **tile._asdict(),
            )
    return tiles


def compile_cases(architecture: str = "9") -> list[CompileCase]:
    """The GEMM for log-probs alone, for training and with every option."""
    project_types = dict.fromkeys(_pointers(_project_kernel), "*fp32") | TRANSFORM_TYPES
    project_types |= dict.fromkeys(
        ("hidden_ptr", "weight_ptr", "bias_ptr", "exps_ptr"), "*bf16"
    ) | {"target_ids_ptr": "*i64"}
    cases = []
    for suffix, absent, has_softcap, is_aligned in (
        ("_log_probs", ("bias_ptr", "exps_ptr", "tile_moment_ptr"), False, True),
        ("_training", ("bias_ptr", "tile_moment_ptr"), False, True),
        ("_training_bias", ("tile_moment_ptr",), False, True),
        ("_training_entropy", ("bias_ptr",), False, True),
        ("_training_entropy_softcap_bias", (), True, True),
        ("_training_entropy_softcap_bias_unaligned", (), True, False),
    ):
        is_plain = not has_softcap and "tile_moment_ptr" in absent
        tile = gemm_tile(architecture, is_plain=is_plain, is_aligned=is_aligned)._asdict()
        num_warps, num_stages = tile.pop("num_warps"), tile.pop("num_stages")
        caps = {"HAS_SOFTCAP": has_softcap, "EVEN_D": is_aligned, "UPCAST": False}
        exp_bytes = 0 if "exps_ptr" in absent else 2 * NUM_ROWS * VOCAB_SIZE
        cases.append(
            compile_case(
                f"project{suffix}",
                _project_kernel,
                project_types,
                caps | tile | dict.fromkeys(absent),
                num_warps=num_warps,
                num_stages=num_stages,
                grid=f"{NUM_ROWS // tile['BLOCK_C']} row blocks x "
                f"{triton.cdiv(VOCAB_SIZE, tile['BLOCK_V'])} vocabulary tiles",
                flops=2 * NUM_ROWS * WIDTH * VOCAB_SIZE,
                hbm_bytes=2 * WIDTH * (NUM_ROWS + VOCAB_SIZE) + exp_bytes,
                is_aligned=is_aligned,
            )
        )
    return cases


def _starts_aligned(matrix: Tensor) -> bool:
    return matrix.stride(0) % ROW_ALIGNMENT == 0 and matrix.data_ptr() % 16 == 0


def _architecture(device: torch.device) -> str:
    return "hip" if torch.version.hip else str(torch.cuda.get_device_capability(device)[0])


def _pointers(kernel: Any) -> list[str]:
    return [name for name in kernel.arg_names if name.endswith("_ptr")]
