"""Batches of sequences for `care_loss`."""

from collections.abc import Callable

import torch
from torch import Tensor

from care_kernels import PolicyLoss
from tests.kernels.cases import Case, Run, leaves_of
from tests.kernels.oracle import reference_log_probs, reference_logits

B, T, D, V = 5, 14, 8, 23
PROMPT_LENS = (3, 1, 5, 2, 4)
RESPONSE_LENS = (11, 8, 7, 10, 6)


def make_case(dtype: torch.dtype = torch.float32, *, seed: int = 0, bias: bool = False) -> Case:
    """Prompt, rationale, answer, EOS and padding in each row.

    Row 2 is outside S*, row 3 has no rationale, and row 4 is a negative without an answer, so that
    none of its tokens has an advantage. Whatever must not be read is NaN or no token id.
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
    b, t = response.nonzero(as_tuple=True)
    logits = reference_logits(case["hidden"][b, t - 1].double(), case["head_weight"].double())
    drifted = torch.full((B, T), torch.nan, dtype=torch.float64)
    drifted[b, t] = reference_log_probs(logits, case["token_ids"][b, t]) + 0.3 * normal(len(b))
    row_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    case["old_log_probs"] = drifted.to(row_dtype)
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


def run(case: Case, function: Callable[[Case], PolicyLoss]) -> Run:
    """The loss on fresh leaves, and their gradients."""
    leaves = leaves_of(case)
    outcome = function(case | leaves)
    outcome.loss.backward()
    return outcome, {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}
