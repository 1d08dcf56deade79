"""The head over selected rows, one chunk of logits at a time.

Both public operations are sweeps over these chunks: make a chunk's logits (one GEMM), read its row
statistics and, where gradients are wanted, turn the logits into their gradient in place and add it
to dX and dW (two more GEMMs).

GEMMs run in float32 on operands upcast tile by tile: products of bfloat16 or float16 numbers are
exact in float32, so the statistics never see a logit rounded to the input's precision.

Shape letters: N rows, D hidden, V vocabulary, C rows of a chunk.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from care_kernels._launch import chunk_size, compute_dtype
from care_kernels._records import join
from care_kernels.row_softmax import (
    LogitTransform,
    RowGradients,
    RowStatistics,
    logit_gradients_,
    row_statistics,
    vocab_tiles,
)


@dataclass(frozen=True)
class Head:
    """The output projection: weight [V, D], bias [V] or None, and what follows it."""

    weight: Tensor
    bias: Tensor | None
    transform: LogitTransform


@dataclass(frozen=True)
class HeadGradients:
    """Gradients under construction, in compute precision; None where not wanted."""

    hidden: Tensor | None
    """[N, D]."""
    weight: Tensor | None
    """[V, D]."""
    bias: Tensor | None
    """[V]."""


class HeadChunks:
    """Iterate over chunks; for each call `project`, `statistics` and at most once `add_gradients`.

    Nothing here records an autograd graph or follows an enclosing autocast.
    """

    def __init__(
        self,
        hidden: Tensor,
        head: Head,
        target_ids: Tensor,
        rows: Tensor,
        chunk_rows: int | None,
        *,
        with_entropy: bool = False,
        reference: tuple[Tensor, Head] | None = None,
    ) -> None:
        """
        Args:
            hidden: [N, D].
            head: the projection.
            target_ids: [N] int, valid at the selected rows.
            rows: [M] int64, the selected rows; chunks are consecutive slices of it.
            chunk_rows: C, at least 1; None: chosen.
            with_entropy: whether statistics include the entropy.
            reference: hidden states [N, D'] and head of the reference, for the exact KL.
        """
        self._hidden, self._head, self._reference = hidden, head, reference
        self._rows = rows
        self._targets = target_ids.index_select(0, rows).long()
        self._with_entropy = with_entropy
        self._dtype = compute_dtype(hidden, head.weight)
        with_ref = reference is not None
        self._chunk_rows = chunk_size(chunk_rows, head.weight, self._dtype, with_ref)
        shape = (min(self._chunk_rows, rows.numel()), head.weight.shape[0])
        self._logits = torch.empty(shape, dtype=self._dtype, device=hidden.device)
        self._ref_logits = torch.empty_like(self._logits) if with_ref else None

    def __iter__(self) -> Iterator[slice]:
        """Slices of the selected rows: at least one, empty if no row is selected."""
        num_rows = self._rows.numel()
        for start in range(0, max(num_rows, 1), self._chunk_rows):
            yield slice(start, min(start + self._chunk_rows, num_rows))

    def zero_gradients(self, wanted: tuple[bool, ...]) -> HeadGradients:
        """Zeros for each of (hidden, weight, bias) that is wanted."""
        sources = (self._hidden, self._head.weight, self._head.bias)
        return HeadGradients(
            *(
                torch.zeros(source.shape, dtype=self._dtype, device=source.device)
                if want and source is not None
                else None
                for source, want in zip(sources, wanted, strict=True)
            )
        )

    @torch.no_grad()
    def project(self, chunk: slice) -> None:
        """Make the chunk's logits, and the reference's: one GEMM each."""
        logits, ref_logits = self._buffers(chunk)
        with torch.autocast(logits.device.type, enabled=False):
            _project(self._inputs(self._hidden, chunk), self._head, logits)
            if self._reference is not None and ref_logits is not None:
                ref_hidden, ref_head = self._reference
                _project(self._inputs(ref_hidden, chunk), ref_head, ref_logits)

    @torch.no_grad()
    def statistics(self, chunk: slice) -> RowStatistics:
        """Row statistics of the logits that `project(chunk)` has made."""
        logits, ref_logits = self._buffers(chunk)
        return row_statistics(
            logits, self._targets[chunk], with_entropy=self._with_entropy, ref_logits=ref_logits
        )

    def all_statistics(self) -> RowStatistics:
        """Statistics of all selected rows, [M]."""
        parts: list[RowStatistics] = []
        for chunk in self:
            self.project(chunk)
            parts.append(self.statistics(chunk))
        return join(parts)

    @torch.no_grad()
    def add_gradients(
        self, chunk: slice, stats: RowStatistics, upstream: RowGradients, into: HeadGradients
    ) -> None:
        """Consume the logits that `project(chunk)` has made; add to dX, dW and db."""
        logits, ref_logits = self._buffers(chunk)
        transform, weight = self._head.transform, self._head.weight
        logit_gradients_(
            logits, self._targets[chunk], stats, upstream, transform, ref_logits=ref_logits
        )
        with torch.autocast(logits.device.type, enabled=False):
            if into.hidden is not None:
                into.hidden.index_copy_(0, self._rows[chunk], _back_project(logits, weight))
            if into.weight is not None:
                into.weight.addmm_(logits.T, self._inputs(self._hidden, chunk))
        if into.bias is not None:
            into.bias.add_(logits.sum(0))

    def _buffers(self, chunk: slice) -> tuple[Tensor, Tensor | None]:
        size = chunk.stop - chunk.start
        return self._logits[:size], None if self._ref_logits is None else self._ref_logits[:size]

    def _inputs(self, hidden: Tensor, chunk: slice) -> Tensor:
        return hidden.index_select(0, self._rows[chunk]).to(self._dtype)


def _project(inputs: Tensor, head: Head, out: Tensor) -> None:
    """out [C, V] = z of inputs [C, D]."""
    for tile in vocab_tiles(head.weight.shape[0]):
        out[:, tile] = inputs @ head.weight[tile].to(inputs.dtype).T
    if head.bias is not None:
        out.add_(head.bias)
    head.transform.apply_(out)


def _back_project(grad_logits: Tensor, weight: Tensor) -> Tensor:
    """[C, V] times [V, D], accumulated over vocabulary tiles."""
    out = grad_logits.new_zeros(grad_logits.shape[0], weight.shape[1])
    for tile in vocab_tiles(weight.shape[0]):
        out.addmm_(grad_logits[:, tile], weight[tile].to(grad_logits.dtype))
    return out
