"""The head over selected rows, one chunk of logits at a time.

Both public operations are sweeps over these chunks: make a chunk's logits and row statistics (one
GEMM) and, where gradients are wanted, turn the logits into their gradient and multiply it into
dX = dZ W and dW += dZ^T X (two more).

Shape letters: N rows, D hidden, V vocabulary, M selected rows, C rows of a chunk.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from care_kernels.backends import ChunkRows, ChunkSpec, LogitGradient, chunk_kind
from care_kernels.cpu import native_ops
from care_kernels.softmax import (
    LogitTransform,
    RowGradients,
    RowStatistics,
    join,
    take,
    vocab_tiles,
)
from care_kernels.vocab_parallel import VocabShard

# Each chunk reads and writes the whole head gradient, so chunks should be large: with C rows a
# float32 dW has C / 4 FLOP for each byte it moves, and a GPU wants several hundred.
MAX_CHUNK_ROWS = 4096
CHUNK_BYTES = {"cuda": 1024 * 2**20, "cpu": 512 * 2**20}
# Tiles of the library's GEMM for dX on a GPU: rows and columns that one multiprocessor computes.
TILE_ROWS, TILE_COLUMNS = 128, 256


def chunk_rows(
    num_rows: int,
    vocab_size: int,
    width: int,
    *,
    logit_bytes: int,
    device: torch.device,
    sums_weight_gradient: bool = False,
) -> int:
    """How many rows of logits to hold at a time: balanced chunks within CHUNK_BYTES.

    One chunk where that takes no more than a usual chunk and the float32 dW [V, D] that several
    would add up in (`sums_weight_gradient`). On a GPU otherwise a multiple of TILE_ROWS, of those
    that need the fewest chunks the one whose dX GEMMs need the fewest waves of tiles. `logit_bytes`
    are held for each logit.
    """
    limit = CHUNK_BYTES.get(device.type, CHUNK_BYTES["cpu"])
    row_bytes = vocab_size * logit_bytes
    if sums_weight_gradient and num_rows * row_bytes <= limit + 4 * vocab_size * width:
        return max(num_rows, 1)
    most = min(MAX_CHUNK_ROWS, limit // row_bytes) if row_bytes else MAX_CHUNK_ROWS
    if device.type != "cuda" or most < TILE_ROWS or num_rows <= most:
        num_chunks = max(_ceil(num_rows, max(most, 1)), 1)
        return max(_ceil(num_rows, num_chunks), 1)
    most -= most % TILE_ROWS
    least = _ceil(_ceil(num_rows, _ceil(num_rows, most)), TILE_ROWS) * TILE_ROWS
    columns, processors = _ceil(width, TILE_COLUMNS), _multiprocessors(device)

    def waves(rows: int) -> int:
        full, rest = divmod(num_rows, rows)
        of_chunk = [_ceil(_ceil(size, TILE_ROWS) * columns, processors) for size in (rows, rest)]
        return full * of_chunk[0] + of_chunk[1]

    return min(range(least, most + 1, TILE_ROWS), key=lambda rows: (waves(rows), rows))


def _multiprocessors(device: torch.device) -> int:
    if not torch.cuda.is_available():
        return 132  # An H100's, for memory plans that are made elsewhere.
    return torch.cuda.get_device_properties(device).multi_processor_count


def _ceil(a: int, b: int) -> int:
    return -(-a // b)


@dataclass(frozen=True)
class SweepOptions:
    """How a head is swept: what every operation on it takes alike."""

    transform: LogitTransform
    chunk_rows: int | None
    backend: str
    vocab_shard: VocabShard | None
    with_entropy: bool
    autocast: torch.dtype | None
    """What float32 matrices are multiplied in, as `autocast_dtype` found it; None: in float32."""


Inputs = tuple[Tensor, Tensor, Tensor | None]
"""hidden [N, D], head weight [V, D] and bias [V]."""
Wanted = tuple[bool, ...]
"""Which of `Inputs` need a gradient."""
NOTHING: Wanted = (False, False, False)


class HeadChunks:
    """Iterate over chunks; for each call `project` and at most once `add_gradients`.

    Nothing here records an autograd graph or follows an enclosing autocast.
    """

    gradients: list[Tensor | None]
    """dX [N, D], dW [V, D] and db [V] under construction; None where not wanted."""

    def __init__(
        self,
        inputs: Inputs,
        target_ids: Tensor,
        rows: Tensor,
        options: SweepOptions,
        *,
        wanted: Wanted = NOTHING,
        weight_grad: Tensor | None = None,
        anchor: Tensor | None = None,
        reference: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        """Chunks are consecutive slices of `rows` [M] int64, at which `target_ids` [N] are valid.

        dW is added to `weight_grad` where that is given. `anchor` [M] are the rows' normalisers
        where exponentials may be anchored there; `reference` the hidden states [N, D'] and the head
        weight [V, D'] of the exact KL.
        """

        def operand(matrix: Tensor) -> Tensor:
            is_cast = options.autocast is not None and matrix.dtype == torch.float32
            return matrix.to(options.autocast) if is_cast else matrix

        self._hidden, weight, bias = operand(inputs[0]), operand(inputs[1]), inputs[2]
        self._ref_hidden, ref_weight = (
            (None, None) if reference is None else map(operand, reference)
        )
        self._weight, self._rows = weight, rows
        # float16 exponentials overflow at a drift of 11 nats.
        self._anchor = anchor if weight.dtype == torch.bfloat16 else None
        self._shard, self.makes_gradients = options.vocab_shard, any(wanted)
        # A shard reads statistics at a target of its own, and has a gradient at none of another's.
        self._targets = self._own_targets = target_ids.index_select(0, rows).long()
        vocab_size, width = weight.shape
        if self._shard is not None:
            self._targets, self._own_targets = self._shard.local_targets(self._targets, vocab_size)
            vocab_size = self._shard.usual_size
        spec = ChunkSpec(
            self._hidden.dtype,
            weight,
            bias,
            options.transform,
            ref_weight,
            options.with_entropy,
            self.makes_gradients,
        )
        kind, logit_bytes = chunk_kind(options.backend, spec)
        self._chunk_rows = options.chunk_rows or chunk_rows(
            rows.numel(),
            vocab_size,
            width,
            logit_bytes=logit_bytes,
            device=weight.device,
            sums_weight_gradient=wanted[1] and weight_grad is None,
        )
        self._logits = kind(spec, min(self._chunk_rows, rows.numel()))
        self._weight_is_new = weight_grad is None
        self.gradients = self._room_for(wanted, weight_grad, inputs[1].dtype)

    def _room_for(
        self, wanted: Wanted, weight_grad: Tensor | None, weight_dtype: torch.dtype
    ) -> list[Tensor | None]:
        """Several chunks add up in float32; a lone one is rounded to its own type by its GEMM."""
        grad_dtype, weight = self._logits.grad_dtype, self._weight
        wide = torch.float64 if grad_dtype == torch.float64 else torch.float32
        narrow = grad_dtype if grad_dtype == torch.bfloat16 else wide
        if wanted[1] and weight_grad is None:
            is_lone = self._rows.numel() <= self._chunk_rows and weight_dtype == narrow
            weight_grad = weight.new_empty(weight.shape, dtype=narrow if is_lone else wide)
        return [
            weight.new_zeros(self._hidden.shape, dtype=narrow) if wanted[0] else None,
            weight_grad if wanted[1] else None,
            weight.new_zeros(len(weight), dtype=wide) if wanted[2] else None,
        ]

    def __iter__(self) -> Iterator[slice]:
        """Slices of the selected rows: at least one, empty if no row is selected."""
        num_rows = self._rows.numel()
        for start in range(0, max(num_rows, 1), self._chunk_rows):
            yield slice(start, min(start + self._chunk_rows, num_rows))

    @torch.no_grad()
    def project(self, chunk: slice, *, keep: bool = False) -> RowStatistics:
        """Statistics of the chunk's logits: one GEMM, one more for a reference's.

        With `keep`, `add_gradients` follows.
        """
        rows = self._rows[chunk]
        inputs = ChunkRows(
            self._hidden.index_select(0, rows),
            self._targets[chunk],
            None if self._ref_hidden is None else self._ref_hidden[rows],
            None if self._anchor is None else self._anchor[chunk],
        )
        with torch.autocast(self._hidden.device.type, enabled=False):
            stats = self._logits.project(inputs, keep=keep)
        if self._shard is None:
            return stats
        return self._shard.combine(stats, self._own_targets[chunk] >= 0)

    def all_statistics(self) -> RowStatistics:
        """Statistics of all selected rows, [M]."""
        return join([self.project(chunk) for chunk in self])

    def add_all_gradients(self, stats: RowStatistics, upstream: RowGradients) -> None:
        """`add_gradients` of all selected rows, whose logits are made again."""
        for chunk in self:
            self.project(chunk, keep=True)
            self.add_gradients(chunk, take(stats, chunk), take(upstream, chunk))

    @torch.no_grad()
    def add_gradients(self, chunk: slice, stats: RowStatistics, upstream: RowGradients) -> None:
        """Consume the logits that `project(chunk, keep=True)` has made; add to `gradients`."""
        rows, scale = self._rows[chunk], 1.0
        grad_hidden, grad_weight, grad_bias = self.gradients
        if self._logits.grad_dtype == torch.float16:
            # Below 6e-8 a gradient would vanish.
            scale = _largest_power_of_two(upstream)
            upstream = upstream._make(None if x is None else x / scale for x in upstream)
        gradient = self._logits.gradients(self._own_targets[chunk], stats, upstream)
        with torch.autocast(self._hidden.device.type, enabled=False):
            if grad_hidden is not None:
                grad_inputs = back_project(gradient, self._weight, scale)
                if self._shard is not None:
                    grad_inputs = self._shard.sum(grad_inputs)
                grad_hidden.index_copy_(0, rows, grad_inputs.to(grad_hidden.dtype))
            if grad_weight is not None:
                inputs = self._hidden.index_select(0, rows)
                if gradient.factor is not None:
                    inputs = inputs.float() * gradient.factor[:, None]
                inputs = inputs.to(gradient.matrix.dtype)
                is_first, self._weight_is_new = self._weight_is_new, False
                add_weight_gradient(
                    gradient.matrix, inputs, grad_weight, is_first=is_first, scale=scale
                )
        if grad_bias is not None:
            # The row factor would be missing in this sum.
            assert gradient.factor is None
            grad_bias.add_(gradient.matrix.sum(0, dtype=grad_bias.dtype), alpha=scale)


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The enclosing autocast's, in which a layer multiplies float32 operands; None without one."""
    if not torch.is_autocast_enabled(device.type):
        return None
    return torch.get_autocast_dtype(device.type)


def _largest_power_of_two(upstream: RowGradients) -> float:
    """A power of two near the largest magnitude in any of its vectors: a host synchronisation."""
    sizes = [float(x.abs().amax()) for x in upstream if x is not None and x.numel()]
    largest = max(sizes, default=0.0)
    return 2.0 ** math.frexp(largest)[1] if 0 < largest < math.inf else 1.0


def back_project(gradient: LogitGradient, weight: Tensor, scale: float = 1.0) -> Tensor:
    """scale dZ [C, V] W [V, D]: in dZ's dtype, or float32 where a factor or a scale joins."""
    matrix, factor = gradient
    is_plain = factor is None and scale == 1
    is_easy = weight.is_cuda or (is_plain and weight.is_contiguous())
    if matrix.dtype != weight.dtype or not is_easy:
        # In float32 or float64, tile by tile, so that the weight is never copied whole.
        dtype = torch.promote_types(matrix.dtype, torch.float32)
        out = matrix.new_zeros((matrix.shape[0], weight.shape[1]), dtype=dtype)
        for tile in vocab_tiles(weight.shape[0]):
            out.addmm_(matrix[:, tile].to(dtype), weight[tile].to(dtype).contiguous())
    elif weight.is_cuda and matrix.element_size() == 2:
        # A 16-bit result may be summed from 16-bit parts: torch allows cuBLAS to by default.
        out = torch.mm(matrix, weight, out_dtype=torch.float32)
    else:
        out = matrix @ weight
    if is_plain:
        return out.to(matrix.dtype)
    return out * scale if factor is None else out * (scale * factor[:, None])


def add_weight_gradient(
    grad_logits: Tensor, inputs: Tensor, into: Tensor, *, is_first: bool, scale: float = 1.0
) -> None:
    """into [V, D] += scale dZ^T [V, C] X [C, D]; = where `is_first`, into what holds nothing yet.

    `inputs` have dZ's dtype, `into` any floating one.
    """
    is_native = grad_logits.dtype == torch.bfloat16 and not grad_logits.is_cuda
    beta = 0.0 if is_first else 1.0
    if is_native and into.dtype in (torch.float32, torch.bfloat16) and into.stride(1) == 1:
        ops = native_ops()
        if ops is not None:
            ops.add_weight_gradient(grad_logits, inputs, into, is_first)
            return
    operands = (into, grad_logits.T, inputs)
    if into.dtype == grad_logits.dtype and scale == 1:
        torch.addmm(*operands, beta=beta, out=into)
    elif into.is_cuda and into.dtype == torch.float32:
        torch.addmm(*operands, out_dtype=torch.float32, beta=beta, alpha=scale, out=into)
    else:
        for tile in vocab_tiles(grad_logits.shape[1]):
            product = grad_logits[:, tile].T @ inputs
            product = product if scale == 1 else product.float() * scale
            if is_first:
                into[tile] = product
            else:
                into[tile] += product
