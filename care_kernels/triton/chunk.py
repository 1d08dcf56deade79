"""The Triton kernels as a `LogitChunk`."""

from torch import Tensor

from care_kernels._logit_chunk import Head
from care_kernels.row_softmax import RowGradients, RowStatistics
from care_kernels.triton.projection import TileStatistics, combine, empty_exps, project
from care_kernels.triton.softmax import exp_gradients_


class FusedChunk:
    """The GEMM whose epilogue takes the statistics; the chunk holds exponentials.

    Where no gradients are wanted it holds nothing of size [C, V] at all.
    """

    def __init__(
        self, head: Head, num_rows: int, *, with_entropy: bool, with_gradients: bool
    ) -> None:
        self._head, self._with_entropy = head, with_entropy
        weight = head.weight
        self.grad_dtype = weight.dtype
        self._exps = None
        if with_gradients:
            self._exps = empty_exps(num_rows, weight.shape[0], weight.dtype, weight.device)
        self._tiles: TileStatistics | None = None

    def project(
        self, inputs: Tensor, target_ids: Tensor, ref_inputs: Tensor | None = None
    ) -> RowStatistics:
        """See `LogitChunk`."""
        assert ref_inputs is None, "the exact KL takes TorchChunk"
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
