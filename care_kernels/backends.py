"""One chunk of logits: made by a GEMM with their row statistics, then turned into their gradient.

`LogitChunk` says what every kind provides, `chunk_kind` chooses among them:

- `TritonChunk`: bfloat16 or float16 on a GPU. The GEMM's epilogue reads the statistics off its
  float32 accumulators and keeps 16-bit exponentials of the logits.
- `NativeChunk`: the same in C++, for bfloat16 on a CPU with AVX-512.
- `TorchChunk`: float32 or float64 logits and torch operations, anywhere; also the exact KL, which
  needs two models' logits at once.

Shape letters: C rows of the chunk, D hidden, V vocabulary.
"""

import os
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from care_kernels import checks
from care_kernels.cpu import native_ops
from care_kernels.softmax import (
    LogitTransform,
    RowGradients,
    RowStatistics,
    logit_gradients,
    row_statistics,
    vocab_tiles,
)


@dataclass(frozen=True)
class Head:
    """The output projection: weight [V, D], bias [V] or None, and what follows it."""

    weight: Tensor
    bias: Tensor | None
    transform: LogitTransform


class ChunkRows(NamedTuple):
    """What a chunk's logits are made of."""

    hidden: Tensor
    """[C, D]."""
    target_ids: Tensor
    """[C] int64 rows of this head."""
    ref_hidden: Tensor | None = None
    """[C, D'] of the reference, for the exact KL."""
    anchor: Tensor | None = None
    """[C] float32 near each row's log-normaliser, which a kernel may use as the exponentials'
    origin in place of the maximum."""


class LogitGradient(NamedTuple):
    """dL/draw = factor * matrix, row by row."""

    matrix: Tensor
    """[C, V] in the precision of the GEMMs that follow."""
    factor: Tensor | None = None
    """[C] float32; None: 1."""


@dataclass(frozen=True)
class ChunkSpec:
    """What is asked of a chunk."""

    hidden_dtype: torch.dtype
    head: Head
    ref_head: Head | None = None
    """The reference's, for the exact KL."""
    with_entropy: bool = False
    with_gradients: bool = False


class LogitChunk(Protocol):
    """Room for up to `num_rows` rows of logits, and the kernels that work on them."""

    grad_dtype: torch.dtype
    """Of the logits' gradient."""

    def __init__(self, spec: ChunkSpec, num_rows: int) -> None: ...

    def project(self, rows: ChunkRows, *, keep: bool = False) -> RowStatistics:
        """Statistics [C] of the rows' logits, which are kept for `gradients` where asked."""
        ...

    def gradients(
        self, target_ids: Tensor, stats: RowStatistics, upstream: RowGradients
    ) -> LogitGradient:
        """dL/draw of the logits made last, which are gone afterwards.

        A target of -1 is none of this head's rows: no part of g lands there.
        """
        ...


class TorchChunk:
    """Torch operations on float32 logits, float64 for float64."""

    def __init__(self, spec: ChunkSpec, num_rows: int) -> None:
        weight, ref_head = spec.head.weight, spec.ref_head
        dtype = compute_dtype(weight, None if ref_head is None else ref_head.weight)
        dtype = torch.float64 if spec.hidden_dtype == torch.float64 else dtype
        # In the weight's own 16 bits where the GEMMs that follow have fast kernels for them.
        is_fast = weight.is_cuda or _runs_natively(spec.hidden_dtype, spec.head.weight)
        self.grad_dtype = weight.dtype if is_fast and dtype == torch.float32 else dtype
        self._spec = spec
        self._logits = torch.empty(num_rows, weight.shape[0], dtype=dtype, device=weight.device)
        self._ref_logits = None if ref_head is None else torch.empty_like(self._logits)

    def project(self, rows: ChunkRows, *, keep: bool = False) -> RowStatistics:
        """See `LogitChunk`."""
        spec = self._spec
        logits, ref_logits = self._first(len(rows.hidden))
        _write_logits(rows.hidden, spec.head, logits)
        if ref_logits is not None:
            assert rows.ref_hidden is not None and spec.ref_head is not None
            _write_logits(rows.ref_hidden, spec.ref_head, ref_logits)
        return row_statistics(
            logits, rows.target_ids, with_entropy=spec.with_entropy, ref_logits=ref_logits
        )

    def gradients(
        self, target_ids: Tensor, stats: RowStatistics, upstream: RowGradients
    ) -> LogitGradient:
        """See `LogitChunk`."""
        logits, ref_logits = self._first(len(target_ids))
        # Over the logits' own memory: each row's first bytes.
        out = logits.view(self.grad_dtype)[:, : logits.shape[1]]
        transform = self._spec.head.transform
        logit_gradients(
            logits, target_ids, stats, upstream, transform, out=out, ref_logits=ref_logits
        )
        clear_padding(out)
        return LogitGradient(out)

    def _first(self, num_rows: int) -> tuple[Tensor, Tensor | None]:
        ref_logits = self._ref_logits
        return self._logits[:num_rows], None if ref_logits is None else ref_logits[:num_rows]


class NativeChunk:
    """The C++ CPU kernels. Without gradients nothing of size [C, V] is held at all."""

    grad_dtype = torch.bfloat16

    def __init__(self, spec: ChunkSpec, num_rows: int) -> None:
        self._spec = spec
        shape = (num_rows if spec.with_gradients else 0, spec.head.weight.shape[0])
        self._exps = torch.empty(shape, dtype=torch.bfloat16)
        self._target_logit = self._block_max = torch.empty(0)

    def project(self, rows: ChunkRows, *, keep: bool = False) -> RowStatistics:
        """See `LogitChunk`."""
        exps = self._exps[: len(rows.hidden)] if keep else None
        self._target_logit, max_logit, log_total, entropy, self._block_max = _native_project(
            rows.hidden, self._spec.head, rows.target_ids, self._spec.with_entropy, exps=exps
        )
        log_probs = (self._target_logit - max_logit) - log_total
        return RowStatistics(log_probs, max_logit, log_total, entropy)

    def gradients(
        self, target_ids: Tensor, stats: RowStatistics, upstream: RowGradients
    ) -> LogitGradient:
        """See `LogitChunk`."""
        ops = native_ops()
        assert ops is not None, "chosen only where the kernels run"
        exps = self._exps[: len(target_ids)]
        ops.exp_gradients(
            exps,
            self._block_max,
            target_ids,
            self._target_logit,
            stats.log_probs,
            stats.max_logit,
            stats.log_total,
            upstream.log_probs.contiguous(),
            None if upstream.entropy is None else upstream.entropy.contiguous(),
            stats.entropy,
            *_numbers(self._spec.head.transform),
        )
        return LogitGradient(exps)


class TritonChunk:
    """The fused projection. Without gradients nothing of size [C, V] is held at all.

    With an anchor a, E = e^(z - a) and no pass over E is needed: with L the row's log-normaliser
    and c = -g e^(a - L) dz/draw, dL/draw = c E but at the target, where E becomes
    expm1(l) e^(L - a).
    """

    def __init__(self, spec: ChunkSpec, num_rows: int) -> None:
        # Triton is imported where its kernels run: it takes a second.
        from care_kernels.triton import projection, softmax, tiles

        self._projection, self._softmax, self._combine = projection, softmax, tiles.combine
        self._spec, weight = spec, spec.head.weight
        self.grad_dtype = weight.dtype
        shape = (num_rows if spec.with_gradients else 0, weight.shape[0])
        self._exps = projection.empty_exps(*shape, weight.dtype, weight.device)
        self._tiles: tiles.TileStatistics | None = None
        self._log_shift: Tensor | None = None
        """L - a [C] of the rows projected last, NaN where it is too far; None: no anchor."""

    def project(self, rows: ChunkRows, *, keep: bool = False) -> RowStatistics:
        """See `LogitChunk`."""
        head = self._spec.head
        tiles = self._projection.project(
            rows.hidden,
            head.weight,
            head.bias,
            rows.target_ids,
            head.transform,
            with_entropy=self._spec.with_entropy,
            anchor=rows.anchor if keep else None,
            exps=self._exps[: len(rows.hidden)] if keep else None,
        )
        stats = self._combine(tiles)
        self._tiles = tiles
        self._log_shift = None if tiles.anchor is None else stats.log_total
        return stats

    def gradients(
        self, target_ids: Tensor, stats: RowStatistics, upstream: RowGradients
    ) -> LogitGradient:
        """See `LogitChunk`."""
        exps, transform = self._exps[: len(target_ids)], self._spec.head.transform
        assert self._tiles is not None
        if self._log_shift is None:
            self._softmax.exp_gradients_(exps, self._tiles, target_ids, stats, upstream, transform)
            return LogitGradient(exps)
        self._softmax.anchor_targets_(exps, target_ids, stats.log_probs, self._log_shift)
        slope = transform.scale / transform.temperature
        return LogitGradient(exps, upstream.log_probs * torch.exp(-self._log_shift) * -slope)


def resolve_backend(backend: str | None, device: torch.device) -> str:
    """The backend that will run: "triton" on CUDA and ROCm tensors, else "torch".

    "triton" on CPU tensors runs under TRITON_INTERPRET=1 only.

    Raises:
        ValueError: `backend` is unknown, or cannot run on `device`.
    """
    checks.check_options(backend=backend)
    if backend is None:
        return "triton" if device.type == "cuda" else "torch"
    if backend == "triton" and device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        raise checks.wrong(
            "backend",
            f"'triton' for tensors on {device}",
            "CUDA or ROCm tensors, or TRITON_INTERPRET=1 in the environment",
        )
    return backend


def compute_dtype(*tensors: Tensor | None) -> torch.dtype:
    """float64 if any tensor is float64 (gradient checks need it), else float32."""
    is_double = any(t is not None and t.dtype == torch.float64 for t in tensors)
    return torch.float64 if is_double else torch.float32


def chunk_kind(backend: str, spec: ChunkSpec) -> tuple[type[LogitChunk], int]:
    """The kind of chunk that a call gets, and the bytes that it holds for each logit."""
    if spec.ref_head is not None:
        return TorchChunk, 8
    if backend == "triton":
        from care_kernels.triton.projection import supports

        kind = TritonChunk if supports(spec.hidden_dtype, spec.head.weight) else TorchChunk
    else:
        is_native = _runs_natively(spec.hidden_dtype, spec.head.weight)
        kind = NativeChunk if is_native else TorchChunk
    if kind is TorchChunk:
        return kind, 4
    return kind, 2 if spec.with_gradients else 0


def clear_padding(matrix: Tensor) -> None:
    """Zeros between the end of each row of [C, V] and the start of the next, on a CPU.

    On one with AMX, oneDNN's bfloat16 GEMM reads on from a row's end to the next multiple of its
    tile and multiplies what it finds there by zeros; a NaN times zero is NaN.
    """
    num_rows, width = matrix.shape
    if not matrix.is_cuda and num_rows > 0 and matrix.stride(0) > width:
        shape, offset = (num_rows, matrix.stride(0) - width), matrix.storage_offset() + width
        matrix.as_strided(shape, (matrix.stride(0), 1), offset).zero_()


def _runs_natively(hidden_dtype: torch.dtype, weight: Tensor) -> bool:
    """bfloat16 on a CPU, with rows that the C++ kernels can read in pairs."""
    return (
        hidden_dtype == weight.dtype == torch.bfloat16
        and weight.device.type == "cpu"
        and weight.shape[1] % 2 == 0
        and weight.stride(1) == 1
        and weight.stride(0) % 2 == 0
        and native_ops() is not None
    )


def _native_project(
    inputs: Tensor,
    head: Head,
    target_ids: Tensor,
    with_entropy: bool = False,
    *,
    logits: Tensor | None = None,
    exps: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor]:
    """`project` of `cpu/head_cpu.cpp`, which says what comes back."""
    ops = native_ops()
    assert ops is not None, "chosen only where the kernels run"
    bias = None if head.bias is None else head.bias.float().contiguous()
    options = _numbers(head.transform)
    return ops.project(inputs, head.weight, bias, target_ids, *options, with_entropy, logits, exps)


def _numbers(transform: LogitTransform) -> tuple[float, float, float]:
    return transform.scale, transform.softcap or 0.0, transform.temperature


def _write_logits(inputs: Tensor, head: Head, out: Tensor) -> None:
    """out [C, V] = z of inputs [C, D], never rounded to less than `out`'s precision."""
    weight = head.weight
    if out.dtype == torch.float32 and _runs_natively(inputs.dtype, weight):
        # Any target will do: the statistics come later.
        targets = torch.zeros(inputs.shape[0], dtype=torch.int64)
        _native_project(inputs, head, targets, logits=out)
        return
    if out.is_cuda and inputs.dtype == weight.dtype:
        if weight.dtype == out.dtype:
            torch.mm(inputs, weight.T, out=out)
        else:
            torch.mm(inputs, weight.T, out_dtype=out.dtype, out=out)
    else:
        inputs = inputs.to(out.dtype)
        for tile in vocab_tiles(weight.shape[0]):
            out[:, tile] = inputs @ weight[tile].to(out.dtype).contiguous().T
    if head.bias is not None:
        out.add_(head.bias)
    head.transform.apply_(out)
