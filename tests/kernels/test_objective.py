"""`objective`: the per-token maths on vectors, against autograd through the oracle; the oracle
itself, by hand where a hand can and by finite differences elsewhere."""

import math

import pytest
import torch
from torch import Tensor

from care_kernels.objective import (
    Cispo,
    Clip,
    RowTerms,
    Sapo,
    SequenceGroups,
    Surrogate,
    SurrogateRows,
    row_objective,
    sampled_kl,
)
from care_kernels.softmax import RowStatistics
from tests.kernels.cases import LEAVES, assert_same, policy_case, row_vector, with_kl
from tests.kernels.oracle import (
    reference_entropy,
    reference_exact_kl,
    reference_flags,
    reference_logits,
    reference_policy_loss,
    reference_ratio,
    reference_sampled_kl,
    reference_surrogate,
)

SURROGATES = (Clip(), Clip(dual=3.0), Cispo(1.5), Cispo(1.28, 0.8), Sapo(), Sapo(2.0, 0.5))


def double(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def at_ratio(surrogate: Surrogate, ratio: float, advantage: float) -> SurrogateRows:
    return surrogate(double(ratio), double(-1.0), double(advantage))


@pytest.mark.parametrize("estimator", (None, "k1", "k2", "k3", "k3_unbiased"))
@pytest.mark.parametrize("surrogate", SURROGATES, ids=repr)
@pytest.mark.parametrize("level", ("token", "sequence"))
def test_objective_follows_autograd(
    level: str, surrogate: Surrogate, estimator: str | None
) -> None:
    """Every surrogate and KL: value, d/dlogp, ratio and flags equal autograd's of the oracle."""
    generator = torch.Generator().manual_seed(0)
    log_probs = torch.randn(200, generator=generator, dtype=torch.float64).requires_grad_()
    advantages, old, ref, weights = torch.randn(4, 200, generator=generator, dtype=torch.float64)
    advantages[::5] = 0
    ids = torch.randint(30, (200,), generator=generator)
    ratio = reference_ratio(log_probs, old, ids if level == "sequence" else None)
    value = -reference_surrogate(surrogate, ratio, log_probs, advantages)
    if estimator is not None:
        kl = reference_sampled_kl(estimator, log_probs, ref)
        value = value + weights * (ratio * kl if estimator == "k3_unbiased" else kl)
    (grad,) = torch.autograd.grad(value.sum(), log_probs)

    zeros = torch.zeros(200, dtype=torch.float64)
    ours, upstream = row_objective(
        RowStatistics(log_probs.detach(), zeros, zeros),
        RowTerms(advantages, old, ref, None if estimator is None else weights, None),
        surrogate,
        estimator or "k3",
        groups=SequenceGroups.from_ids(ids) if level == "sequence" else None,
    )
    assert_same(ours.loss, value.detach())
    assert_same(ours.ratio, ratio.detach())
    assert_same(upstream.log_probs, grad)
    flags = reference_flags(surrogate, ratio.detach(), advantages)
    assert torch.equal(ours.clipped_low, flags[0]) and torch.equal(ours.clipped_high, flags[1])


@pytest.mark.parametrize(
    ("ratio", "advantage", "value", "grad", "flag"),
    (
        (1.27, 2.0, 2.54, 2.54, ""),
        (1.29, 2.0, 2.56, 0.0, "high"),
        (0.5, 2.0, 1.0, 1.0, ""),
        (0.81, -2.0, -1.62, -1.62, ""),
        (0.79, -2.0, -1.6, 0.0, "low"),
        (2.0, -2.0, -4.0, -4.0, ""),
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


@pytest.mark.parametrize(
    ("make", "message"),
    (
        (lambda: Clip(low=-0.1), r"Clip\.low: got -0.1; wanted 0 or more"),
        (lambda: Clip(high=float("nan")), r"Clip\.high: got nan; wanted 0 or more"),
        (lambda: Clip(dual=1.0), r"Clip\.dual: got 1.0; wanted None or more than 1"),
        (lambda: Cispo(0.5, 0.8), r"Cispo\.min_ratio, max_ratio: got 0.8, 0.5; wanted"),
        (lambda: Sapo(0.0), r"Sapo\.positive_temperature: got 0.0; wanted more than 0"),
    ),
)
def test_surrogates_refuse(make, message: str) -> None:
    """A bound that is no bound is refused where it is made."""
    with pytest.raises(ValueError, match=message):
        make()


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


def test_sequence_groups() -> None:
    """Ids are names: any integers in any order, and sums come back in row order; also of none."""
    ids = torch.tensor([7, -3, 7, 10**12, -3, 7])
    groups = SequenceGroups.from_ids(ids)
    values = torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0, 32.0])
    assert groups.sum(values).tolist() == [37.0, 18.0, 37.0, 8.0, 18.0, 37.0]
    assert groups.mean(values).tolist() == pytest.approx([37 / 3, 9, 37 / 3, 8, 9, 37 / 3])
    groups = SequenceGroups.from_ids(torch.zeros(0, dtype=torch.long))
    assert groups.sum(torch.zeros(0)).shape == groups.mean(torch.zeros(0)).shape == (0,)


@pytest.mark.parametrize("level", ("token", "sequence"))
@pytest.mark.parametrize("estimator", ("k1", "k2", "k3", "exact"))
def test_the_oracle_passes_gradcheck(level: str, estimator: str) -> None:
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


def test_the_oracles_logits_by_hand() -> None:
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


def test_the_oracles_entropy_and_kl_by_hand() -> None:
    """A fair coin has entropy log 2; KL of (3/4, 1/4) from it is log 2 minus its entropy."""
    fair = torch.zeros(1, 2, dtype=torch.float64)
    biased = torch.tensor([[0.75, 0.25]], dtype=torch.float64).log()
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert reference_entropy(fair).item() == pytest.approx(math.log(2))
    assert reference_entropy(biased).item() == pytest.approx(entropy)
    assert reference_exact_kl(biased, fair).item() == pytest.approx(math.log(2) - entropy)


def test_the_oracles_sequence_ratio_by_hand() -> None:
    """GSPO: exp of the mean log-ratio, the same for each row of the sequence."""
    log_probs = torch.tensor([0.1, 0.3, -1.0], dtype=torch.float64)
    ratio = reference_ratio(log_probs, torch.zeros(3), torch.tensor([4, 4, 2]))
    assert ratio.tolist() == pytest.approx([math.exp(0.2), math.exp(0.2), math.exp(-1.0)])
