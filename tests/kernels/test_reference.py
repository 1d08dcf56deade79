"""The oracle itself: by hand where a hand can, by finite differences elsewhere."""

import math

import pytest
import torch
from torch import Tensor

from care_kernels import Clip
from tests.kernels.cases import LEAVES, policy_case, row_vector, with_kl
from tests.kernels.oracle import (
    reference_entropy,
    reference_exact_kl,
    reference_logits,
    reference_policy_loss,
    reference_ratio,
    reference_surrogate,
)


@pytest.mark.parametrize("level", ("token", "sequence"))
@pytest.mark.parametrize("estimator", ("k1", "k2", "k3", "exact"))
def test_gradcheck(level: str, estimator: str) -> None:
    """Finite differences in float64, away from the kinks of the clip."""
    is_exact = estimator == "exact"
    case = policy_case(6, 3, 5, torch.float64, bias=True, drift=0.05)
    case = with_kl(case, estimator, from_hidden=is_exact)
    case |= {"entropy_weights": row_vector(case, 0.0, 0.1), "logit_softcap": 3.0}
    case |= {"ratio_level": level, "sequence_ids": torch.tensor([0, 1, 0, 1, 1, 2])}
    case |= {"surrogate": Clip(dual=3.0), "importance_weights": row_vector(case, 0.5, 1.5)}
    # The reference model has the policy's bias as a constant, which no finite difference respects.
    leaves = [case[name].requires_grad_(not (is_exact and name == "bias")) for name in LEAVES]

    def loss(*inputs: Tensor) -> Tensor:
        return reference_policy_loss(**(case | dict(zip(LEAVES, inputs, strict=True)))).loss

    assert torch.autograd.gradcheck(loss, leaves)


def test_logits_by_hand() -> None:
    """cap * tanh(scale * (x w + b) / cap) / temperature for one number."""
    got = reference_logits(
        torch.tensor([[2.0]], dtype=torch.float64),
        torch.tensor([[3.0]], dtype=torch.float64),
        temperature=0.5,
        logit_softcap=4.0,
        logit_scale=0.25,
        bias=torch.tensor([1.0], dtype=torch.float64),
    )
    assert got.item() == pytest.approx(4.0 * math.tanh(0.25 * 7.0 / 4.0) / 0.5)


def test_entropy_and_kl_by_hand() -> None:
    """A fair coin has entropy log 2; KL of (3/4, 1/4) from it is log 2 minus its entropy."""
    fair = torch.zeros(1, 2, dtype=torch.float64)
    biased = torch.tensor([[0.75, 0.25]], dtype=torch.float64).log()
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert reference_entropy(fair).item() == pytest.approx(math.log(2))
    assert reference_entropy(biased).item() == pytest.approx(entropy)
    assert reference_exact_kl(biased, fair).item() == pytest.approx(math.log(2) - entropy)


def test_sequence_ratio_by_hand() -> None:
    """GSPO: exp of the mean log-ratio, the same for each row of the sequence."""
    log_probs = torch.tensor([0.1, 0.3, -1.0], dtype=torch.float64)
    ratio = reference_ratio(log_probs, torch.zeros(3), torch.tensor([4, 4, 2]))
    assert ratio.tolist() == pytest.approx([math.exp(0.2), math.exp(0.2), math.exp(-1.0)])


def test_surrogate_by_hand() -> None:
    """min(rho a, clip(rho) a) on both sides of both bounds, then with the dual clip."""
    ratio = torch.tensor([0.5, 1.5, 0.5, 1.5, 4.0], dtype=torch.float64)
    advantages = torch.tensor([1.0, 1.0, -1.0, -1.0, -1.0], dtype=torch.float64)
    plain = reference_surrogate(Clip(), ratio, ratio.log(), advantages)
    assert plain.tolist() == pytest.approx([0.5, 1.28, -0.8, -1.5, -4.0])
    dual = reference_surrogate(Clip(dual=3.0), ratio, ratio.log(), advantages)
    assert dual.tolist() == pytest.approx([0.5, 1.28, -0.8, -1.5, -3.0])
