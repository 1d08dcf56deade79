"""Log-probs and entropies of sampled tokens straight from hidden states and the head.

One GEMM without gradients. With them the backward makes each chunk's logits again: four GEMMs in
all, in exchange for accepting any loss on top.

Shape letters: N rows, D hidden, V vocabulary.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from care_kernels import checks
from care_kernels.backends import resolve_backend, uncompiled
from care_kernels.chunks import HeadChunks, SweepOptions, autocast_dtype
from care_kernels.softmax import LogitTransform, RowGradients, RowStatistics, take
from care_kernels.vocab_parallel import VocabShard

Gathered = Callable[..., AbstractContextManager[Any]]


@uncompiled
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
    gathered: Gathered | None = None,
    backend: str | None = None,
) -> Any:
    """log softmax(z)[target] with z = softcap * tanh(scale * (x W^T + b) / softcap) / temperature.

    Differentiable with respect to hidden, head_weight and bias. Never holds [N, V]. The backward
    reads head_weight again, so a partitioned weight must stay gathered until then, or be gathered
    by `gathered`; it skips the rows whose upstream gradients are zero. Under autocast float32
    operands are multiplied in its dtype, as `nn.Linear` would. Arguments that are not named below
    are as `linear_policy_loss` takes them.

    Args:
        hidden: [N, D].
        head_weight: [V, D].
        target_ids: [N] int, in [0, V); on CUDA, where they are not read, one outside gives NaN.
        return_entropy: also return each row's entropy.
        return_log_normalizer: also return each row's log sum exp of z, without gradient: the
            `old_log_normalizer` of `linear_policy_loss`.
        gathered: called with head_weight and bias in the backward, a context within which
            partitioned parameters (ZeRO-3) are whole.

    Returns:
        log_probs [N] float32 (float64 for float64 inputs), or a tuple of it, the entropy and the
        log-normaliser as asked for.

    Raises:
        ValueError: an argument does not fit; the message names it.
    """
    checks.check_head(hidden, head_weight, target_ids, bias)
    backend = resolve_backend(backend, hidden.device)
    checks.check_targets(target_ids, head_weight, vocab_shard)
    checks.check_options(
        temperature=temperature,
        logit_softcap=logit_softcap,
        logit_scale=logit_scale,
        chunk_rows=chunk_rows,
    )
    transform = LogitTransform(temperature, logit_softcap, logit_scale)
    autocast = autocast_dtype(hidden.device)
    options = SweepOptions(transform, chunk_rows, backend, vocab_shard, return_entropy, autocast)
    log_probs, entropy, log_normalizer = LinearLogProbs.apply(
        hidden, head_weight, bias, target_ids, options, gathered
    )
    more = ((entropy, return_entropy), (log_normalizer, return_log_normalizer))
    asked_for = [result for result, is_asked in more if is_asked]
    return (log_probs, *asked_for) if asked_for else log_probs


class LinearLogProbs(torch.autograd.Function):
    """Forward: statistics of every chunk. Backward: the same chunks again, then dX, dW and db."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        head_weight: Tensor,
        bias: Tensor | None,
        target_ids: Tensor,
        options: SweepOptions,
        gathered: Gathered | None,
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """Log-probs [N], entropies [N] where asked for, and log-normalisers [N]."""
        shard = options.vocab_shard
        vocab_size = len(head_weight) if shard is None else shard.vocab_size
        is_known = (target_ids >= 0) & (target_ids < vocab_size)
        target_ids = target_ids.where(is_known, 0)
        rows = torch.arange(len(hidden), device=hidden.device)
        inputs = (hidden, head_weight, bias)
        stats = HeadChunks(inputs, target_ids, rows, options).all_statistics()
        ctx.save_for_backward(*inputs, target_ids, *stats)
        ctx.options, ctx.gathered, ctx.head_shape = options, gathered, head_weight.shape
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
        stats = RowStatistics(*saved)
        upstream = RowGradients(grad_log_probs, grad_entropy if stats.entropy is not None else None)
        has_gradient = torch.stack([field != 0 for field in upstream if field is not None]).any(0)
        rows = has_gradient.nonzero()[:, 0]
        with nullcontext() if ctx.gathered is None else ctx.gathered(head_weight, bias):
            if head_weight.shape != ctx.head_shape:
                raise RuntimeError(
                    f"head_weight: got shape {tuple(head_weight.shape)} in the backward; wanted "
                    f"{tuple(ctx.head_shape)}: keep a partitioned weight gathered until then, or "
                    "give `gathered`"
                )
            inputs = (hidden, head_weight, bias)
            wanted = ctx.needs_input_grad[:3]
            chunks = HeadChunks(inputs, target_ids, rows, ctx.options, wanted=wanted)
            chunks.add_all_gradients(take(stats, rows), take(upstream, rows))
        pairs = zip(chunks.gradients, inputs, strict=True)
        return *(None if grad is None else grad.to(x.dtype) for grad, x in pairs), None, None, None
