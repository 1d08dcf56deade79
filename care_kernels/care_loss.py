"""Eqs. 11-13 in one call: the CARE loss of a padded batch, from hidden states and spans.

    loss = 1/|S*| sum_{i in S*} [ - sum_t min(rho_it a_it, clip(rho_it) a_it)
                                  + 1/n_i sum_t (kl_coef KL_it - entropy_coef H_it) ]

with a_it from `token_advantages` and n_i the response tokens of sequence i. Everything is handed to
`linear_policy_loss` as a weight per token: no [B, T, V] tensor exists and hidden is not copied.

The hidden state at position t - 1 predicts token t, so the row b T + t - 1 of the flattened hidden
states belongs to token (b, t): moving the tokens' numbers leaves the hidden states where they are.

Shape letters: B sequences, T tokens, D hidden, V vocabulary.
"""

from dataclasses import dataclass, field
from typing import Any, NamedTuple, overload

import torch
from torch import Tensor, nn

from care_kernels import checks
from care_kernels.backends import compute_dtype
from care_kernels.loss import linear_policy_loss
from care_kernels.objective import KL_ESTIMATORS, Clip, Surrogate
from care_kernels.region_weights import THINK_WEIGHT, WEIGHT_EPS, token_advantages
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
    """[B, T]; None unless weighted or asked for."""
    kl: Tensor | None
    """[B, T], unweighted; None where kl_coef is 0."""
    ratio: Tensor
    """[B, T]; at sequence level every response token holds its sequence's ratio."""
    clipped_low: Tensor
    """[B, T] bool, as in `PolicyLoss`."""
    clipped_high: Tensor
    """[B, T] bool."""


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
    **options: Any,
) -> CareLossOutput:
    """Eqs. 11-13 (Sec. 3.5; Algorithm 1, lines 40-43) from hidden states, never holding [B, T, V].

    Pass hidden states and token ids of the same positions, unshifted: every [B, T] argument and
    result, and every span, indexes positions of `token_ids`. To leave most of the prompt out, slice
    them all alike, from the last prompt token on.

    Differentiable, once, with respect to hidden, head_weight and bias; everything else is a
    constant.

    Args:
        hidden: [B, T, D] final hidden states, after the last norm: bfloat16, float16 or float32
            (float64 is computed in float64). Not copied where contiguous.
        head_weight: [V, D].
        token_ids: [B, T] int, prompt and response; anything outside the response.
        advantages: [B], A of Eqs. 7-8; 0 for sequences outside S*, which then cost nothing, and for
            truncated responses that shall not train.
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
        options: the fields of `CareLoss`.

    Returns:
        `CareLossOutput`, all float32 (float64 for float64 inputs).

    Raises:
        ValueError: an argument does not fit; the message names it, what came and what was wanted.
    """
    return CareLoss(**options)(
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
    )


@dataclass(eq=False, kw_only=True)
class CareLoss(nn.Module):
    """`care_loss` with its options fixed: options here, tensors in `forward`.

    Raises:
        ValueError: an option does not fit; the message names it.
    """

    surrogate: Surrogate = field(default_factory=Clip)
    """`Clip(low, high, dual)` of Eq. 12, `Cispo` or `Sapo`."""
    think_weight: float = THINK_WEIGHT
    """gamma+ of Eq. 11."""
    weight_eps: float = WEIGHT_EPS
    """eps_w of Eq. 11."""
    kl_coef: float = 0.0
    """beta of Eq. 13, on each sequence's mean over response tokens, then over S*."""
    kl_estimator: str = "k3"
    """As in `linear_policy_loss`; "exact" needs ref_hidden."""
    entropy_coef: float = 0.0
    """Coefficient of an entropy bonus, averaged like the KL."""
    return_entropy: bool = False
    """Also return the entropy where nothing weighs it."""
    ratio_level: str = "token"
    """Or "sequence", for GSPO's exp(mean log-ratio) over the response."""
    temperature: float = 1.0
    """Divides the logits."""
    logit_softcap: float | None = None
    """z = cap * tanh(z / cap) before the temperature; None leaves it out."""
    logit_scale: float = 1.0
    """Multiplies the raw logits, before the softcap."""
    chunk_rows: int | None = None
    """Rows of logits held at a time; None: chosen."""
    backend: str | None = None
    """None, "triton" or "torch"."""

    def __post_init__(self) -> None:
        super().__init__()
        checks.check_surrogate(self.surrogate)
        checks.check_number("think_weight", self.think_weight, "0 or more", least=0)
        checks.check_number("weight_eps", self.weight_eps, "more than 0", above=0)
        checks.check_number("kl_coef", self.kl_coef, "0 or more", least=0)
        checks.check_number("entropy_coef", self.entropy_coef, "a finite number")
        if self.kl_estimator not in KL_ESTIMATORS:
            raise ValueError(f"kl_estimator: got {self.kl_estimator!r}; wanted {KL_ESTIMATORS}")
        if self.ratio_level not in checks.RATIO_LEVELS:
            wanted = checks.RATIO_LEVELS
            raise ValueError(f"ratio_level: got {self.ratio_level!r}; wanted {wanted}")
        checks.check_transform(self.temperature, self.logit_softcap, self.logit_scale)
        checks.check_chunk_rows(self.chunk_rows)

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
        importance_weights: Tensor | None = None,
        num_sequences: float | Tensor | None = None,
        ref_head_weight: Tensor | None = None,
        bias: Tensor | None = None,
        vocab_shard: VocabShard | None = None,
        weight_grad: Tensor | None = None,
    ) -> CareLossOutput:
        """Arguments, result and errors as `care_loss` has them."""
        self._check_reference_form(ref_log_probs, ref_hidden)
        _check_batch(
            hidden,
            head_weight,
            token_ids,
            advantages,
            response_mask,
            old_log_probs=old_log_probs,
            ref_log_probs=ref_log_probs,
            importance_weights=importance_weights,
        )
        _check_num_sequences(num_sequences)
        checks.check_reference(hidden, head_weight, ref_hidden, ref_head_weight)
        covers_response = self.kl_coef or self.entropy_coef or self.ratio_level == "sequence"
        if response_mask is None and covers_response:
            raise ValueError(
                "response_mask: got None; wanted [B, T], as the KL, the entropy bonus and the "
                "sequence ratio run over the whole response"
            )

        advantages = advantages.detach().to(compute_dtype(hidden, head_weight))
        credit = token_advantages(
            advantages,
            think_spans,
            answer_spans,
            is_positive,
            seq_len=hidden.shape[1],
            think_weight=self.think_weight,
            weight_eps=self.weight_eps,
            backend=self.backend,
        )
        response = credit != 0 if response_mask is None else response_mask.bool()
        vocab_size = head_weight.shape[0] if vocab_shard is None else vocab_shard.vocab_size
        _check_response(response_mask, credit, token_ids, vocab_size)
        credit = credit.masked_fill(~response, 0.0)
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
        is_sequence = self.ratio_level == "sequence"

        outcome = linear_policy_loss(
            hidden.flatten(0, 1),
            head_weight,
            _to_rows(token_ids),
            _to_rows(credit / num_sequences),
            surrogate=self.surrogate,
            old_log_probs=_to_rows(old_log_probs),
            ref_log_probs=_to_rows(ref_log_probs),
            importance_weights=_to_rows(importance_weights),
            ref_hidden=None if ref_hidden is None else ref_hidden.flatten(0, 1),
            ref_head_weight=ref_head_weight,
            kl_weights=_to_rows(self.kl_coef * mean_weights) if self.kl_coef else None,
            kl_estimator=self.kl_estimator,
            entropy_weights=(
                _to_rows(self.entropy_coef * mean_weights) if self.entropy_coef else None
            ),
            return_entropy=self.return_entropy,
            ratio_level=self.ratio_level,
            sequence_ids=_response_sequence_ids(response) if is_sequence else None,
            temperature=self.temperature,
            logit_softcap=self.logit_softcap,
            logit_scale=self.logit_scale,
            bias=bias,
            vocab_shard=vocab_shard,
            weight_grad=weight_grad,
            chunk_rows=self.chunk_rows,
            backend=self.backend,
        )
        shape = token_ids.shape
        return CareLossOutput(
            loss=outcome.loss,
            token_advantages=credit,
            log_probs=_to_tokens(outcome.log_probs, shape),
            entropy=None if outcome.entropy is None else _to_tokens(outcome.entropy, shape),
            kl=None if outcome.kl is None else _to_tokens(outcome.kl, shape),
            ratio=_to_tokens(outcome.ratio, shape, fill=1.0),
            clipped_low=_to_tokens(outcome.clipped_low, shape),
            clipped_high=_to_tokens(outcome.clipped_high, shape),
        )

    def _check_reference_form(
        self, ref_log_probs: Tensor | None, ref_hidden: Tensor | None
    ) -> None:
        """A reference exactly where there is a KL, in one of its two forms."""
        num_forms = (ref_log_probs is not None) + (ref_hidden is not None)
        if self.kl_coef and num_forms != 1:
            got = "both" if num_forms else "neither"
            raise ValueError(
                f"ref_log_probs: got {got} of ref_log_probs and ref_hidden; wanted exactly one, as "
                f"kl_coef is {self.kl_coef}"
            )
        if num_forms and not self.kl_coef:
            raise ValueError(
                f"kl_coef: got {self.kl_coef}; wanted more than 0, as a reference is given"
            )


def _check_batch(
    hidden: Tensor,
    head_weight: Tensor,
    token_ids: Tensor,
    advantages: Tensor,
    response_mask: Tensor | None,
    **per_token: Tensor | None,
) -> None:
    """Shapes, dtypes and devices; `per_token` are [B, T] floats or None."""
    checks.check_tensor("hidden", hidden, (None, None, None))
    like, shape = ("hidden", hidden), tuple(hidden.shape[:2])
    checks.check_tensor("head_weight", head_weight, (None, hidden.shape[2]), like=like)
    checks.check_tensor("token_ids", token_ids, shape, checks.INT_DTYPES, like)
    checks.check_tensor("advantages", advantages, shape[:1], like=like)
    if response_mask is not None:
        dtypes = (torch.bool, *checks.INT_DTYPES)
        checks.check_tensor("response_mask", response_mask, shape, dtypes, like)
    for name, value in per_token.items():
        if value is not None:
            checks.check_tensor(name, value, shape, like=like)


def _check_num_sequences(num_sequences: float | Tensor | None) -> None:
    if isinstance(num_sequences, Tensor):
        checks.check_tensor(
            "num_sequences", num_sequences, (), (*checks.FLOAT_DTYPES, *checks.INT_DTYPES)
        )
        if num_sequences.device.type != "cpu":
            return
    if num_sequences is not None and not num_sequences > 0:
        raise ValueError(f"num_sequences: got {float(num_sequences)}; wanted more than 0")


def _check_response(
    response_mask: Tensor | None, credit: Tensor, token_ids: Tensor, vocab_size: int
) -> None:
    """Each response token has a hidden state before it and an id; read on the CPU only."""
    if token_ids.device.type != "cpu":
        return
    has_credit = credit != 0
    response = has_credit if response_mask is None else response_mask.bool()
    if (place := checks.first_true(response[:, :1])) is not None:
        name = "think_spans, answer_spans" if response_mask is None else "response_mask"
        raise ValueError(
            f"{name}: got token 0 of row {place[0]}; wanted token 1 or later, as no hidden state "
            "predicts it"
        )
    if (place := checks.first_true(has_credit & ~response)) is not None:
        raise ValueError(
            f"response_mask: got False at token {place[1]} of row {place[0]}; wanted True, as a "
            "span gives it an advantage"
        )
    outside = response & ((token_ids < 0) | (token_ids >= vocab_size))
    if (place := checks.first_true(outside)) is not None:
        raise ValueError(
            f"token_ids: got {int(token_ids[place])} at token {place[1]} of row {place[0]}; wanted "
            f"0 to {vocab_size - 1}"
        )


@overload
def _to_rows(per_token: Tensor) -> Tensor: ...
@overload
def _to_rows(per_token: None) -> None: ...


def _to_rows(per_token: Tensor | None) -> Tensor | None:
    """[B, T] to [B * T], each token's entry moved to the row of the hidden state that predicts it.

    A sequence's last row predicts nothing here and gets 0.
    """
    if per_token is None:
        return None
    rows = torch.zeros_like(per_token, memory_format=torch.contiguous_format)
    rows[:, :-1] = per_token[:, 1:]
    return rows.flatten()


def _to_tokens(rows: Tensor, shape: torch.Size, fill: float = 0.0) -> Tensor:
    """[B * T] back to [B, T], each row's entry at the token it predicts; token 0 gets `fill`."""
    per_token = rows.new_full(shape, fill)
    per_token[:, 1:] = rows.view(shape)[:, :-1]
    return per_token


def _response_sequence_ids(response: Tensor) -> Tensor:
    """[B * T]: each response token's sequence; every other row is a sequence of its own."""
    is_row = _to_rows(response)
    rows = torch.arange(is_row.numel(), device=response.device)
    num_sequences, num_tokens = response.shape
    sequences = torch.arange(num_sequences, device=response.device).repeat_interleave(num_tokens)
    return torch.where(is_row, sequences, num_sequences + rows)
