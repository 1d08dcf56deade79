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

    def _project(self, inputs: Tensor, head: Head, out: Tensor) -> Any:
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
        return out


class NativeChunk(TorchChunk):
    """The C++ CPU kernels: bfloat16 GEMMs with float32 logits, one pass for all statistics."""

    def __init__(self, head: Head, num_rows: int, *, with_entropy: bool, ref_head: Head | None):
        super().__init__(
            head, num_rows, torch.float32, with_entropy=with_entropy, ref_head=ref_head
        )
        self.grad_dtype = torch.bfloat16
        ops = native_ops()
        assert ops is not None, "chosen only where the kernels run"
        self._ops = ops

    def project(
        self, inputs: Tensor, target_ids: Tensor, ref_inputs: Tensor | None = None
    ) -> RowStatistics:
        """See `LogitChunk`."""
        if ref_inputs is not None:
            return super().project(inputs, target_ids, ref_inputs)
        logits = self._logits[: inputs.shape[0]]
        max_logit, log_total, entropy = self._project(inputs, self._head, logits)
        target_logit = logits.gather(1, target_ids[:, None])[:, 0]
        log_probs = (target_logit - max_logit) - log_total
        return RowStatistics(log_probs, max_logit, log_total, entropy, None, None, None)

    def _gradients(
        self,
        logits: Tensor,
        target_ids: Tensor,
        stats: RowStatistics,
        upstream: RowGradients,
        ref_logits: Tensor | None,
    ) -> Tensor:
        if upstream.kl is not None:
            return super()._gradients(logits, target_ids, stats, upstream, ref_logits)
        self._ops.logit_gradients(
            logits,
            target_ids,
            stats.max_logit,
            stats.log_total,
            upstream.log_probs.contiguous(),
            upstream.entropy,
            stats.entropy,
            *_options(self._head.transform),
        )
        return in_place(logits, torch.bfloat16)

    def _project(self, inputs: Tensor, head: Head, out: Tensor) -> Any:
        bias = None if head.bias is None else head.bias.float()
        return self._ops.project(
            inputs, head.weight, bias, *_options(head.transform), self._with_entropy, out
        )


def in_place(logits: Tensor, dtype: torch.dtype) -> Tensor:
    """[C, V] of `dtype` over the memory of contiguous [C, V] logits: each row's first bytes."""
    return logits.view(dtype)[:, : logits.shape[1]]


def _options(transform: LogitTransform) -> tuple[float, float, float]:
    return transform.scale, transform.softcap or 0.0, transform.temperature


def _project(inputs: Tensor, head: Head, out: Tensor) -> None:
    """out [C, V] = z of inputs [C, D], never rounded to less than `out`'s precision."""
    if out.is_cuda and inputs.dtype == head.weight.dtype != out.dtype:
        torch.mm(inputs, head.weight.T, out_dtype=out.dtype, out=out)
    else:
        inputs = inputs.to(out.dtype)
        for tile in vocab_tiles(head.weight.shape[0]):
            out[:, tile] = inputs @ head.weight[tile].to(out.dtype).T
    if head.bias is not None:
        out.add_(head.bias)
    head.transform.apply_(out)
