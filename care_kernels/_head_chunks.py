"""The head over selected rows, one chunk of logits at a time.

Both public operations are sweeps over these chunks: make a chunk's logits and row statistics (one
GEMM) and, where gradients are wanted, turn the logits into their gradient and multiply it into dX
and dW (two more GEMMs).

Shape letters: N rows, D hidden, V vocabulary, M selected rows, C rows of a chunk.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from care_kernels._gemm import add_weight_gradient, back_project
from care_kernels._launch import chunk_size, logit_chunk
from care_kernels._logit_chunk import Head
from care_kernels._records import join
from care_kernels.row_softmax import RowGradients, RowStatistics
from care_kernels.vocab_parallel import VocabShard


class HeadGradients:
    """dX [N, D], dW [V, D] and db [V] under construction; None where not wanted."""

    def __init__(
        self,
        hidden: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        *,
        weight_is_new: bool = True,
    ) -> None:
        self.hidden, self.weight, self.bias = hidden, weight, bias
        self.weight_is_new = weight_is_new
        """dW holds no numbers yet: the first chunk overwrites it."""


class HeadChunks:
    """Iterate over chunks; for each call `project` and at most once `add_gradients`.

    Nothing here records an autograd graph or follows an enclosing autocast.
    """

    def __init__(
        self,
        hidden: Tensor,
        head: Head,
        target_ids: Tensor,
        rows: Tensor,
        chunk_rows: int | None,
        backend: str,
        *,
        with_entropy: bool = False,
        with_gradients: bool = False,
        reference: tuple[Tensor, Head] | None = None,
        vocab_shard: VocabShard | None = None,
    ) -> None:
        """
        Args:
            hidden: [N, D].
            head: the projection.
            target_ids: [N] int, valid at the selected rows.
            rows: [M] int64, the selected rows; chunks are consecutive slices of it.
            chunk_rows: C, at least 1; None: chosen.
            backend: as `resolve_backend` returns it.
            with_entropy: whether statistics include the entropy.
            with_gradients: whether `add_gradients` will be called.
            reference: hidden states [N, D'] and head of the reference, for the exact KL.
            vocab_shard: which part of the vocabulary these heads are; None: all of it.
        """
        self._hidden, self._head, self._rows = hidden, head, rows
        self._ref_hidden = None if reference is None else reference[0]
        self._shard = vocab_shard
        targets = target_ids.index_select(0, rows).long()
        # A shard reads statistics at a target of its own, and has a gradient at none of another's.
        self._targets = self._own_targets = targets
        if vocab_shard is not None:
            num_local = head.weight.shape[0]
            self._targets, self._own_targets = vocab_shard.local_targets(targets, num_local)
        num_rows = rows.numel()
        vocab_size = head.weight.shape[0] if vocab_shard is None else vocab_shard.usual_size
        self._chunk_rows = chunk_size(
            chunk_rows, vocab_size, hidden.device, with_ref=reference is not None
        )
        self._logits = logit_chunk(
            backend,
            hidden.dtype,
            head,
            min(self._chunk_rows, num_rows),
            with_entropy=with_entropy,
            with_gradients=with_gradients,
            ref_head=None if reference is None else reference[1],
        )

    def __iter__(self) -> Iterator[slice]:
        """Slices of the selected rows: at least one, empty if no row is selected."""
        num_rows = self._rows.numel()
        for start in range(0, max(num_rows, 1), self._chunk_rows):
            yield slice(start, min(start + self._chunk_rows, num_rows))

    def new_gradients(
        self, wanted: tuple[bool, ...], weight_grad: Tensor | None = None
    ) -> HeadGradients:
        """Room for each of (hidden, weight, bias) that is wanted; dW is added to `weight_grad`.

        Several chunks add up in float32; a lone one is rounded to its own type by its GEMM.
        """
        hidden, weight, bias = wanted
        wide = torch.float64 if self._logits.grad_dtype == torch.float64 else torch.float32
        narrow = self._logits.grad_dtype if self._logits.grad_dtype == torch.bfloat16 else wide
        is_one_chunk = self._rows.numel() <= self._chunk_rows
        dtypes = (narrow, narrow if is_one_chunk else wide)
        shape, new = self._head.weight.shape, self._hidden.new_zeros
        if weight and weight_grad is None:
            new_weight = self._head.weight.new_empty(shape, dtype=dtypes[1])
        else:
            new_weight = weight_grad
        return HeadGradients(
            new(self._hidden.shape, dtype=dtypes[0]) if hidden else None,
            new_weight,
            new(shape[0], dtype=wide) if bias and self._head.bias is not None else None,
            weight_is_new=weight_grad is None,
        )

    @torch.no_grad()
    def project(self, chunk: slice) -> RowStatistics:
        """Make the chunk's logits, and the reference's: one GEMM each. Returns their statistics."""
        with torch.autocast(self._hidden.device.type, enabled=False):
            ref_inputs = (
                None if self._ref_hidden is None else _select(self._ref_hidden, self._rows[chunk])
            )
            inputs = _select(self._hidden, self._rows[chunk])
            stats = self._logits.project(inputs, self._targets[chunk], ref_inputs)
        if self._shard is None:
            return stats
        return self._shard.combine(stats, self._own_targets[chunk] >= 0)

    def all_statistics(self) -> RowStatistics:
        """Statistics of all selected rows, [M]."""
        return join([self.project(chunk) for chunk in self])

    @torch.no_grad()
    def add_gradients(
        self, chunk: slice, stats: RowStatistics, upstream: RowGradients, into: HeadGradients
    ) -> None:
        """Consume the logits that `project(chunk)` has made; add to dX, dW and db."""
        rows = self._rows[chunk]
        grad_logits = self._logits.gradients(self._own_targets[chunk], stats, upstream)
        with torch.autocast(self._hidden.device.type, enabled=False):
            if into.hidden is not None:
                grad_inputs = back_project(grad_logits, self._head.weight)
                if self._shard is not None:
                    grad_inputs = self._shard.sum(grad_inputs)
                into.hidden.index_copy_(0, rows, grad_inputs.to(into.hidden.dtype))
            if into.weight is not None:
                inputs = _select(self._hidden, rows).to(grad_logits.dtype)
                add_weight_gradient(grad_logits, inputs, into.weight, is_first=into.weight_is_new)
        if into.bias is not None:
            into.bias.add_(grad_logits.sum(0, dtype=into.bias.dtype))
        into.weight_is_new = False


def _select(hidden: Tensor, rows: Tensor) -> Tensor:
    return hidden.index_select(0, rows)
