"""The per-token maths and the oracle itself, by hand."""

import math

import pytest
import torch
from torch import Tensor

from care_kernels.objective import Cispo, Clip, Sapo, Surrogate, SurrogateRows, sampled_kl
from tests.kernels.cases import assert_same
from tests.kernels.oracle import (
    reference_entropy,
    reference_exact_kl,
    reference_logits,
    reference_ratio,
    reference_surrogate,
)


def double(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def at_ratio(surrogate: Surrogate, ratio: float, advantage: float) -> SurrogateRows:
    return surrogate(double(ratio), double(-1.0), double(advantage))


@pytest.mark.parametrize(
    ("ratio", "advantage", "value", "grad", "flag"),
    (
        (1.27, 2.0, 2.54, 2.54, ""),
        (1.29, 2.0, 2.56, 0.0, "high"),
        (0.5, 2.0, 1.0, 1.0, ""),
        (0.81, -2.0, -1.62, -1.62, ""),
        (0.79, -2.0, -1.6, 0.0, "low"),
        (2.9, -2.0, -5.8, -5.8, ""),
        (3.1, -2.0, -6.0, 0.0, "high"),
        (1.28, 1.0, 1.28, 1.28, ""),
        (0.8, -1.0, -0.8, -0.8, ""),
        (5.0, 0.0, 0.0, 0.0, ""),
    ),
)
def test_clip_edges(ratio: float, advantage: float, value: float, grad: float, flag: str) -> None:
    """Eq. 12 with the dual clip at 3: the gradient is cut beyond the bound on the advantage's side
    only, and flagged there. The oracle has the same value."""
    # The bounds themselves, where log and exp would not come back to the same number.
    nudge = 1 - 1e-12 if advantage > 0 else 1 + 1e-12
    clip, ratio = Clip(0.2, 0.28, 3.0), ratio * nudge
    ours = at_ratio(clip, ratio, advantage)
    assert ours.along_ratio.item() == pytest.approx(grad, rel=1e-9)
    assert ours.value.item() == pytest.approx(value, rel=1e-9)
    assert (bool(ours.clipped_low), bool(ours.clipped_high)) == (flag == "low", flag == "high")
    oracle = reference_surrogate(clip, double(ratio), double(-1.0), double(advantage))
    assert oracle.item() == pytest.approx(value, rel=1e-9)


def test_cispo_and_sapo_by_hand() -> None:
    """CISPO: the capped ratio times the log-prob of -1. SAPO: at ratio 1 the plain gradient."""
    capped = at_ratio(Cispo(2.0), 3.0, 0.5)
    assert (capped.value.item(), bool(capped.clipped_high)) == (-1.0, True)
    assert capped.along_log_prob.item() == 1.0
    for advantage, temperature in ((0.5, 1.0), (-0.5, 1.05)):
        soft = at_ratio(Sapo(), 1.0, advantage)
        assert soft.along_ratio.item() == pytest.approx(advantage)
        assert soft.value.item() == pytest.approx(2 / temperature * advantage)


def test_sampled_kl_by_hand() -> None:
    """With d = log 2: k1 = log 2, k2 = (log 2)^2 / 2, k3 = log 2 - 1/2."""
    log_2 = double(2.0).log()
    log_probs, ref = -log_2, -2 * log_2
    for estimator, want in (("k1", log_2), ("k2", log_2**2 / 2), ("k3", log_2 - 0.5)):
        assert_same(sampled_kl(estimator, log_probs, ref)[0], want)


def test_k3_keeps_the_digits_of_a_small_difference() -> None:
    """k3's derivative is about d near 0; computed as 1 - exp(-d) in float32 it would be rounded."""
    log_probs, ref = torch.tensor([1e-4 - 1.0]), torch.tensor([-1.0])
    d = log_probs.double() - ref.double()
    value, slope = sampled_kl("k3", log_probs, ref)
    assert slope.item() == pytest.approx(float(-torch.expm1(-d)), rel=1e-6)
    assert value.item() >= 0


def test_the_oracle_by_hand() -> None:
    """Logits: cap * tanh(scale * (x w + b) / cap) / temperature. A fair coin has entropy log 2; KL
    of (3/4, 1/4) from it is log 2 minus its entropy. GSPO's ratio: exp of the mean log-ratio, the
    same for each row of the sequence."""
    options = {"temperature": 0.5, "logit_softcap": 4.0, "logit_scale": 0.25, "bias": double(1.0)}
    logit = reference_logits(double(2.0)[None], double(3.0)[None], **options)
    assert logit.item() == pytest.approx(4.0 * math.tanh(0.25 * 7.0 / 4.0) / 0.5)
    fair, biased = double(0.0, 0.0)[None], double(0.75, 0.25).log()[None]
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert reference_entropy(fair).item() == pytest.approx(math.log(2))
    assert reference_entropy(biased).item() == pytest.approx(entropy)
    assert reference_exact_kl(biased, fair).item() == pytest.approx(math.log(2) - entropy)
    ratio = reference_ratio(double(0.1, 0.3, -1.0), torch.zeros(3), torch.tensor([4, 4, 2]))
    assert ratio.tolist() == pytest.approx([math.exp(0.2), math.exp(0.2), math.exp(-1.0)])
