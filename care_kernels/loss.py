"""The whole policy loss of Eqs. 12-13 straight from hidden states and the head.

    loss = sum_i [ -w_i min(rho_i a_i, clip(rho_i, 1 - low, 1 + high) a_i)
                   + kl_weights_i KL_i - entropy_weights_i H_i ]

A scalar loss receives a scalar upstream gradient, so the gradients are made in the forward, while
a chunk's logits are at hand, and only scaled in the backward: three GEMMs (logits, dX, dW). A
sequence-level ratio needs the log-probs of whole sequences first, which costs a fourth.

Shape letters: N rows (one sampled token each), M rows that reach a GEMM, D hidden, V vocabulary.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from care_kernels import checks
from care_kernels.backends import compute_dtype, resolve_backend, uncompiled
from care_kernels.chunks import (
    NOTHING,
    HeadChunks,
    Inputs,
    SweepOptions,
    Wanted,
    autocast_dtype,
)
from care_kernels.objective import (
    SKIPPED_ROW,
    Clip,
    PolicyLoss,
    RowTerms,
    SequenceGroups,
    Surrogate,
    row_objective,
)
from care_kernels.softmax import LogitTransform, join, take
from care_kernels.vocab_parallel import VocabShard


@uncompiled
def linear_policy_loss(
    hidden: Tensor,
    head_weight: Tensor,
    target_ids: Tensor,
    advantages: Tensor,
    *,
    surrogate: Surrogate = Clip(),  # noqa: B008  a frozen record
    old_log_probs: Tensor | None = None,
    old_log_normalizer: Tensor | None = None,
    ref_log_probs: Tensor | None = None,
    ref_hidden: Tensor | None = None,
    ref_head_weight: Tensor | None = None,
    kl_weights: Tensor | None = None,
    kl_estimator: str = "k3",
    entropy_weights: Tensor | None = None,
    return_entropy: bool = False,
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

    Differentiable, once, with respect to hidden, head_weight and bias; everything else is a
    constant. The backward hands its gradients over and keeps none: a second one over the same graph
    is an error. A sum, not a mean: put 1/|S*| and any other normaliser into advantages and weights.
    A bfloat16 gradient is rounded when the sum of its chunks ends, and again by an upstream
    gradient that is no power of two.

    Rows with a_i w_i = 0 and no KL or entropy weight change nothing and never reach a GEMM. At
    sequence level that holds only for a sequence whose rows are all so. A skipped row may hold any
    target id. Finding them, and ids outside the vocabulary, are the call's only host
    synchronisations on CUDA, but for float16's, one a chunk.

    Under autocast float32 operands are multiplied in its dtype, as `nn.Linear` would; statistics
    and sums stay float32.

    Args:
        hidden: [N, D] bfloat16, float16 or float32 (float64 is computed in float64).
        head_weight: [V, D], of these dtypes; no gradient is computed where it is frozen. Not kept
            for the backward.
        target_ids: [N] int, the sampled tokens.
        advantages: [N], Eq. 11's a_it, already divided by its normaliser.
        surrogate: `Clip(low, high, dual)` of Eq. 12, `Cispo` or `Sapo`.
        old_log_probs: [N]; None: the current ones, detached, so that every ratio is 1.
        old_log_normalizer: [N] float32, the old policy's log sum exp of the same rows
            (`linear_log_probs(..., return_log_normalizer=True)`). A GPU then anchors its
            exponentials there, which saves a pass over them (bfloat16, without entropy bonus,
            exact KL, softcap and bias gradient); a row whose normaliser has moved by more than 60
            nats since becomes NaN. Elsewhere it is not read.
        ref_log_probs: [N] of the reference; or give ref_hidden.
        ref_hidden: [N, D'] of the reference; temperature, softcap, scale and bias are the policy's.
        ref_head_weight: [V, D']; None: head_weight, detached.
        kl_weights: [N], each row's coefficient of KL[pi || ref]; None: no KL.
        kl_estimator: "k1", "k2", "k3" at the sampled token, "k3_unbiased" (the ratio times k3,
            differentiated through both), or "exact" over the vocabulary (needs ref_hidden).
        entropy_weights: [N], each row's coefficient of the entropy; None: no bonus.
        return_entropy: also return the entropy where nothing weighs it.
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
        chunk_rows: rows of logits held at a time; None: `care_kernels.chunks.chunk_rows` chooses.
        backend: None: chosen by device; "triton" or "torch".

    Returns:
        `PolicyLoss`, all float32 (float64 for float64 inputs).

    Raises:
        ValueError: an argument does not fit; the message names it, what came and what was wanted.
    """
    shapes = checks.check_head(hidden, head_weight, target_ids, bias)
    backend = resolve_backend(backend, hidden.device)
    checks.check_options(
        temperature=temperature,
        logit_softcap=logit_softcap,
        logit_scale=logit_scale,
        chunk_rows=chunk_rows,
        surrogate=surrogate,
        kl_estimator=kl_estimator,
        ratio_level=ratio_level,
    )
    checks.check_kl(kl_estimator, kl_weights, ref_log_probs, ref_hidden, ref_head_weight)
    shapes.check("N", advantages=advantages)
    shapes.check_given(
        "N",
        old_log_probs=old_log_probs,
        old_log_normalizer=old_log_normalizer,
        ref_log_probs=ref_log_probs,
        kl_weights=kl_weights,
        entropy_weights=entropy_weights,
        importance_weights=importance_weights,
    )
    shapes.check_given("N", checks.INT_DTYPES, sequence_ids=sequence_ids)
    if ratio_level == "token":
        sequence_ids = None
    elif sequence_ids is None:
        raise checks.wrong("sequence_ids", None, "[N] ids, for ratio_level 'sequence'")
    checks.check_not_negative("importance_weights", importance_weights)
    shapes.check_given("V E", ref_head_weight=ref_head_weight)
    shapes.check_given("N D" if ref_head_weight is None else "N E", ref_hidden=ref_hidden)
    shapes.check_given("V D", weight_grad=weight_grad)
    if weight_grad is not None and weight_grad.requires_grad:
        raise checks.wrong("weight_grad", "a tensor that requires grad", "a plain buffer")

    dtype = compute_dtype(hidden, head_weight)

    def constant(vector: Tensor | None) -> Any:
        return None if vector is None else vector.detach().to(dtype)

    constants = (old_log_probs, ref_log_probs, kl_weights, entropy_weights, old_log_normalizer)
    terms = RowTerms(*map(constant, (advantages, *constants)))
    if importance_weights is not None:
        terms = terms._replace(advantages=terms.advantages * constant(importance_weights))
    reference = None
    if ref_hidden is not None:
        ref_weight = head_weight if ref_head_weight is None else ref_head_weight
        reference = ref_hidden.detach(), ref_weight.detach()
    problem = _Problem(
        target_ids,
        terms,
        SweepOptions(
            LogitTransform(temperature, logit_softcap, logit_scale),
            chunk_rows,
            backend,
            vocab_shard,
            with_entropy=return_entropy or entropy_weights is not None,
            autocast=autocast_dtype(hidden.device),
        ),
        surrogate,
        kl_estimator,
        sequence_ids,
        reference,
        weight_grad,
    )
    rows = active_rows(terms, sequence_ids)
    checks.check_targets(
        target_ids if report_all_rows else target_ids[rows], head_weight, vocab_shard, read=True
    )
    inputs = (hidden, head_weight, bias)
    # The Function itself always runs without grad mode, so it has to be told.
    loss, *found = LinearPolicyLoss.apply(*inputs, problem, rows, torch.is_grad_enabled())
    parts: list[tuple[Tensor, Any]] = [(rows, found)]
    if report_all_rows:
        others = torch.ones(len(hidden), dtype=torch.bool, device=rows.device)
        rest = others.index_fill_(0, rows, False).nonzero()[:, 0]
        parts.append((rest, problem.evaluate(inputs, rest)[0][1:]))
    return PolicyLoss(loss, *_spread(parts, len(hidden)))


def active_rows(terms: RowTerms, sequence_ids: Tensor | None) -> Tensor:
    """Indices [M] of the rows with a say: an advantage, a KL weight or an entropy weight.

    With sequence ids a row also has a say in its neighbours' ratio, so sequences stay whole.
    """
    active = terms.advantages != 0
    for weights in (terms.kl_weights, terms.entropy_weights):
        if weights is not None:
            active = active | (weights != 0)
    if sequence_ids is not None:
        groups = SequenceGroups.from_ids(sequence_ids)
        active = groups.sum(active.to(terms.advantages.dtype)) > 0
    return active.nonzero()[:, 0]


def _spread(parts: list[tuple[Tensor, Any]], num_rows: int) -> Iterator[Any]:
    """Each field of `PolicyLoss` behind the loss, from what some rows brought to all [N]."""
    for index, fill in enumerate(SKIPPED_ROW[1:]):
        full = None
        for rows, fields in parts:
            if (field := fields[index]) is not None:
                full = field.new_full((num_rows,), fill) if full is None else full
                full.index_copy_(0, rows, field)
        yield full


@dataclass(frozen=True)
class _Problem:
    """One call's constants: everything but hidden, head weight and bias."""

    target_ids: Tensor
    terms: RowTerms
    options: SweepOptions
    surrogate: Surrogate
    kl_estimator: str
    sequence_ids: Tensor | None
    """[N], given where the ratio is a sequence's."""
    reference: tuple[Tensor, Tensor] | None
    """Hidden states [N, D'] and head weight [V, D'] of the reference."""
    weight_grad: Tensor | None

    @torch.no_grad()
    def evaluate(
        self, inputs: Inputs, rows: Tensor, wanted: Wanted = NOTHING
    ) -> tuple[PolicyLoss, list[Tensor | None]]:
        """What the rows [M] bring, and dX, dW and db as wanted; without any, one GEMM."""
        terms, reference = take(self.terms, rows), self.reference
        if reference is not None and self.kl_estimator != "exact":
            options = replace(self.options, with_entropy=False)
            sampled = HeadChunks((*reference, inputs[2]), self.target_ids, rows, options)
            log_probs = sampled.all_statistics().log_probs.to(terms.advantages.dtype)
            terms, reference = terms._replace(ref_log_probs=log_probs), None
        # Entropy bonus, exact KL and softcap need the logits again, a bias gradient sums without
        # the rows' factors, and a shard's own share may vanish.
        can_anchor = (
            terms.entropy_weights is None
            and reference is None
            and self.options.transform.softcap is None
            and not wanted[2]
            and self.options.vocab_shard is None
        )
        chunks = HeadChunks(
            inputs,
            self.target_ids,
            rows,
            self.options,
            wanted=wanted,
            weight_grad=self.weight_grad,
            anchor=terms.old_log_normalizer if can_anchor else None,
            reference=reference,
        )
        return self._sweep(chunks, terms, rows), chunks.gradients

    def _sweep(self, chunks: HeadChunks, terms: RowTerms, rows: Tensor) -> PolicyLoss:
        """One pass over the chunks, or two where a chunk's gradients need whole sequences first."""
        options, groups = (self.surrogate, self.kl_estimator), None
        if self.sequence_ids is not None:
            groups = SequenceGroups.from_ids(self.sequence_ids.index_select(0, rows))
        ratio_is_known = terms.old_log_probs is None and self.kl_estimator != "k3_unbiased"
        if groups is not None and not ratio_is_known:
            stats = chunks.all_statistics()
            outcome, upstream = row_objective(stats, terms, *options, groups=groups)
            if chunks.makes_gradients:
                chunks.add_all_gradients(stats, upstream)
            return outcome
        shared = None
        if groups is not None:
            # The policy is the old one: s is 1 whatever the log-probs are.
            ones, zeros = torch.ones_like(terms.advantages), torch.zeros_like(terms.advantages)
            shared = groups.mean(-self.surrogate(ones, zeros, terms.advantages).along_ratio)
        outcomes: list[PolicyLoss] = []
        for chunk in chunks:
            stats = chunks.project(chunk, keep=chunks.makes_gradients)
            slope = None if shared is None else shared[chunk]
            part = take(terms, chunk)
            outcome, upstream = row_objective(stats, part, *options, along_ratio=slope)
            outcomes.append(outcome)
            if chunks.makes_gradients:
                chunks.add_gradients(chunk, stats, upstream)
        return join(outcomes)


class LinearPolicyLoss(torch.autograd.Function):
    """Forward: the loss and its gradients. Backward: scale them by the upstream gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        head_weight: Tensor,
        bias: Tensor | None,
        problem: _Problem,
        rows: Tensor,
        grad_mode: bool,
    ) -> tuple[Tensor | None, ...]:
        """`PolicyLoss` at the rows [M]; a skipped row does not even change the order of its sum."""
        needed, inputs = list(ctx.needs_input_grad[:3]), (hidden, head_weight, bias)
        # The caller's own buffer is filled even where head_weight is a detached copy.
        needed[1] |= problem.weight_grad is not None
        wanted = tuple(grad_mode and is_needed for is_needed in needed)
        outcome, gradients = problem.evaluate(inputs, rows, wanted)
        if problem.weight_grad is not None:
            # What went into the caller's own buffer is not autograd's to hand on.
            gradients[1] = None
        ctx.dtypes = [None if x is None else x.dtype for x in inputs]
        # A loss scale must reach a gradient before float16 rounds it.
        ctx.gradients = [
            grad if grad is None or dtype == torch.float16 else grad.to(dtype)
            for grad, dtype in zip(gradients, ctx.dtypes, strict=True)
        ]
        ctx.mark_non_differentiable(*(field for field in outcome[1:] if field is not None))
        return outcome.loss.sum(), *outcome[1:]

    @staticmethod
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, upstream: Tensor, *_: Tensor
    ) -> tuple[Tensor | None, ...]:
        """dX, dW and db of the forward, times the upstream gradient of the loss, in place."""
        checks.check_no_graph("linear_policy_loss")
        if ctx.gradients is None:
            raise RuntimeError(
                "linear_policy_loss: a second backward over the same graph, whose gradients the "
                "first handed over; call the loss again instead of retain_graph=True"
            )
        held, ctx.gradients = ctx.gradients, None
        # Looking at a CUDA scalar would stall the device; scaling there costs next to nothing.
        is_one = upstream.device.type == "cpu" and upstream.item() == 1
        grads = (
            None if grad is None else (grad if is_one else grad.mul_(upstream)).to(dtype)
            for grad, dtype in zip(held, ctx.dtypes, strict=True)
        )
        return *grads, None, None, None
