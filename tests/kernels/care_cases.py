"""Batches for the tests of `care_loss`, and the equations themselves in float64."""

from typing import Any

import torch
from torch import Tensor

from care_kernels import Clip, PolicyLoss, care_loss
from tests.kernels.cases import cast
from tests.kernels.oracle import (
    reference_entropy,
    reference_exact_kl,
    reference_flags,
    reference_log_probs,
    reference_logits,
    reference_ratio,
    reference_sampled_kl,
    reference_surrogate,
    reference_token_advantages,
)

B, T, D, V = 5, 14, 8, 23
LEAVES = ("hidden", "head_weight", "bias")
PER_TOKEN = ("log_probs", "entropy", "kl", "ratio")
PROMPT_LENS = (3, 1, 5, 2, 4)
RESPONSE_LENS = (11, 8, 7, 10, 6)

Case = dict[str, Any]


def make_case(dtype: torch.dtype = torch.float32, *, seed: int = 0, bias: bool = False) -> Case:
    """Prompt, rationale, answer, EOS and padding in each row.

    Row 2 is outside S*, row 3 has no rationale, and row 4 is a negative without an answer, so that
    none of its tokens has an advantage.

    Whatever must not be read is NaN or no token id.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    starts, lengths = torch.tensor(PROMPT_LENS), torch.tensor(RESPONSE_LENS)
    positions = torch.arange(T)
    response = (positions >= starts[:, None]) & (positions < (starts + lengths)[:, None])
    case: Case = {
        "hidden": normal(B, T, D).to(dtype),
        "head_weight": (0.7 * normal(V, D)).to(dtype),
        "token_ids": torch.randint(V, (B, T), generator=generator).masked_fill(~response, -100),
        "advantages": torch.tensor([2.0, -0.5, 0.0, -0.25, -0.4]),
        "think_spans": torch.stack((starts + 1, starts + 4), 1),
        "answer_spans": torch.stack((starts + 5, starts + lengths - 1), 1),
        "is_positive": torch.tensor([True, False, True, True, False]),
        "response_mask": response,
    }
    case["think_spans"][3] = 0
    if bias:
        case["bias"] = (0.5 * normal(V)).to(dtype)
    row_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    drifted = torch.zeros(B, T, dtype=torch.float64)
    for b, t in response.nonzero().tolist():
        logits = reference_logits(case["hidden"][b, t - 1].double(), case["head_weight"].double())
        drifted[b, t] = torch.log_softmax(logits, 0)[case["token_ids"][b, t]]
    drifted += 0.3 * normal(B, T)
    case["old_log_probs"] = drifted.masked_fill(~response, torch.nan).to(row_dtype)
    return case


def with_kl(case: Case, estimator: str) -> Case:
    """Add a reference; hidden states and a head of its own for "k1" and "exact"."""
    generator = torch.Generator().manual_seed(5)
    dtype = case["hidden"].dtype
    added: Case = {"kl_coef": 0.3, "kl_estimator": estimator}
    if estimator in ("k1", "exact"):
        noise = torch.randn(B, T, D, generator=generator)
        weight_noise = torch.randn(V, D, generator=generator)
        added["ref_hidden"] = (case["hidden"] + 0.2 * noise).to(dtype)
        added["ref_head_weight"] = (case["head_weight"] + 0.1 * weight_noise).to(dtype)
    else:
        noise = torch.randn(B, T, generator=generator)
        added["ref_log_probs"] = case["old_log_probs"] + 0.2 * noise
    return case | added


def transcription(case: Case, dtype: torch.dtype = torch.float64) -> PolicyLoss:
    """Eqs. 11-13 sequence by sequence and token by token, autograd for every gradient."""
    case = {name: cast(value, dtype) for name, value in case.items()}
    transform = ("temperature", "logit_softcap", "logit_scale", "bias")
    options = {name: case[name] for name in transform if name in case}
    credit = reference_token_advantages(
        *(case[name] for name in ("advantages", "think_spans", "answer_spans", "is_positive")),
        [T] * B,
        **{name: case[name] for name in ("think_weight", "weight_eps") if name in case},
    )
    active = [i for i in range(B) if case["advantages"][i] != 0]
    num_sequences = case.get("num_sequences", max(len(active), 1))
    empty = torch.zeros(B, T, dtype=dtype)
    out = {name: empty.clone() for name in PER_TOKEN} | {"ratio": empty + 1}
    loss = empty.sum()
    for i in active:
        (tokens,) = case["response_mask"][i].nonzero(as_tuple=True)
        logits = reference_logits(case["hidden"][i, tokens - 1], case["head_weight"], **options)
        log_probs = reference_log_probs(logits, case["token_ids"][i, tokens])
        old = case.get("old_log_probs")
        is_sequence = case.get("ratio_level") == "sequence"
        ids = torch.zeros_like(tokens) if is_sequence else None
        ratio = reference_ratio(log_probs, None if old is None else old[i, tokens], ids)
        surrogate = reference_surrogate(
            case.get("surrogate", Clip()), ratio, log_probs, credit[i][tokens].to(dtype)
        )
        if "importance_weights" in case:
            surrogate = surrogate * case["importance_weights"][i, tokens]
        kl = torch.zeros_like(log_probs)
        if "ref_hidden" in case:
            weight = case.get("ref_head_weight", case["head_weight"]).detach()
            ref_logits = reference_logits(case["ref_hidden"][i, tokens - 1], weight, **options)
            kl = reference_exact_kl(logits, ref_logits)
            if case["kl_estimator"] != "exact":
                ref = reference_log_probs(ref_logits, case["token_ids"][i, tokens])
                kl = reference_sampled_kl(case["kl_estimator"], log_probs, ref)
        elif "ref_log_probs" in case:
            ref = case["ref_log_probs"][i, tokens]
            kl = reference_sampled_kl(case["kl_estimator"], log_probs, ref)
        entropy = reference_entropy(logits)
        regulariser = case.get("kl_coef", 0) * kl.mean()
        regulariser = regulariser - case.get("entropy_coef", 0) * entropy.mean()
        loss = loss + (regulariser - surrogate.sum()) / num_sequences
        for name, value in zip(PER_TOKEN, (log_probs, entropy, kl, ratio), strict=True):
            out[name][i, tokens] = value.detach()
    credit = torch.stack(credit)
    low, high = reference_flags(case.get("surrogate", Clip()), out["ratio"], credit)
    return PolicyLoss(loss, **out, clipped_low=low, clipped_high=high, token_advantages=credit)


def run(case: Case, function: Any) -> tuple[PolicyLoss, dict[str, Tensor]]:
    """The loss on fresh leaves, and their gradients."""
    leaves = {name: case[name].detach().requires_grad_() for name in LEAVES if name in case}
    outcome = function(case | leaves)
    outcome.loss.backward()
    return outcome, {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}


def ours(case: Case) -> PolicyLoss:
    return care_loss(**case)
