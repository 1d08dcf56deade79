"""One chunk of logits: made by a GEMM with their row statistics, then turned into their gradient.

`LogitChunk` says what a backend provides; `logit_chunk` chooses among them.

Shape letters: C rows of the chunk, D hidden, V vocabulary.
"""

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from care_kernels._native_cpu import native_ops
from care_kernels.row_softmax import (
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


class LogitChunk(Protocol):
    """A buffer for up to `num_rows` rows of logits, and the kernels that work on it."""

    grad_dtype: torch.dtype
    """What `gradients` returns: the precision of the GEMMs that follow."""

    def project(
        self, inputs: Tensor, target_ids: Tensor, ref_inputs: Tensor | None = None
    ) -> RowStatistics:
        """Make the logits of inputs [C, D] (and the reference's); return their statistics [C]."""
        ...

    def gradients(self, target_ids: Tensor, stats: RowStatistics, upstream: RowGradients) -> Tensor:
        """dL/draw [C, V] of the logits made last, which are gone afterwards.

        A target of -1 is none of this head's rows: no part of g lands there.
        """
        ...


class TorchChunk:
    """Portable torch operations: float32 logits (float64 for float64), on any device."""

    def __init__(
        self,
        head: Head,
        num_rows: int,
        dtype: torch.dtype,
        *,
        with_entropy: bool,
        ref_head: Head | None = None,
    ) -> None:
        """
        Args:
            head: the projection.
            num_rows: the most rows a call brings.
            dtype: of the logits.
            with_entropy: whether statistics include the entropy.
            ref_head: the reference's, for the exact KL.
        """
        weight = head.weight
        self._head, self._ref_head, self._with_entropy = head, ref_head, with_entropy
        self._logits = torch.empty(num_rows, weight.shape[0], dtype=dtype, device=weight.device)
        self._ref_logits = None if ref_head is None else torch.empty_like(self._logits)
        # CPUs without a fast bfloat16 GEMM multiply float32 tiles instead.
        self.grad_dtype = weight.dtype if weight.is_cuda and dtype == torch.float32 else dtype

    def project(
        self, inputs: Tensor, target_ids: Tensor, ref_inputs: Tensor | None = None
    ) -> RowStatistics:
        """See `LogitChunk`."""
        logits = self._logits[: inputs.shape[0]]
        self._project(inputs, self._head, logits)
        ref_logits = None
        if ref_inputs is not None:
            assert self._ref_head is not None and self._ref_logits is not None
            ref_logits = self._ref_logits[: inputs.shape[0]]
            self._project(ref_inputs, self._ref_head, ref_logits)
        return self._statistics(logits, target_ids, ref_logits)

    def gradients(self, target_ids: Tensor, stats: RowStatistics, upstream: RowGradients) -> Tensor:
        """See `LogitChunk`."""
        num_rows = target_ids.shape[0]
        ref_logits = None if self._ref_logits is None else self._ref_logits[:num_rows]
        return self._gradients(self._logits[:num_rows], target_ids, stats, upstream, ref_logits)

    def _project(self, inputs: Tensor, head: Head, out: Tensor) -> None:
        _project(inputs, head, out)

    def _statistics(
        self, logits: Tensor, target_ids: Tensor, ref_logits: Tensor | None
    ) -> RowStatistics:
        return row_statistics(
            logits, target_ids, with_entropy=self._with_entropy, ref_logits=ref_logits
        )

    def _gradients(
        self,
        logits: Tensor,
        target_ids: Tensor,
        stats: RowStatistics,
        upstream: RowGradients,
        ref_logits: Tensor | None,
    ) -> Tensor:
        out = in_place(logits, self.grad_dtype)
        logit_gradients(
            logits,
            target_ids,
            stats,
            upstream,
            self._head.transform,
            out=out,
            ref_logits=ref_logits,
        )
        clear_padding(out)
        return out


class NativeChunk:
    """The C++ CPU kernels: a bfloat16 GEMM with float32 statistics, the chunk in exponentials.

    Where no gradients are wanted it holds nothing of size [C, V] at all.
    """

    grad_dtype = torch.bfloat16

    def __init__(
        self, head: Head, num_rows: int, *, with_entropy: bool, with_gradients: bool
    ) -> None:
        self._head, self._with_entropy = head, with_entropy
        shape = (num_rows, head.weight.shape[0])
        self._exps = torch.empty(shape, dtype=torch.bfloat16) if with_gradients else None
        self._target_logit = self._block_max = torch.empty(0)

    def project(
        self, inputs: Tensor, target_ids: Tensor, ref_inputs: Tensor | None = None
    ) -> RowStatistics:
        """See `LogitChunk`."""
        assert ref_inputs is None, "the exact KL takes NativeKlChunk"
        exps = None if self._exps is None else self._exps[: inputs.shape[0]]
        self._target_logit, max_logit, log_total, entropy, self._block_max = native_project(
            inputs, self._head, target_ids, with_entropy=self._with_entropy, exps=exps
        )
        log_probs = (self._target_logit - max_logit) - log_total
        return RowStatistics(log_probs, max_logit, log_total, entropy, None, None, None)

    def gradients(self, target_ids: Tensor, stats: RowStatistics, upstream: RowGradients) -> Tensor:
        """See `LogitChunk`."""
        ops = native_ops()
        assert ops is not None and self._exps is not None
        exps = self._exps[: target_ids.shape[0]]
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
            *_options(self._head.transform),
        )
        return exps


class NativeKlChunk(TorchChunk):
    """The C++ GEMM with float32 logits of both models, for the exact KL; torch does the rest."""

    def __init__(self, head: Head, num_rows: int, *, with_entropy: bool, ref_head: Head) -> None:
        options: dict[str, Any] = {"with_entropy": with_entropy, "ref_head": ref_head}
        super().__init__(head, num_rows, torch.float32, **options)
        self.grad_dtype = torch.bfloat16

    def _project(self, inputs: Tensor, head: Head, out: Tensor) -> None:
        # Any target will do: torch's statistics read their own.
        targets = torch.zeros(inputs.shape[0], dtype=torch.int64)
        native_project(inputs, head, targets, with_entropy=False, logits=out)


def native_project(
    inputs: Tensor,
    head: Head,
    target_ids: Tensor,
    *,
    with_entropy: bool,
    logits: Tensor | None = None,
    exps: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor]:
    """`project` of `native/head_cpu.cpp`, which says what comes back."""
    ops = native_ops()
    assert ops is not None, "chosen only where the kernels run"
    bias = None if head.bias is None else head.bias.float().contiguous()
    options = _options(head.transform)
    return ops.project(inputs, head.weight, bias, target_ids, *options, with_entropy, logits, exps)


def in_place(logits: Tensor, dtype: torch.dtype) -> Tensor:
    """[C, V] of `dtype` over the memory of contiguous [C, V] logits: each row's first bytes."""
    return logits.view(dtype)[:, : logits.shape[1]]


def clear_padding(matrix: Tensor) -> None:
    """Zeros between the end of each row of [C, V] and the start of the next.

    Some bfloat16 GEMMs on CPUs read them: see `_gemm`.
    """
    num_rows, width = matrix.shape
    if num_rows > 0 and matrix.stride(0) > width:
        shape, offset = (num_rows, matrix.stride(0) - width), matrix.storage_offset() + width
        matrix.as_strided(shape, (matrix.stride(0), 1), offset).zero_()


def _options(transform: LogitTransform) -> tuple[float, float, float]:
    return transform.scale, transform.softcap or 0.0, transform.temperature


def _project(inputs: Tensor, head: Head, out: Tensor) -> None:
    """out [C, V] = z of inputs [C, D], never rounded to less than `out`'s precision."""
    if out.is_cuda and inputs.dtype == head.weight.dtype != out.dtype:
        torch.mm(inputs, head.weight.T, out_dtype=out.dtype, out=out)
    else:
        inputs = inputs.to(out.dtype)
        for tile in vocab_tiles(head.weight.shape[0]):
            out[:, tile] = inputs @ head.weight[tile].to(out.dtype).contiguous().T
    if head.bias is not None:
        out.add_(head.bias)
    head.transform.apply_(out)
