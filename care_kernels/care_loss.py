"""Eqs. 11-13 in one call: the CARE loss of a padded batch, from hidden states and spans.

    loss = 1/|S*| sum_{i in S*} [ - sum_t min(rho_it a_it, clip(rho_it) a_it)
                                  + 1/n_i sum_t (kl_coef KL_it - entropy_coef H_it) ]

with a_it from `token_advantages` and n_i the response tokens of sequence i. Everything is handed to
`linear_policy_loss` as a weight per token: no [B, T, V] tensor exists and hidden is not copied.

Shape letters: B sequences, T tokens, D hidden, V vocabulary.
"""

from dataclasses import dataclass, fields
from typing import NamedTuple

from torch import Tensor, nn

from care_kernels import _checks
from care_kernels._batch_checks import (
    check_loss_batch,
    check_loss_options,
    check_reference_form,
    check_response,
)
from care_kernels._launch import compute_dtype
from care_kernels._token_rows import response_sequence_ids, to_rows, to_tokens
from care_kernels.linear_policy_loss import linear_policy_loss
from care_kernels.region_weights import (
    THINK_WEIGHT,
    WEIGHT_EPS,
    check_region_options,
    token_advantages,
)
from care_kernels.vocab_parallel import VocabShard


class CareLossOutput(NamedTuple):
    """The loss and what each token contributed; only `loss` carries gradient.

    Tokens that were not computed read 0 in `log_probs`, `entropy` and `kl`, 1 in `ratio` and False
    in both flags. These are the tokens outside the response, those of sequences outside S*, and,
    without KL or entropy bonus, those with a token advantage of 0 (at sequence level: those of
    sequences where every token advantage is 0).
    """

    loss: Tensor
    """Scalar."""
    token_advantages: Tensor
    """[B, T], Eq. 11's a_it before the division by |S*|."""
    log_probs: Tensor
    """[B, T]."""
    entropy: Tensor | None
    """[B, T]; None where entropy_coef is 0."""
    kl: Tensor | None
    """[B, T], unweighted; None where kl_coef is 0."""
    ratio: Tensor
    """[B, T]; at sequence level every response token holds its sequence's ratio."""
    clipped_low: Tensor
    """[B, T] bool: a < 0 and the ratio under 1 - clip_eps_low."""
    clipped_high: Tensor
    """[B, T] bool: a > 0 and the ratio over 1 + clip_eps_high, or a < 0 and over dual_clip."""


def care_loss(
    hidden: Tensor,
    head_weight: Tensor,
    token_ids: Tensor,
    advantages: Tensor,
    think_spans: Tensor,
    answer_spans: Tensor,
    is_positive: Tensor,
    *,
    response_mask: Tensor | None = None,
    old_log_probs: Tensor | None = None,
    ref_log_probs: Tensor | None = None,
    ref_hidden: Tensor | None = None,
    ref_head_weight: Tensor | None = None,
    importance_weights: Tensor | None = None,
    bias: Tensor | None = None,
    num_sequences: float | Tensor | None = None,
    vocab_shard: VocabShard | None = None,
    weight_grad: Tensor | None = None,
    think_weight: float = THINK_WEIGHT,
    weight_eps: float = WEIGHT_EPS,
    kl_coef: float = 0.0,
    kl_estimator: str = "k3",
    entropy_coef: float = 0.0,
    clip_eps_low: float = 0.2,
    clip_eps_high: float = 0.28,
    dual_clip: float | None = None,
    ratio_level: str = "token",
    temperature: float = 1.0,
    logit_softcap: float | None = None,
    logit_scale: float = 1.0,
    chunk_rows: int | None = None,
    backend: str | None = None,
) -> CareLossOutput:
    """Eqs. 11-13 (Sec. 3.5; Algorithm 1, lines 40-43) from hidden states, never holding [B, T, V].

    The hidden state at position t - 1 predicts token t. Pass hidden states and token ids of the
    same positions, unshifted: every [B, T] argument and result, and every span, indexes positions
    of `token_ids`. To leave most of the prompt out, slice them all alike, from the last prompt
    token on.

    Differentiable with respect to hidden, head_weight and bias; everything else is a constant.

    Args:
        hidden: [B, T, D] final hidden states, after the last norm: bfloat16, float16 or float32
            (float64 is computed in float64). Not copied where contiguous.
        head_weight: [V, D].
        token_ids: [B, T] int, prompt and response; anything outside the response.
        advantages: [B], A of Eqs. 7-8; 0 for sequences outside S*, which then cost nothing.
        think_spans: [B, 2] int, half-open position ranges; start == end where there is none.
        answer_spans: [B, 2] int, the same. To train every token of a malformed response, pass it
            whole as the answer.
        is_positive: [B] bool, whose rationale weighs `think_weight`.
        response_mask: [B, T] bool or int, the sampled tokens; it must cover every token with an
            advantage. Required for KL, entropy and the sequence ratio, which run over the whole
            response; elsewhere None will do.
        old_log_probs: [B, T]; None: the current ones, detached, so that every ratio is 1.
        ref_log_probs: [B, T] of the reference; or give ref_hidden.
        ref_hidden: [B, T, D'] of the reference.
        ref_head_weight: [V, D']; None: head_weight, detached.
        importance_weights: [B, T] w_it >= 0, correcting for the sampler's own probabilities.
        bias: [V], finite.
        num_sequences: |S*|, a number or 0-dim tensor above 0. Pass the global count where a step
            spans ranks or micro-batches, and sum their gradients. None: the sequences of this call
            with a non-zero advantage, at least 1.
        vocab_shard: which part of the vocabulary head_weight, ref_head_weight and bias are, where
            ranks share it; the call is then a collective one.
        weight_grad: [V, D]; dW is added to it during this call instead of reaching
            head_weight.grad through the backward, as in `linear_policy_loss`.
        think_weight: gamma+ of Eq. 11.
        weight_eps: eps_w of Eq. 11.
        kl_coef: beta of Eq. 13, on each sequence's mean over response tokens, then over S*.
        kl_estimator: "k1", "k2", "k3" at the sampled token, or "exact" over the vocabulary (needs
            ref_hidden).
        entropy_coef: coefficient of an entropy bonus, averaged like the KL.
        clip_eps_low: the ratio is clipped from below at 1 - clip_eps_low.
        clip_eps_high: and from above at 1 + clip_eps_high.
        dual_clip: for a_it < 0 the ratio is also clipped at this bound > 1 (arXiv:1912.09729).
        ratio_level: "token", or "sequence" for GSPO's exp(mean log-ratio) over the response.
        temperature: divides the logits.
        logit_softcap: z = cap * tanh(z / cap) before the temperature; None leaves it out.
        logit_scale: multiplies the raw logits, before the softcap.
        chunk_rows: rows of logits held at a time; None: chosen from V.
        backend: None, "triton" or "torch".

    Returns:
        `CareLossOutput`, all float32 (float64 for float64 inputs).

    Raises:
        ValueError: an argument does not fit; the message names it, what came and what was wanted.
    """
    check_loss_options(kl_coef, kl_estimator, ratio_level)
    check_reference_form(kl_coef, ref_log_probs, ref_hidden)
    check_loss_batch(
        hidden,
        head_weight,
        token_ids,
        advantages,
        response_mask,
        num_sequences,
        ref_hidden,
        ref_head_weight,
        old_log_probs=old_log_probs,
        ref_log_probs=ref_log_probs,
        importance_weights=importance_weights,
    )
    if response_mask is None and (kl_coef or entropy_coef or ratio_level == "sequence"):
        raise ValueError(
            "response_mask: got None; wanted [B, T], as the KL, the entropy bonus and the sequence "
            "ratio run over the whole response"
        )

    advantages = advantages.detach().to(compute_dtype(hidden, head_weight))
    per_token = token_advantages(
        advantages,
        think_spans,
        answer_spans,
        is_positive,
        seq_len=hidden.shape[1],
        think_weight=think_weight,
        weight_eps=weight_eps,
        backend=backend,
    )
    response = per_token != 0 if response_mask is None else response_mask.bool()
    vocab_size = head_weight.shape[0] if vocab_shard is None else vocab_shard.vocab_size
    check_response(response_mask, per_token, token_ids, vocab_size)
    per_token = per_token.masked_fill(~response, 0.0)
    if importance_weights is not None:
        # Outside the response anything may stand, NaN included.
        importance_weights = importance_weights.masked_fill(~response, 1.0)
    is_active = advantages != 0
    if num_sequences is None:
        num_sequences = is_active.sum().clamp(min=1)
    # A token's part in the mean over its sequence's response, then over S*.
    num_response = response.sum(1, keepdim=True).clamp(min=1)
    mean_weights = (response & is_active[:, None]) / num_response.to(advantages.dtype)
    mean_weights = mean_weights / num_sequences

    outcome = linear_policy_loss(
        hidden.flatten(0, 1),
        head_weight,
        to_rows(token_ids),
        to_rows(per_token / num_sequences),
        old_log_probs=to_rows(old_log_probs),
        ref_log_probs=to_rows(ref_log_probs),
        ref_hidden=None if ref_hidden is None else ref_hidden.flatten(0, 1),
        ref_head_weight=ref_head_weight,
        kl_weights=to_rows(kl_coef * mean_weights) if kl_coef else None,
        kl_estimator=kl_estimator,
        entropy_weights=to_rows(entropy_coef * mean_weights) if entropy_coef else None,
        clip_eps_low=clip_eps_low,
        clip_eps_high=clip_eps_high,
        dual_clip=dual_clip,
        ratio_level=ratio_level,
        sequence_ids=response_sequence_ids(response) if ratio_level == "sequence" else None,
        importance_weights=to_rows(importance_weights),
        temperature=temperature,
        logit_softcap=logit_softcap,
        logit_scale=logit_scale,
        bias=bias,
        vocab_shard=vocab_shard,
        weight_grad=weight_grad,
        chunk_rows=chunk_rows,
        backend=backend,
    )
    shape = token_ids.shape
    return CareLossOutput(
        loss=outcome.loss,
        token_advantages=per_token,
        log_probs=to_tokens(outcome.log_probs, shape),
        entropy=None if outcome.entropy is None else to_tokens(outcome.entropy, shape),
        kl=None if outcome.kl is None else to_tokens(outcome.kl, shape),
        ratio=to_tokens(outcome.ratio, shape, fill=1.0),
        clipped_low=to_tokens(outcome.clipped_low, shape),
        clipped_high=to_tokens(outcome.clipped_high, shape),
    )


@dataclass(eq=False, kw_only=True)
class CareLoss(nn.Module):
    """`care_loss` with its options fixed: options here, tensors in `forward`.

    Raises:
        ValueError: an option does not fit; the message names it.
    """

    think_weight: float = THINK_WEIGHT
    weight_eps: float = WEIGHT_EPS
    kl_coef: float = 0.0
    kl_estimator: str = "k3"
    entropy_coef: float = 0.0
    clip_eps_low: float = 0.2
    clip_eps_high: float = 0.28
    dual_clip: float | None = None
    ratio_level: str = "token"
    temperature: float = 1.0
    logit_softcap: float | None = None
    logit_scale: float = 1.0
    chunk_rows: int | None = None
    backend: str | None = None

    def __post_init__(self) -> None:
        super().__init__()
        check_region_options(self.think_weight, self.weight_eps)
        check_loss_options(self.kl_coef, self.kl_estimator, self.ratio_level)
        _checks.check_clip(self.clip_eps_low, self.clip_eps_high, self.dual_clip)
        _checks.check_transform(self.temperature, self.logit_softcap)
        _checks.check_chunk_rows(self.chunk_rows)

    def forward(
        self,
        hidden: Tensor,
        head_weight: Tensor,
        token_ids: Tensor,
        advantages: Tensor,
        think_spans: Tensor,
        answer_spans: Tensor,
        is_positive: Tensor,
        *,
        response_mask: Tensor | None = None,
        old_log_probs: Tensor | None = None,
        ref_log_probs: Tensor | None = None,
        ref_hidden: Tensor | None = None,
        ref_head_weight: Tensor | None = None,
        importance_weights: Tensor | None = None,
        bias: Tensor | None = None,
        num_sequences: float | Tensor | None = None,
        vocab_shard: VocabShard | None = None,
        weight_grad: Tensor | None = None,
    ) -> CareLossOutput:
        """Arguments, result and errors as `care_loss` has them."""
        return care_loss(
            hidden,
            head_weight,
            token_ids,
            advantages,
            think_spans,
            answer_spans,
            is_positive,
            response_mask=response_mask,
            old_log_probs=old_log_probs,
            ref_log_probs=ref_log_probs,
            ref_hidden=ref_hidden,
            ref_head_weight=ref_head_weight,
            importance_weights=importance_weights,
            bias=bias,
            num_sequences=num_sequences,
            vocab_shard=vocab_shard,
            weight_grad=weight_grad,
            **{option.name: getattr(self, option.name) for option in fields(self)},
        )
