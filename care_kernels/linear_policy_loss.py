"""The whole policy loss of Eqs. 12-13 straight from hidden states and the head.

    loss = sum_i [ -w_i min(rho_i a_i, clip(rho_i, 1 - clip_eps_low, 1 + clip_eps_high) a_i)
                   + kl_weights_i KL_i - entropy_weights_i H_i ]

A scalar loss receives a scalar upstream gradient, so the gradients are made in the forward, while
a chunk's logits are at hand, and only scaled in the backward: three GEMMs (logits, dX, dW). A
sequence-level ratio needs the log-probs of whole sequences first, which costs a fourth.

Shape letters: N rows (one sampled token each), M rows that reach a GEMM, D hidden, V vocabulary.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from care_kernels import _checks
from care_kernels._launch import compute_dtype, resolve_backend
from care_kernels._logit_chunk import Head
from care_kernels._policy_sweep import PolicyProblem, RowTerms, active_rows, evaluate
from care_kernels.objective import ClipRange
from care_kernels.row_softmax import LogitTransform
from care_kernels.vocab_parallel import VocabShard


class PolicyLoss(NamedTuple):
    """The loss and what each row contributed; only `loss` carries gradient.

    Rows that were skipped (see `linear_policy_loss`) read 0 in `log_probs`, `entropy` and `kl`, 1
    in `ratio` and False in both flags, unless `report_all_rows` asks for them.
    """

    loss: Tensor
    """Scalar, the sum over rows."""
    log_probs: Tensor
    """[N]."""
    entropy: Tensor | None
    """[N]; None without entropy_weights."""
    kl: Tensor | None
    """[N], unweighted; None without kl_weights."""
    ratio: Tensor
    """[N]; at sequence level every row holds its sequence's ratio."""
    clipped_low: Tensor
    """[N] bool: a < 0 and the ratio under 1 - clip_eps_low."""
    clipped_high: Tensor
    """[N] bool: a > 0 and the ratio over 1 + clip_eps_high, or a < 0 and it is over dual_clip."""


def linear_policy_loss(
    hidden: Tensor,
    head_weight: Tensor,
    target_ids: Tensor,
    advantages: Tensor,
    *,
    old_log_probs: Tensor | None = None,
    ref_log_probs: Tensor | None = None,
    ref_hidden: Tensor | None = None,
    ref_head_weight: Tensor | None = None,
    kl_weights: Tensor | None = None,
    kl_estimator: str = "k3",
    entropy_weights: Tensor | None = None,
    clip_eps_low: float = 0.2,
    clip_eps_high: float = 0.28,
    dual_clip: float | None = None,
    ratio_level: str = "token",
    sequence_ids: Tensor | None = None,
    importance_weights: Tensor | None = None,
    temperature: float = 1.0,
    logit_softcap: float | None = None,
    logit_scale: float = 1.0,
    bias: Tensor | None = None,
    report_all_rows: bool = False,
    vocab_shard: VocabShard | None = None,
    weight_grad: Tensor | None = None,
    chunk_rows: int | None = None,
    backend: str | None = None,
) -> PolicyLoss:
    """Eq. 12's clipped surrogate plus Eq. 13's KL and an entropy bonus, never holding [N, V].

    Differentiable with respect to hidden, head_weight and bias; everything else is a constant.
    A sum, not a mean: put 1/|S*| and any other normaliser into advantages and weights. A bfloat16
    gradient is rounded where its GEMM ends, and again by an upstream gradient that is no power of
    two.

    Rows with a_i w_i = 0 and no KL or entropy weight change nothing and never reach a GEMM. At
    sequence level that holds only for a sequence whose rows are all so. A skipped row may hold any
    target id. Finding them is the call's one host synchronisation on CUDA.

    Args:
        hidden: [N, D] bfloat16, float16 or float32 (float64 is computed in float64).
        head_weight: [V, D]; frozen, its gradient is not computed. Not kept for the backward.
        target_ids: [N] int, the sampled tokens.
        advantages: [N], Eq. 11's a_it, already divided by its normaliser.
        old_log_probs: [N]; None: the current ones, detached, so that every ratio is 1.
        ref_log_probs: [N] of the reference; or give ref_hidden.
        ref_hidden: [N, D'] of the reference; temperature, softcap, scale and bias are the policy's.
        ref_head_weight: [V, D']; None: head_weight, detached.
        kl_weights: [N], each row's coefficient of KL[pi || ref]; None: no KL.
        kl_estimator: "k1", "k2", "k3" at the sampled token, or "exact" over the vocabulary
            (needs ref_hidden).
        entropy_weights: [N], each row's coefficient of the entropy; None: not computed.
        clip_eps_low: the ratio is clipped from below at 1 - clip_eps_low.
        clip_eps_high: and from above at 1 + clip_eps_high.
        dual_clip: for a_i < 0 the ratio is also clipped at this bound > 1 (arXiv:1912.09729).
        ratio_level: "token", or "sequence" for GSPO's exp(mean log-ratio) of each sequence.
        sequence_ids: [N] int, which sequence a row belongs to; rows need not be adjacent.
        importance_weights: [N] w_i >= 0, correcting for the sampler's own probabilities; None: 1.
        temperature: divides the logits.
        logit_softcap: z = cap * tanh(z / cap) before the temperature; None leaves it out.
        logit_scale: multiplies the raw logits, before the softcap.
        bias: [V], finite.
        report_all_rows: also compute the statistics of the rows that change nothing, one GEMM for
            them; loss and gradients are the same, bit for bit.
        vocab_shard: which part of the vocabulary head_weight, ref_head_weight and bias are, where
            ranks share it; the call is then a collective one.
        weight_grad: [V, D], any floating dtype: dW is added to it during this call instead of
            reaching head_weight.grad through the backward, whose upstream gradient it does not see.
            Also where head_weight needs no gradient itself; not under no_grad.
            For gradient accumulation without a second [V, D] buffer.
        chunk_rows: rows of logits held at a time; None: at most 4096, and 512 MiB of float32 logits
            on a CPU, 1 GiB elsewhere.
        backend: None: chosen by device; "triton" or "torch".

    Returns:
        `PolicyLoss`, all float32 (float64 for float64 inputs).

    Raises:
        ValueError: an argument does not fit; the message names it, what came and what was wanted.
    """
    backend = resolve_backend(backend, hidden.device)
    _checks.check_head(hidden, head_weight, target_ids, bias)
    _checks.check_transform(temperature, logit_softcap)
    _checks.check_chunk_rows(chunk_rows)
    _checks.check_clip(clip_eps_low, clip_eps_high, dual_clip)
    _checks.check_ratio_level(ratio_level, sequence_ids)
    _checks.check_kl(kl_estimator, kl_weights, ref_log_probs, ref_hidden, ref_head_weight)
    _checks.check_row_constants(
        hidden,
        advantages=advantages,
        old_log_probs=old_log_probs,
        ref_log_probs=ref_log_probs,
        kl_weights=kl_weights,
        entropy_weights=entropy_weights,
        importance_weights=importance_weights,
    )
    _checks.check_rows("sequence_ids", sequence_ids, hidden, _checks.INT_DTYPES)
    _checks.check_not_negative("importance_weights", importance_weights)
    _checks.check_reference(hidden, head_weight, ref_hidden, ref_head_weight)
    if weight_grad is not None:
        _checks.check_weight_grad(weight_grad, head_weight)

    problem = PolicyProblem(
        target_ids=target_ids,
        terms=_row_terms(
            compute_dtype(hidden, head_weight),
            advantages,
            importance_weights,
            old_log_probs,
            ref_log_probs,
            kl_weights,
            entropy_weights,
        ),
        transform=LogitTransform(temperature, logit_softcap, logit_scale),
        clip=ClipRange(clip_eps_low, clip_eps_high, dual_clip),
        kl_estimator=kl_estimator,
        sequence_ids=sequence_ids if ratio_level == "sequence" else None,
        ref_hidden=None if ref_hidden is None else ref_hidden.detach(),
        ref_head_weight=None if ref_head_weight is None else ref_head_weight.detach(),
        chunk_rows=chunk_rows,
        backend=backend,
        report_all_rows=report_all_rows,
        vocab_shard=vocab_shard,
        weight_grad=weight_grad,
    )
    rows = active_rows(problem.terms, problem.sequence_ids)
    _checks.check_targets_in_vocabulary(
        target_ids if report_all_rows else target_ids[rows], head_weight, vocab_shard
    )
    # The Function itself always runs without grad mode, so it has to be told.
    grad_mode = torch.is_grad_enabled()
    return PolicyLoss(*LinearPolicyLoss.apply(hidden, head_weight, bias, problem, rows, grad_mode))


class LinearPolicyLoss(torch.autograd.Function):
    """Forward: the loss and its gradients. Backward: scale them by the upstream gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        head_weight: Tensor,
        bias: Tensor | None,
        problem: PolicyProblem,
        rows: Tensor,
        grad_mode: bool,
    ) -> tuple[Tensor | None, ...]:
        """Return the fields of `PolicyLoss`."""
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        # The caller's own buffer is filled even where head_weight is a detached copy.
        needs_weight = needs_weight or problem.weight_grad is not None
        wanted = tuple(grad_mode and needed for needed in (needs_hidden, needs_weight, needs_bias))
        head = Head(head_weight, bias, problem.transform)
        loss, outcome, gradients = evaluate(hidden, head, problem, rows, wanted)
        if gradients is not None:
            # In compute precision: a loss scale must reach a gradient before float16 rounds it.
            # What went into the caller's own buffer is not autograd's to hand on.
            weight = None if problem.weight_grad is not None else gradients.weight
            ctx.save_for_backward(gradients.hidden, weight, gradients.bias)
            ctx.dtypes = [None if x is None else x.dtype for x in (hidden, head_weight, bias)]
        per_row = outcome[1:]
        ctx.mark_non_differentiable(*(field for field in per_row if field is not None))
        return loss, *per_row

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, upstream: Tensor, *_: Tensor
    ) -> tuple[Tensor | None, ...]:
        """dX, dW and db of the forward, times the upstream gradient of the loss."""
        # Looking at a CUDA scalar would stall the device; scaling there costs next to nothing.
        is_one = upstream.device.type == "cpu" and upstream.item() == 1
        grads = (
            None if grad is None else (grad if is_one else grad * upstream).to(dtype)
            for grad, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        )
        return *grads, None, None, None


def _row_terms(
    dtype: torch.dtype,
    advantages: Tensor,
    importance_weights: Tensor | None,
    *others: Tensor | None,
) -> RowTerms:
    """The row constants detached and in compute precision, the importance weights moved inside."""

    def constant(value: Tensor | None) -> Tensor | None:
        return None if value is None else value.detach().to(dtype)

    weighted_advantages = advantages.detach().to(dtype)
    if importance_weights is not None:
        weighted_advantages = weighted_advantages * importance_weights.detach().to(dtype)
    return RowTerms(weighted_advantages, *(constant(value) for value in others))
