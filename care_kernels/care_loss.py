"""Eqs. 11-13 in one call: the CARE loss of a padded batch, from hidden states and spans.

    loss = 1/|S*| sum_{i in S*} [ - sum_t min(rho_it a_it, clip(rho_it) a_it)
                                  + 1/n_i sum_t (kl_coef KL_it - entropy_coef H_it) ]

with a_it from `token_advantages` and n_i the response tokens of sequence i. Everything is handed to
`linear_policy_loss` as a weight per token: no [B, T, V] tensor exists and hidden is not copied.

The hidden state at position t - 1 predicts token t, so the row b T + t - 1 of the flattened hidden
states belongs to token (b, t): moving the tokens' numbers leaves the hidden states where they are.

Shape letters: B sequences, T tokens, D hidden, V vocabulary.
"""

from typing import Any

import torch
from torch import Tensor, nn

from care_kernels import checks
from care_kernels.backends import compute_dtype
from care_kernels.loss import linear_policy_loss
from care_kernels.objective import SKIPPED_ROW, PolicyLoss
from care_kernels.region_weights import THINK_WEIGHT, WEIGHT_EPS, token_advantages
from care_kernels.vocab_parallel import VocabShard


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
    num_sequences: float | Tensor | None = None,
    think_weight: float = THINK_WEIGHT,
    weight_eps: float = WEIGHT_EPS,
    kl_coef: float = 0.0,
    entropy_coef: float = 0.0,
    ratio_level: str = "token",
    vocab_shard: VocabShard | None = None,
    backend: str | None = None,
    **options: Any,
) -> PolicyLoss:
    """Eqs. 11-13 (Sec. 3.5; Algorithm 1, lines 40-43) from hidden states, never holding [B, T, V].

    Pass hidden states and token ids of the same positions, unshifted: every [B, T] argument and
    result, and every span, indexes positions of `token_ids`. To leave most of the prompt out, slice
    them all alike, from the last prompt token on.

    Differentiable, once, with respect to hidden, head_weight and bias; everything else is a
    constant. Arguments that are not named below are as `linear_policy_loss` takes them, with [B, T]
    in place of [N].

    Args:
        hidden: [B, T, D] final hidden states, after the last norm. Not copied where contiguous.
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
        num_sequences: |S*|, a number or 0-dim tensor above 0. Pass the global count where a step
            spans ranks or micro-batches, and sum their gradients. None: the sequences of this call
            with a non-zero advantage, at least 1.
        think_weight: gamma+ of Eq. 11.
        weight_eps: eps_w of Eq. 11.
        kl_coef: beta of Eq. 13, on each sequence's mean over response tokens, then over S*.
        entropy_coef: coefficient of an entropy bonus, averaged like the KL.
        ratio_level: "token", or "sequence" for GSPO's exp(mean log-ratio) over the response.
        options: surrogate, kl_estimator, return_entropy, temperature, logit_softcap, logit_scale,
            bias, weight_grad and chunk_rows of `linear_policy_loss`.

    Returns:
        `PolicyLoss` with [B, T] fields, `token_advantages` among them. Tokens that were not
        computed read as its skipped rows do: those outside the response, those of sequences outside
        S*, and, without KL or entropy bonus, those with a token advantage of 0 (at sequence level:
        those of sequences where every token advantage is 0).

    Raises:
        ValueError: an argument does not fit; the message names it, what came and what was wanted.
    """
    checks.check_options(kl_coef=kl_coef, entropy_coef=entropy_coef)
    if not kl_coef and not (ref_log_probs is None and ref_hidden is None):
        raise checks.wrong("kl_coef", kl_coef, "more than 0, as a reference is given")
    shapes = checks.Shapes()
    shapes.check("B T D", hidden=hidden)
    shapes.check("V D", head_weight=head_weight)
    shapes.check("B T", checks.INT_DTYPES, token_ids=token_ids)
    shapes.check("B", advantages=advantages)
    shapes.check_given("B T", (torch.bool, *checks.INT_DTYPES), response_mask=response_mask)
    shapes.check_given(
        "B T",
        old_log_probs=old_log_probs,
        ref_log_probs=ref_log_probs,
        importance_weights=importance_weights,
    )
    _check_num_sequences(num_sequences, shapes)
    shapes.check_given("V E", ref_head_weight=ref_head_weight)
    shapes.check_given("B T D" if ref_head_weight is None else "B T E", ref_hidden=ref_hidden)
    if response_mask is None and (kl_coef or entropy_coef or ratio_level == "sequence"):
        wanted = "[B, T], as KL, entropy bonus and sequence ratio run over the whole response"
        raise checks.wrong("response_mask", None, wanted)

    advantages = advantages.detach().to(compute_dtype(hidden, head_weight))
    credit = token_advantages(
        advantages,
        think_spans,
        answer_spans,
        is_positive,
        seq_len=token_ids.shape[1],
        think_weight=think_weight,
        weight_eps=weight_eps,
        backend=backend,
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

    outcome = linear_policy_loss(
        hidden.flatten(0, 1),
        head_weight,
        _to_rows(token_ids),
        _to_rows(credit / num_sequences),
        old_log_probs=_to_rows(old_log_probs),
        ref_log_probs=_to_rows(ref_log_probs),
        importance_weights=_to_rows(importance_weights),
        ref_hidden=None if ref_hidden is None else ref_hidden.flatten(0, 1),
        ref_head_weight=ref_head_weight,
        kl_weights=_to_rows(kl_coef * mean_weights) if kl_coef else None,
        entropy_weights=_to_rows(entropy_coef * mean_weights) if entropy_coef else None,
        ratio_level=ratio_level,
        sequence_ids=_response_sequence_ids(response) if ratio_level == "sequence" else None,
        vocab_shard=vocab_shard,
        backend=backend,
        **options,
    )
    per_token = [
        None if rows is None else _to_tokens(rows, token_ids.shape, fill)
        for rows, fill in zip(outcome[1:], SKIPPED_ROW[1:], strict=True)
    ]
    return outcome._make([outcome.loss, *per_token])._replace(token_advantages=credit)


class CareLoss(nn.Module):
    """`care_loss` with its options fixed: options here, tensors in the call.

    Raises:
        ValueError: an option does not fit; the message names it.
    """

    def __init__(self, **options: Any) -> None:
        """Take any option of `care_loss` that is no tensor."""
        super().__init__()
        checks.check_options(**options)
        self.options = options

    def extra_repr(self) -> str:
        """The options, as they were given."""
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())

    def forward(self, *tensors: Tensor, **keywords: Any) -> PolicyLoss:
        """Arguments, result and errors as `care_loss` has them."""
        return care_loss(*tensors, **keywords, **self.options)


def _check_num_sequences(num_sequences: float | Tensor | None, shapes: checks.Shapes) -> None:
    if isinstance(num_sequences, Tensor):
        dtypes = (*checks.FLOAT_DTYPES, *checks.INT_DTYPES)
        is_read = num_sequences.device.type == "cpu"  # a number to tensors of any device
        (checks.Shapes() if is_read else shapes).check("", dtypes, num_sequences=num_sequences)
        if not is_read:
            return
    if num_sequences is not None and not num_sequences > 0:
        raise checks.wrong("num_sequences", float(num_sequences), "more than 0")


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
        wanted = "token 1 or later, as no hidden state predicts it"
        raise checks.wrong(name, f"token 0 of row {place[0]}", wanted)
    if (place := checks.first_true(has_credit & ~response)) is not None:
        got = f"False at token {place[1]} of row {place[0]}"
        raise checks.wrong("response_mask", got, "True, as a span gives it an advantage")
    outside = response & ((token_ids < 0) | (token_ids >= vocab_size))
    if (place := checks.first_true(outside)) is not None:
        got = f"{int(token_ids[place])} at token {place[1]} of row {place[0]}"
        raise checks.wrong("token_ids", got, f"0 to {vocab_size - 1}")


def _to_rows(per_token: Tensor | None) -> Any:
    """[B, T] to [B * T], each token's entry moved to the row of the hidden state that predicts it.

    A sequence's last row predicts nothing here and gets 0.
    """
    if per_token is None:
        return None
    rows = torch.zeros_like(per_token, memory_format=torch.contiguous_format)
    rows[:, :-1] = per_token[:, 1:]
    return rows.flatten()


def _to_tokens(rows: Tensor, shape: torch.Size, fill: float) -> Tensor:
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
