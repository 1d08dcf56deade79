"""`objective`: the per-token maths on vectors, against autograd through the reference."""

import pytest
import torch
from torch import Tensor

from care_kernels.objective import (
    ClipRange,
    SequenceGroups,
    sampled_kl,
    sequence_surrogate,
    token_surrogate,
)
from care_kernels.reference import reference_ratio, reference_sampled_kl, reference_surrogate
from tests.kernels.cases import assert_same

CLIP = ClipRange(0.2, 0.28)


def double(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize("dual", (None, 3.0))
@pytest.mark.parametrize("level", ("token", "sequence"))
def test_surrogate_follows_autograd(level: str, dual: float | None) -> None:
    """Eq. 12 and GSPO: value, d/dlogp and ratio equal autograd's through the reference."""
    generator = torch.Generator().manual_seed(0)
    log_ratio = torch.randn(200, generator=generator, dtype=torch.float64).requires_grad_()
    advantages = torch.randn(200, generator=generator, dtype=torch.float64)
    advantages[::5] = 0
    ids = torch.randint(30, (200,), generator=generator)
    old = torch.zeros_like(advantages)
    ratio = reference_ratio(log_ratio, old, ids if level == "sequence" else None)
    value = reference_surrogate(ratio, advantages, CLIP.low, CLIP.high, dual)
    (grad,) = torch.autograd.grad(value.sum(), log_ratio)

    clip = ClipRange(CLIP.low, CLIP.high, dual)
    if level == "sequence":
        groups = SequenceGroups.from_ids(ids)
        ours = sequence_surrogate(log_ratio.detach(), advantages, clip, groups)
    else:
        ours = token_surrogate(log_ratio.detach(), advantages, clip)
    assert_same(ours.value, value.detach())
    assert_same(ours.ratio, ratio.detach())
    assert_same(ours.grad_log_probs, grad)


@pytest.mark.parametrize(
    ("ratio", "advantage", "grad", "low", "high"),
    (
        (1.27, 2.0, 2.54, False, False),
        (1.29, 2.0, 0.0, False, True),
        (0.5, 2.0, 1.0, False, False),
        (0.81, -2.0, -1.62, False, False),
        (0.79, -2.0, 0.0, True, False),
        (2.0, -2.0, -4.0, False, False),
        (2.9, -2.0, -5.8, False, False),
        (3.1, -2.0, 0.0, False, True),
        (1.28, 1.0, 1.28, False, False),
        (0.8, -1.0, -0.8, False, False),
        (5.0, 0.0, 0.0, False, False),
    ),
)
def test_clip_edges(ratio: float, advantage: float, grad: float, low: bool, high: bool) -> None:
    """Eq. 12's gradient is cut beyond the bound on the advantage's side only, and flagged there."""
    # The bounds themselves, where log and exp would not come back to the same number.
    nudge = 1 - 1e-12 if advantage > 0 else 1 + 1e-12
    log_ratio = double(ratio * nudge).log()
    ours = token_surrogate(log_ratio, double(advantage), ClipRange(0.2, 0.28, 3.0))
    assert ours.grad_log_probs.item() == pytest.approx(grad, rel=1e-9)
    assert (bool(ours.clipped_low), bool(ours.clipped_high)) == (low, high)


@pytest.mark.parametrize(
    ("ratio", "advantage", "value"),
    ((1.5, 1.0, 1.28), (0.5, 1.0, 0.5), (0.5, -1.0, -0.8), (1.5, -1.0, -1.5), (9.0, -1.0, -3.0)),
)
def test_clip_values(ratio: float, advantage: float, value: float) -> None:
    """Eq. 12's summand with the dual clip at 3, by hand."""
    ours = token_surrogate(double(ratio).log(), double(advantage), ClipRange(0.2, 0.28, 3.0))
    assert ours.value.item() == pytest.approx(value, rel=1e-9)


def test_flags_say_where_the_gradient_is_cut() -> None:
    """For a row with an advantage: flagged if and only if the surrogate's gradient is zero."""
    log_ratio = torch.linspace(-2, 2, 401)
    for advantage in (-0.7, 0.7):
        ours = token_surrogate(
            log_ratio, torch.full((401,), advantage), ClipRange(0.2, 0.28, dual=2.0)
        )
        assert torch.equal(ours.clipped_low | ours.clipped_high, ours.grad_log_probs == 0)


@pytest.mark.parametrize("estimator", ("k1", "k2", "k3"))
def test_sampled_kl_follows_autograd(estimator: str) -> None:
    """k1, k2, k3: values and derivatives equal autograd's through the reference."""
    log_probs = torch.linspace(-5, -0.1, 50, dtype=torch.float64).requires_grad_()
    ref = log_probs.detach().flip(0)
    value = reference_sampled_kl(estimator, log_probs, ref)
    (grad,) = torch.autograd.grad(value.sum(), log_probs)
    ours, ours_grad = sampled_kl(estimator, log_probs.detach(), ref)
    assert_same(ours, value.detach())
    assert_same(ours_grad, grad)


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


def test_unknown_estimator() -> None:
    """The message names the argument and the choices."""
    with pytest.raises(ValueError, match="kl_estimator: got 'k4'"):
        sampled_kl("k4", double(0.0), double(0.0))


def test_sequence_groups() -> None:
    """Ids are names: any integers in any order, and sums come back in row order."""
    ids = torch.tensor([7, -3, 7, 10**12, -3, 7])
    groups = SequenceGroups.from_ids(ids)
    values = torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0, 32.0])
    assert groups.sum(values).tolist() == [37.0, 18.0, 37.0, 8.0, 18.0, 37.0]
    assert groups.count(torch.float32).tolist() == [3.0, 2.0, 3.0, 1.0, 2.0, 3.0]


def test_no_sequences() -> None:
    """An empty batch has no sequences."""
    groups = SequenceGroups.from_ids(torch.zeros(0, dtype=torch.long))
    assert groups.sum(torch.zeros(0)).shape == groups.count(torch.float32).shape == (0,)
