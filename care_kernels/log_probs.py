"""Log-probs and entropies of sampled tokens straight from hidden states and the head.

One GEMM without gradients. With them the backward makes each chunk's logits again: four GEMMs in
all, in exchange for accepting any loss on top.

Shape letters: N rows, D hidden, V vocabulary.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from care_kernels import checks
from care_kernels.backends import Head, resolve_backend
from care_kernels.chunks import HeadChunks, largest_power_of_two, under_autocast
from care_kernels.softmax import LogitTransform, RowGradients, RowStatistics, take
from care_kernels.vocab_parallel import VocabShard


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
    return_log_normalizer: bool = False,
    vocab_shard: VocabShard | None = None,
    chunk_rows: int | None = None,
    backend: str | None = None,
) -> Any:
    """log softmax(z)[target] with z = softcap * tanh(scale * (x W^T + b) / softcap) / temperature.

    Differentiable with respect to hidden, head_weight and bias. Never holds [N, V]. The backward
    reads head_weight again, so a partitioned weight must stay gathered until then; it skips the
    rows whose upstream gradients are zero. Under autocast float32 operands are multiplied in its
    dtype, as `nn.Linear` would.

    Args:
        hidden: [N, D] bfloat16, float16 or float32 (float64 is computed in float64).
        head_weight: [V, D], any of these dtypes.
        target_ids: [N] int, in [0, V); on CUDA, where they are not read, one outside gives NaN.
        temperature: divides the logits; the sampler's temperature.
        logit_softcap: bound of the tanh; None leaves it out.
        logit_scale: multiplies the raw logits.
        bias: [V], finite.
        return_entropy: also return each row's entropy.
        return_log_normalizer: also return each row's log sum exp of z, without gradient: the
            `old_log_normalizer` of `linear_policy_loss`.
        vocab_shard: which part of the vocabulary head_weight and bias are, where ranks share it;
            forward and backward are then collective calls.
        chunk_rows: rows of logits held at a time; None: `care_kernels.chunks.chunk_rows` chooses.
        backend: None: chosen by device; "triton" or "torch".

    Returns:
        log_probs [N] float32, or a tuple of it, the entropy and the log-normaliser as asked for.

    Raises:
        ValueError: an argument does not fit; the message names it.
    """
    checks.check_head(hidden, head_weight, target_ids, bias)
    backend = resolve_backend(backend, hidden.device)
    checks.check_targets(target_ids, head_weight, vocab_shard)
    checks.check_transform(temperature, logit_softcap, logit_scale)
    checks.check_chunk_rows(chunk_rows)
    transform = LogitTransform(temperature, logit_softcap, logit_scale)
    options = _Options(transform, chunk_rows, backend, vocab_shard, return_entropy)
    log_probs, entropy, log_normalizer = LinearLogProbs.apply(
        hidden, head_weight, bias, target_ids, options
    )
    wanted = (True, return_entropy, return_log_normalizer)
    results = (log_probs, entropy, log_normalizer)
    picked = tuple(result for result, is_wanted in zip(results, wanted, strict=True) if is_wanted)
    return picked if len(picked) > 1 else log_probs


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
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """Return log-probs [N], entropies [N] if asked for, and log-normalisers [N]."""
        inputs, weight = under_autocast(hidden), under_autocast(head_weight)
        # The backward runs outside the autocast, and multiplies what the forward did.
        ctx.operand_dtypes = inputs.dtype, weight.dtype
        is_known = (target_ids >= 0) & (target_ids < _vocab_size(head_weight, options))
        target_ids = target_ids.where(is_known, 0)
        chunks = _chunks(
            inputs,
            Head(weight, bias, options.transform),
            target_ids,
            torch.arange(hidden.shape[0], device=hidden.device),
            options,
        )
        stats = chunks.all_statistics()
        ctx.save_for_backward(hidden, head_weight, bias, target_ids, *stats)
        ctx.options, ctx.head_shape = options, head_weight.shape
        log_normalizer = stats.max_logit + stats.log_total
        ctx.mark_non_differentiable(log_normalizer)
        log_probs = stats.log_probs.masked_fill(~is_known, torch.nan)
        return log_probs, stats.entropy, log_normalizer

    @staticmethod
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, grad_log_probs: Tensor, grad_entropy: Tensor | None, _: None
    ) -> tuple[Tensor | None, ...]:
        """dX, dW and db, from the same logits made again."""
        checks.check_no_graph("linear_log_probs")
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
        inputs, weight = hidden.to(ctx.operand_dtypes[0]), head_weight.to(ctx.operand_dtypes[1])
        chunks = _chunks(
            inputs,
            Head(weight, bias, options.transform),
            target_ids,
            rows,
            options,
            wanted=ctx.needs_input_grad[:3],
            gradient_scale=(
                largest_power_of_two(*upstream) if inputs.dtype == torch.float16 else 1.0
            ),
        )
        gradients = chunks.new_gradients(head_weight.dtype)
        for chunk in chunks:
            chunks.project(chunk, keep=True)
            picked = rows[chunk]
            chunks.add_gradients(chunk, take(stats, picked), take(upstream, picked), gradients)
        pairs = (
            (gradients.hidden, hidden),
            (gradients.weight, head_weight),
            (gradients.bias, bias),
        )
        return *(None if grad is None else grad.to(x.dtype) for grad, x in pairs), None, None


def _chunks(
    inputs: Tensor, head: Head, target_ids: Tensor, rows: Tensor, options: _Options, **more: Any
) -> HeadChunks:
    return HeadChunks(
        inputs,
        head,
        target_ids,
        rows,
        options.chunk_rows,
        options.backend,
        with_entropy=options.with_entropy,
        vocab_shard=options.vocab_shard,
        **more,
    )


def _vocab_size(head_weight: Tensor, options: _Options) -> int:
    shard = options.vocab_shard
    return head_weight.shape[0] if shard is None else shard.vocab_size


def _rows_with_gradient(upstream: RowGradients) -> Tensor:
    has_gradient = upstream.log_probs != 0
    if upstream.entropy is not None:
        has_gradient = has_gradient | (upstream.entropy != 0)
    return has_gradient.nonzero()[:, 0]
