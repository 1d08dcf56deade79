"""One chunk of logits: made by a GEMM with their row statistics, then turned into their gradient.

`chunk_kind` chooses:

- `TritonChunk`: bfloat16 or float16 on a GPU. The GEMM's epilogue reads the statistics off its
  float32 accumulators and keeps 16-bit exponentials of the logits, for gradients alone.
- `NativeChunk`: the same in C++, for bfloat16 on a CPU with AVX-512.
- `TorchChunk`: float32 or float64 logits and torch operations, anywhere; also the exact KL, which
  needs two models' logits at once.

Shape letters: C rows of the chunk, D hidden, V vocabulary.
"""

import functools
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, ParamSpec, TypeVar

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
    """One output projection, and what is asked of its chunks."""

    hidden_dtype: torch.dtype
    weight: Tensor
    """[V, D]."""
    bias: Tensor | None
    """[V]."""
    transform: LogitTransform
    ref_weight: Tensor | None = None
    """[V, D'] of the reference, for the exact KL; bias and transform are the policy's."""
    with_entropy: bool = False
    with_gradients: bool = False


class TorchChunk:
    """Room for up to `num_rows` rows of float32 logits, float64 for float64, and torch operations.

    The other kinds have the same methods, and `grad_dtype`, the type of the logits' gradient.
    """

    def __init__(self, spec: ChunkSpec, num_rows: int) -> None:
        weight, ref_weight = spec.weight, spec.ref_weight
        dtype = compute_dtype(weight, ref_weight)
        dtype = torch.float64 if spec.hidden_dtype == torch.float64 else dtype
        # A GPU has fast kernels for 16-bit GEMMs. On a CPU oneDNN's read on behind a row's end,
        # where a 16-bit gradient over float32 logits holds anything.
        is_narrow = weight.is_cuda and dtype == torch.float32
        self.grad_dtype = weight.dtype if is_narrow else dtype
        self._spec = spec
        self._logits = torch.empty(num_rows, weight.shape[0], dtype=dtype, device=weight.device)
        self._ref_logits = None if ref_weight is None else torch.empty_like(self._logits)

    def project(self, rows: ChunkRows, *, keep: bool = False) -> RowStatistics:
        """Statistics [C] of the rows' logits, which are kept for `gradients` where asked."""
        spec = self._spec
        logits, ref_logits = self._first(len(rows.hidden))
        _write_logits(rows.hidden, spec.weight, spec, logits)
        if ref_logits is not None:
            assert rows.ref_hidden is not None and spec.ref_weight is not None
            _write_logits(rows.ref_hidden, spec.ref_weight, spec, ref_logits)
        return row_statistics(
            logits, rows.target_ids, with_entropy=spec.with_entropy, ref_logits=ref_logits
        )

    def gradients(
        self, target_ids: Tensor, stats: RowStatistics, upstream: RowGradients
    ) -> LogitGradient:
        """dL/draw of the logits made last, which are gone afterwards.

        A target of -1 is none of this head's rows: no part of g lands there.
        """
        logits, ref_logits = self._first(len(target_ids))
        # Over the logits' own memory: each row's first bytes.
        out = logits.view(self.grad_dtype)[:, : logits.shape[1]]
        transform = self._spec.transform
        logit_gradients(
            logits, target_ids, stats, upstream, transform, out=out, ref_logits=ref_logits
        )
        return LogitGradient(out)

    def _first(self, num_rows: int) -> tuple[Tensor, Tensor | None]:
        ref_logits = self._ref_logits
        return self._logits[:num_rows], None if ref_logits is None else ref_logits[:num_rows]


class NativeChunk:
    """The C++ CPU kernels."""

    grad_dtype = torch.bfloat16

    def __init__(self, spec: ChunkSpec, num_rows: int) -> None:
        self._spec, self._ops = spec, native_ops()
        self._bias = None if spec.bias is None else spec.bias.float().contiguous()
        transform = spec.transform
        self._numbers = (transform.scale, transform.softcap or 0.0, transform.temperature)
        shape = (num_rows if spec.with_gradients else 0, len(spec.weight))
        self._exps = torch.empty(shape, dtype=torch.bfloat16)
        self._target_logit = self._block_max = torch.empty(0)

    def project(self, rows: ChunkRows, *, keep: bool = False) -> RowStatistics:
        """See `TorchChunk`."""
        assert self._ops is not None, "chosen only where the kernels run"
        self._target_logit, max_logit, log_total, entropy, self._block_max = self._ops.project(
            rows.hidden,
            self._spec.weight,
            self._bias,
            rows.target_ids,
            *self._numbers,
            self._spec.with_entropy,
            self._exps[: len(rows.hidden)] if keep else None,
        )
        log_probs = (self._target_logit - max_logit) - log_total
        return RowStatistics(log_probs, max_logit, log_total, entropy)

    def gradients(
        self, target_ids: Tensor, stats: RowStatistics, upstream: RowGradients
    ) -> LogitGradient:
        """See `TorchChunk`."""
        assert self._ops is not None, "chosen only where the kernels run"
        exps = self._exps[: len(target_ids)]
        self._ops.exp_gradients(
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
            *self._numbers,
        )
        return LogitGradient(exps)


class TritonChunk:
    """The fused projection; how an anchor saves a pass over E, `triton.softmax` says."""

    def __init__(self, spec: ChunkSpec, num_rows: int) -> None:
        # Triton is imported where its kernels run: it takes a second.
        from care_kernels.triton import projection, softmax

        self._projection, self._softmax = projection, softmax
        self._spec, self.grad_dtype = spec, spec.weight.dtype
        shape = (num_rows if spec.with_gradients else 0, len(spec.weight))
        self._exps = projection.empty_exps(*shape, self.grad_dtype, spec.weight.device)
        self._tiles: projection.TileStatistics | None = None
        self._log_shift: Tensor | None = None
        """L - a [C] of the rows projected last, NaN where it is too far; None: no anchor."""

    def project(self, rows: ChunkRows, *, keep: bool = False) -> RowStatistics:
        """See `TorchChunk`."""
        spec, anchor = self._spec, rows.anchor if keep else None
        self._tiles = self._projection.project(
            rows.hidden,
            spec.weight,
            spec.bias,
            rows.target_ids,
            spec.transform,
            with_entropy=spec.with_entropy,
            anchor=anchor,
            exps=self._exps[: len(rows.hidden)] if keep else None,
        )
        stats = self._softmax.combine(self._tiles)
        self._log_shift = None if anchor is None else stats.log_total
        return stats

    def gradients(
        self, target_ids: Tensor, stats: RowStatistics, upstream: RowGradients
    ) -> LogitGradient:
        """See `TorchChunk`."""
        exps, transform = self._exps[: len(target_ids)], self._spec.transform
        assert self._tiles is not None
        if self._log_shift is None:
            self._softmax.exp_gradients_(exps, self._tiles, target_ids, stats, upstream, transform)
            return LogitGradient(exps)
        self._softmax.anchor_targets_(exps, target_ids, stats.log_probs, self._log_shift)
        slope = transform.scale / transform.temperature
        return LogitGradient(exps, upstream.log_probs * torch.exp(-self._log_shift) * -slope)


LogitChunk = TorchChunk | NativeChunk | TritonChunk

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


def uncompiled(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """`function`, left out of a `torch.compile` around its caller: there is a graph break.

    Compiled, its loops over chunks and vocabulary tiles would be unrolled, anew for each N, and a
    chunk's memory no longer written over: twice the memory, and half a minute for each N.
    """

    @functools.wraps(function)
    def call(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        # Decorating with torch.compiler.disable itself would import the compiler: a second.
        if torch.compiler.is_compiling():
            eager: Any = torch.compiler.disable(function)
            return eager(*args, **kwargs)
        return function(*args, **kwargs)

    return call


def resolve_backend(backend: str | None, device: torch.device) -> str:
    """The backend that will run: by default "triton" on CUDA and ROCm tensors, else "torch"."""
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
    if spec.ref_weight is not None:
        return TorchChunk, 8
    if backend == "triton":
        from care_kernels.triton.projection import supports

        kind = TritonChunk if supports(spec.hidden_dtype, spec.weight) else TorchChunk
    else:
        kind = NativeChunk if _runs_natively(spec.hidden_dtype, spec.weight) else TorchChunk
    if kind is TorchChunk:
        return kind, 4
    return kind, 2 if spec.with_gradients else 0


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


def _write_logits(inputs: Tensor, weight: Tensor, spec: ChunkSpec, out: Tensor) -> None:
    """out [C, V] = z of inputs [C, D], never rounded to less than `out`'s precision."""
    if not out.is_cuda or inputs.dtype != weight.dtype:
        inputs = inputs.to(out.dtype)
        for tile in vocab_tiles(len(weight)):
            out[:, tile] = inputs @ weight[tile].to(out.dtype).contiguous().T
    elif weight.dtype == out.dtype:
        torch.mm(inputs, weight.T, out=out)
    else:
        torch.mm(inputs, weight.T, out_dtype=out.dtype, out=out)
    if spec.bias is not None:
        out.add_(spec.bias)
    spec.transform.apply_(out)
