"""The Triton kernels as `LogitChunk`s: the fused projection, or library logits and row kernels."""

import torch
from torch import Tensor

from care_kernels._logit_chunk import Head, TorchChunk, clear_padding, in_place
from care_kernels.row_softmax import RowGradients, RowStatistics
from care_kernels.triton_backend.exp_gradients import exp_gradients_
from care_kernels.triton_backend.fused_projection import empty_exps, project
from care_kernels.triton_backend.logit_gradients import logit_gradients
from care_kernels.triton_backend.row_statistics import row_statistics
from care_kernels.triton_backend.tile_statistics import TileStatistics, combine


class FusedChunk:
    """The GEMM whose epilogue takes the statistics; the chunk holds bfloat16 exponentials.

    Where no gradients are wanted it holds nothing of size [C, V] at all.
    """

    grad_dtype = torch.bfloat16

    def __init__(
        self, head: Head, num_rows: int, *, with_entropy: bool, with_gradients: bool
    ) -> None:
        self._head, self._with_entropy = head, with_entropy
        weight = head.weight
        self._exps = (
            empty_exps(num_rows, weight.shape[0], weight.device) if with_gradients else None
        )
        self._tiles: TileStatistics | None = None

    def project(
        self, inputs: Tensor, target_ids: Tensor, ref_inputs: Tensor | None = None
    ) -> RowStatistics:
        """See `LogitChunk`."""
        assert ref_inputs is None, "the exact KL takes RowKernelChunk"
        head = self._head
        exps = None if self._exps is None else self._exps[: inputs.shape[0]]
        self._tiles = project(
            inputs,
            head.weight,
            head.bias,
            target_ids,
            head.transform,
            with_entropy=self._with_entropy,
            exps=exps,
        )
        return combine(self._tiles)

    def gradients(self, target_ids: Tensor, stats: RowStatistics, upstream: RowGradients) -> Tensor:
        """See `LogitChunk`."""
        assert self._exps is not None and self._tiles is not None
        exps = self._exps[: target_ids.shape[0]]
        exp_gradients_(exps, self._tiles, target_ids, stats, upstream, self._head.transform)
        return exps


class RowKernelChunk(TorchChunk):
    """Float32 logits from the library's GEMM, one kernel per row for everything after it."""

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
