"""Eqs. 4 and 11-13 in plain torch: the oracle.

Full logits, autograd for every gradient, any dtype. Written from the equations, and sharing with
what it checks only the records of a surrogate's numbers and of a loss's results; meant for float64,
small shapes and tests.

Shape letters: N rows, B sequences, T tokens, D hidden, V vocabulary.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from care_kernels.objective import Cispo, Clip, PolicyLoss, Sapo, Surrogate


def reference_logits(
    hidden: Tensor,
    head_weight: Tensor,
    *,
    temperature: float = 1.0,
    logit_softcap: float | None = None,
    logit_scale: float = 1.0,
    bias: Tensor | None = None,
) -> Tensor:
    """[N, V] logits: cap * tanh(scale * (x W^T + b) / cap) / temperature."""
    logits = torch.nn.functional.linear(hidden, head_weight, bias) * logit_scale
    if logit_softcap is not None:
        logits = logit_softcap * torch.tanh(logits / logit_softcap)
    return logits / temperature


def reference_log_probs(logits: Tensor, target_ids: Tensor) -> Tensor:
    """[N] log-probs of the targets."""
    return torch.log_softmax(logits, -1).gather(-1, target_ids.long().unsqueeze(-1)).squeeze(-1)


def reference_entropy(logits: Tensor) -> Tensor:
    """[N] entropies, in nats."""
    log_p = torch.log_softmax(logits, -1)
    return -(log_p.exp() * log_p).sum(-1)


def reference_exact_kl(logits: Tensor, ref_logits: Tensor) -> Tensor:
    """[N] KL[pi || ref], summed over the vocabulary; the reference is a constant."""
    log_p = torch.log_softmax(logits, -1)
    log_q = torch.log_softmax(ref_logits.detach(), -1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def reference_sampled_kl(estimator: str, log_probs: Tensor, ref_log_probs: Tensor) -> Tensor:
    """[N] k1, k2 or k3 estimate of KL[pi || ref] at the sampled token; k3 also for k3_unbiased.

    With r = pi_ref(y) / pi(y): k1 = -log r, k2 = (log r)^2 / 2, k3 = (r - 1) - log r.
    Source: http://joschu.net/blog/kl-approx.html
    """
    log_r = ref_log_probs.detach() - log_probs
    k3 = (log_r.exp() - 1) - log_r
    estimates = {"k1": -log_r, "k2": 0.5 * log_r**2, "k3": k3, "k3_unbiased": k3}
    return estimates[estimator]


def reference_ratio(
    log_probs: Tensor, old_log_probs: Tensor | None, sequence_ids: Tensor | None = None
) -> Tensor:
    """[N] pi / pi_old of each token; with sequence ids GSPO's, exp(mean log-ratio), repeated."""
    old = log_probs if old_log_probs is None else old_log_probs
    log_ratio = log_probs - old.detach()
    if sequence_ids is None:
        return log_ratio.exp()
    means = log_ratio
    for sequence in sequence_ids.unique():
        member = sequence_ids == sequence
        means = torch.where(member, log_ratio[member].mean(), means)
    return means.exp()


def reference_surrogate(
    surrogate: Surrogate, ratio: Tensor, log_probs: Tensor, advantages: Tensor
) -> Tensor:
    """[N] summands of the surrogate, for autograd to differentiate.

    Sources: paper Eq. 12 with the dual clip of arXiv:1912.09729; arXiv:2506.13585, Eq. 4 (CISPO);
    arXiv:2511.20347, Eqs. 5-6 (SAPO).
    """
    if isinstance(surrogate, Cispo):
        weight = ratio.detach().clamp(surrogate.min_ratio, surrogate.max_ratio)
        return weight * advantages * log_probs
    if isinstance(surrogate, Sapo):
        tau = torch.full_like(ratio, surrogate.negative_temperature)
        tau[advantages > 0] = surrogate.positive_temperature
        return 4 / tau * torch.sigmoid(tau * (ratio - 1)) * advantages
    clipped = ratio.clamp(1 - surrogate.low, 1 + surrogate.high)
    value = torch.minimum(ratio * advantages, clipped * advantages)
    if surrogate.dual is None:
        return value
    return torch.where(advantages < 0, torch.maximum(value, surrogate.dual * advantages), value)


def reference_flags(
    surrogate: Surrogate, ratio: Tensor, advantages: Tensor
) -> tuple[Tensor, Tensor]:
    """[N] bool each: where the surrogate's lower and upper bound take effect."""
    if isinstance(surrogate, Cispo):
        return ratio < surrogate.min_ratio, ratio > surrogate.max_ratio
    if isinstance(surrogate, Sapo):
        return torch.zeros_like(ratio, dtype=torch.bool), torch.zeros_like(ratio, dtype=torch.bool)
    too_high = (advantages > 0) & (ratio > 1 + surrogate.high)
    if surrogate.dual is not None:
        too_high = too_high | ((advantages < 0) & (ratio > surrogate.dual))
    return (advantages < 0) & (ratio < 1 - surrogate.low), too_high


def reference_policy_loss(
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
    surrogate: Surrogate = Clip(),  # noqa: B008  a frozen record
    ratio_level: str = "token",
    sequence_ids: Tensor | None = None,
    importance_weights: Tensor | None = None,
    temperature: float = 1.0,
    logit_softcap: float | None = None,
    logit_scale: float = 1.0,
    bias: Tensor | None = None,
) -> PolicyLoss:
    """What `linear_policy_loss` promises, with every row computed.

    Arguments as there, all in one dtype; the result is in that dtype, and in the autograd graph.
    """

    def logits_of(inputs: Tensor, weight: Tensor) -> Tensor:
        return reference_logits(
            inputs,
            weight,
            temperature=temperature,
            logit_softcap=logit_softcap,
            logit_scale=logit_scale,
            bias=bias,
        )

    logits = logits_of(hidden, head_weight)
    log_probs = reference_log_probs(logits, target_ids)
    ratio = reference_ratio(
        log_probs, old_log_probs, sequence_ids if ratio_level == "sequence" else None
    )
    value = reference_surrogate(surrogate, ratio, log_probs, advantages)
    if importance_weights is not None:
        value = importance_weights * value
    entropy = reference_entropy(logits)
    loss = -value.sum()
    if entropy_weights is not None:
        loss = loss - (entropy_weights * entropy).sum()
    kl: Tensor | None = None
    if kl_weights is not None:
        exact = None
        if ref_hidden is not None:
            ref_logits = logits_of(
                ref_hidden, head_weight if ref_head_weight is None else ref_head_weight
            )
            ref_log_probs = reference_log_probs(ref_logits, target_ids)
            exact = reference_exact_kl(logits, ref_logits)
        if kl_estimator == "exact":
            kl = exact
        else:
            assert ref_log_probs is not None
            kl = reference_sampled_kl(kl_estimator, log_probs, ref_log_probs)
            if kl_estimator == "k3_unbiased":
                kl = ratio * kl
        assert kl is not None
        loss = loss + (kl_weights * kl).sum()
    flags = reference_flags(surrogate, ratio, advantages)
    return PolicyLoss(loss, log_probs, entropy, kl, ratio, *flags)


def reference_token_advantages(
    advantages: Tensor,
    think_spans: Tensor,
    answer_spans: Tensor,
    is_positive: Tensor,
    seq_lens: Sequence[int],
    *,
    think_weight: float = 0.005,
    weight_eps: float = 1e-8,
) -> list[Tensor]:
    """Eq. 11, token by token: a [T_i] float64 vector for each sequence.

    Arguments as in `think_answer_regions` and `token_advantages`, with the sequences' lengths.
    """
    per_sequence = []
    for i, seq_len in enumerate(seq_lens):
        weights = []
        for t in range(seq_len):
            if answer_spans[i, 0] <= t < answer_spans[i, 1]:
                weights.append(1.0)
            elif think_spans[i, 0] <= t < think_spans[i, 1]:
                weights.append(think_weight if is_positive[i] else 0.0)
            else:
                weights.append(0.0)
        total = sum(weights) + weight_eps
        per_token = [float(advantages[i]) * weight / total for weight in weights]
        per_sequence.append(torch.tensor(per_token, dtype=torch.float64))
    return per_sequence


def reference_rationale_distance(
    hidden: Sequence[Tensor], think_spans: Tensor, anchors: Tensor
) -> Tensor:
    """Eq. 4, sequence by sequence: [B] float64.

    Arguments as in `rationale_distance`, with a [T_i, D] tensor for each sequence.
    """
    embeddings = []
    for states, (start, end) in zip(hidden, think_spans.tolist(), strict=True):
        embedding = torch.zeros(states.shape[1], dtype=torch.float64)
        for t in range(start, end):
            embedding = embedding + states[t].double() / (end - start)
        length = embedding.dot(embedding).sqrt()
        embeddings.append(embedding / length if length > 0 else embedding)
    distances = [1 - float(embeddings[i].dot(embeddings[a])) for i, a in enumerate(anchors)]
    return torch.tensor(distances, dtype=torch.float64)
