"""Log-probs and entropies of sampled tokens straight from hidden states and the head.

One GEMM without gradients. With them the backward makes each chunk's logits again: four GEMMs in
all, in exchange for accepting any loss on top.

Shape letters: N rows, D hidden, V vocabulary.
"""

from dataclasses import dataclass
from typing import Any, Literal, overload

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from care_kernels import _checks
from care_kernels._head_chunks import HeadChunks
from care_kernels._launch import resolve_backend
from care_kernels._logit_chunk import Head
from care_kernels._records import take
from care_kernels.row_softmax import LogitTransform, RowGradients, RowStatistics
from care_kernels.vocab_parallel import VocabShard


@overload
def linear_log_probs(
    hidden: Tensor,
    head_weight: Tensor,
    target_ids: Tensor,
    *,
    temperature: float = 1.0,
    logit_softcap: float | None = None,
    logit_scale: float = 1.0,
    bias: Tensor | None = None,
    return_entropy: Literal[False] = False,
    vocab_shard: VocabShard | None = None,
    chunk_rows: int | None = None,
    backend: str | None = None,
) -> Tensor: ...


@overload
def linear_log_probs(
    hidden: Tensor,
    head_weight: Tensor,
    target_ids: Tensor,
    *,
    temperature: float = 1.0,
    logit_softcap: float | None = None,
    logit_scale: float = 1.0,
    bias: Tensor | None = None,
    return_entropy: Literal[True],
    vocab_shard: VocabShard | None = None,
    chunk_rows: int | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]: ...


def linear_log_probs(
    hidden: Tensor,
    head_weight: Tensor,
    target_ids: Tensor,
    *,
    temperature: float = 1.0,
    logit_softcap: float | None = None,
    logit_scale: float = 1.0,
    bias: Tensor | None = None,
    return_entropy: bool = False,
    vocab_shard: VocabShard | None = None,
    chunk_rows: int | None = None,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """log softmax(z)[target] with z = softcap * tanh(scale * (x W^T + b) / softcap) / temperature.

    Differentiable with respect to hidden, head_weight and bias. Never holds [N, V]. The backward
    reads head_weight again, so a partitioned weight must stay gathered until then; it skips the
    rows whose upstream gradients are zero.

    Args:
        hidden: [N, D] bfloat16, float16 or float32 (float64 is computed in float64).
        head_weight: [V, D], any of these dtypes.
        target_ids: [N] int, in [0, V).
        temperature: divides the logits; the sampler's temperature.
        logit_softcap: bound of the tanh; None leaves it out.
        logit_scale: multiplies the raw logits.
        bias: [V], finite.
        return_entropy: also return each row's entropy.
        vocab_shard: which part of the vocabulary head_weight and bias are, where ranks share it;
            forward and backward are then collective calls.
        chunk_rows: rows of logits held at a time; None: chosen from V.
        backend: None: chosen by device; "triton" or "torch".

    Returns:
        log_probs [N] float32, or (log_probs, entropy) both [N] float32.

    Raises:
        ValueError: an argument does not fit; the message names it.
    """
    backend = resolve_backend(backend, hidden.device)
    _checks.check_head(hidden, head_weight, target_ids, bias)
    _checks.check_targets_in_vocabulary(target_ids, head_weight, vocab_shard)
    _checks.check_transform(temperature, logit_softcap)
    _checks.check_chunk_rows(chunk_rows)
    transform = LogitTransform(temperature, logit_softcap, logit_scale)
    options = _Options(transform, chunk_rows, backend, vocab_shard, return_entropy)
    log_probs, entropy = LinearLogProbs.apply(hidden, head_weight, bias, target_ids, options)
    return (log_probs, entropy) if return_entropy else log_probs


@dataclass(frozen=True)
class _Options:
    transform: LogitTransform
    chunk_rows: int | None
    backend: str
    vocab_shard: VocabShard | None
    with_entropy: bool


class LinearLogProbs(torch.autograd.Function):
    """Forward: statistics of every chunk. Backward: the same chunks again, then dX, dW and db."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        head_weight: Tensor,
        bias: Tensor | None,
        target_ids: Tensor,
        options: _Options,
    ) -> tuple[Tensor, Tensor | None]:
        """Return log-probs [N] and, if asked for, entropies [N]."""
        head = Head(head_weight, bias, options.transform)
        rows = torch.arange(hidden.shape[0], device=hidden.device)
        chunks = HeadChunks(
            hidden,
            head,
            target_ids,
            rows,
            options.chunk_rows,
            options.backend,
            with_entropy=options.with_entropy,
            vocab_shard=options.vocab_shard,
        )
        stats = chunks.all_statistics()
        ctx.save_for_backward(hidden, head_weight, bias, target_ids, *stats)
        ctx.options, ctx.head_shape = options, head_weight.shape
        return stats.log_probs, stats.entropy

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, grad_log_probs: Tensor, grad_entropy: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        """dX, dW and db, from the same logits made again."""
        hidden, head_weight, bias, target_ids, *saved = ctx.saved_tensors
        options: _Options = ctx.options
        if head_weight.shape != ctx.head_shape:
            raise RuntimeError(
                f"head_weight: got shape {tuple(head_weight.shape)} in the backward; wanted "
                f"{tuple(ctx.head_shape)}: keep a partitioned weight gathered until then"
            )
        stats = RowStatistics(*saved)
        upstream = RowGradients(grad_log_probs, grad_entropy if stats.entropy is not None else None)
        rows = _rows_with_gradient(upstream)
        head = Head(head_weight, bias, options.transform)
        chunks = HeadChunks(
            hidden,
            head,
            target_ids,
            rows,
            options.chunk_rows,
            options.backend,
            with_entropy=stats.entropy is not None,
            with_gradients=True,
            vocab_shard=options.vocab_shard,
        )
        gradients = chunks.new_gradients(ctx.needs_input_grad[:3])
        for chunk in chunks:
            chunks.project(chunk)
            picked = rows[chunk]
            chunks.add_gradients(chunk, take(stats, picked), take(upstream, picked), gradients)
        pairs = (
            (gradients.hidden, hidden),
            (gradients.weight, head_weight),
            (gradients.bias, bias),
        )
        return *(None if grad is None else grad.to(x.dtype) for grad, x in pairs), None, None


def _rows_with_gradient(upstream: RowGradients) -> Tensor:
    has_gradient = upstream.log_probs != 0
    if upstream.entropy is not None:
        has_gradient = has_gradient | (upstream.entropy != 0)
    return has_gradient.nonzero()[:, 0]
