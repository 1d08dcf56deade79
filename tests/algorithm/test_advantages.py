"""Eqs. 5-10, 14 and the equalisation (Algorithm 1, lines 24-39)."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from care_train.algorithm.advantages import (
    equalize_factor,
    normalize_rewards,
    rescue_rewards,
    scale_negative,
)


def tensor(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_raw_advantages_by_hand():
    """Eqs. 5-7: r = (1, 0.1, 0.4): mu = 0.5, sigma^2 = (0.25 + 0.16 + 0.01) / 3 = 0.14."""
    sigma = math.sqrt(0.14) + 1e-6
    expected = [0.5 / sigma, -0.4 / sigma, -0.1 / sigma]
    assert normalize_rewards(tensor(1.0, 0.1, 0.4), 1e-6).tolist() == pytest.approx(expected)


def test_sigma_is_the_population_std_with_eps_outside_the_root():
    """Eq. 6: r = (3, 1): sigma = sqrt(2 / 2) + eps, so eps = 1 halves the advantages."""
    assert normalize_rewards(tensor(3.0, 1.0), 1.0).tolist() == pytest.approx([0.5, -0.5])


def test_equal_rewards_have_no_advantage():
    """Eq. 7 with sigma = eps: zero, not NaN."""
    assert normalize_rewards(tensor(0.1, 0.1, 0.1, 0.1), 1e-6).tolist() == pytest.approx([0] * 4)


@pytest.mark.parametrize("num_negatives", range(1, 8))
@given(low=st.floats(0, 0.4), gap=st.floats(0.05, 1))
def test_two_level_rewards_show_the_signature(num_negatives, low, gap):
    """Eq. 10 and Corollary 1: A_raw = sqrt(K') and -1/sqrt(K') exactly, whatever the two levels."""
    rewards = tensor(low + gap, *[low] * num_negatives)
    root = math.sqrt(num_negatives)
    expected = [root] + [-1 / root] * num_negatives
    assert normalize_rewards(rewards, 0.0).tolist() == pytest.approx(expected, rel=1e-6)
    binary = tensor(1.0, *[0.0] * num_negatives)
    assert normalize_rewards(binary, 1e-6).tolist() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    "negatives", [(0.0, 0.1), (0.1, 0.0, 0.0), (0.1, 0.1, 0.0, 0.0), (0.0, 0.3, 0.1, 0.2, 0.5)]
)
def test_spread_among_negatives_attenuates_the_signature(negatives):
    """Eq. 9: A_raw = alpha sqrt(K'), alpha = (1 + (K' + 1) Var / Delta^2)^(-1/2).

    With the group's own mean and population variance of the negatives it is exact.
    """
    count = len(negatives)
    mean = sum(negatives) / count
    variance = sum((x - mean) ** 2 for x in negatives) / count
    alpha = (1 + (count + 1) * variance / (1 - mean) ** 2) ** -0.5
    raw = normalize_rewards(tensor(1.0, *negatives), 0.0).tolist()
    assert 0 < alpha < 1
    assert raw[0] == pytest.approx(alpha * math.sqrt(count))
    assert sum(raw[1:]) / count == pytest.approx(-alpha / math.sqrt(count))


@pytest.mark.parametrize("num_negatives", range(1, 8))
def test_expected_variance_of_proposition_1(num_negatives):
    """Proposition 1: E[sigma_S^2] = (K'^2 Var + K' Delta^2) / (K' + 1)^2 for i.i.d. negatives.

    Negatives of 0 or 0.5 with equal odds have m = 1/4 and Var = 1/16; all 2^K' groups are formed.
    sigma_S is read off the advantages: the reward gap over the advantage gap.
    """
    squares = []
    for negatives in itertools.product([0.0, 0.5], repeat=num_negatives):
        raw = normalize_rewards(tensor(1.0, *negatives), 0.0).tolist()
        squares.append(((1.0 - negatives[0]) / (raw[0] - raw[1])) ** 2)
    k = num_negatives
    expected = (k**2 / 16 + k * 0.75**2) / (k + 1) ** 2
    assert sum(squares) / len(squares) == pytest.approx(expected)


@given(st.lists(st.floats(0, 1), min_size=2, max_size=9))
def test_raw_advantages_are_centred(values):
    """Eqs. 5-7: advantages sum to zero and keep the order of the rewards."""
    raw = normalize_rewards(tensor(*values), 1e-6).tolist()
    assert sum(raw) == pytest.approx(0, abs=1e-6)
    order = sorted(range(len(values)), key=lambda i: values[i])
    assert all(raw[a] <= raw[b] for a, b in itertools.pairwise(order))


@pytest.mark.parametrize(
    ("raw", "scale", "expected"), [(-0.8, 0.5, -0.4), (0.8, 0.5, -0.4), (-2, 1, -2), (0, 0.5, 0)]
)
def test_negatives_are_scaled_and_never_rewarded(raw, scale, expected):
    """Eq. 8: A = -s |A_raw|, a penalty even where the raw advantage is positive."""
    assert scale_negative(raw, scale) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("num_negatives", "max_negatives", "expected"),
    [(1, 4, 2.0), (2, 4, math.sqrt(2)), (3, 4, math.sqrt(4 / 3)), (4, 4, 1.0), (5, 4, 1.0)],
)
def test_equalisation_only_enlarges(num_negatives, max_negatives, expected):
    """Sec. 3.4, line 39: sqrt(K / K_S) where K_S < K, and 1 otherwise."""
    assert equalize_factor(num_negatives, max_negatives) == pytest.approx(expected)


@pytest.mark.parametrize("num_negatives", range(1, 8))
def test_equalised_updates_have_one_size(num_negatives):
    """Sec. 3.4: with K = 7 the negatives' equalised total is -sqrt(7), whatever K' is."""
    raw = normalize_rewards(tensor(1.0, *[0.0] * num_negatives), 0.0)
    total = float(raw[1:].sum()) * equalize_factor(num_negatives, 7)
    assert total == pytest.approx(-math.sqrt(7))


@pytest.mark.parametrize("num_negatives", range(1, 8))
@pytest.mark.parametrize("delta", [0.1, 10.0])
def test_rescue_reproduces_the_signature(num_negatives, delta):
    """Eq. 14 and Corollary 2: mu = 0, sigma^2 = delta^2 / K', so Eq. 10 again; delta cancels."""
    rewards = rescue_rewards(num_negatives, delta=delta).double()
    assert rewards.tolist() == pytest.approx([delta] + [-delta / num_negatives] * num_negatives)
    assert float(rewards.mean()) == pytest.approx(0, abs=1e-7 * delta)
    variance = float((rewards - rewards.mean()).square().mean())
    assert variance == pytest.approx(delta**2 / num_negatives, rel=1e-6)
    root = math.sqrt(num_negatives)
    expected = [root] + [-1 / root] * num_negatives
    assert normalize_rewards(rewards, 1e-6).tolist() == pytest.approx(expected, rel=1e-4)


def test_a_literal_rescue_of_few_failures_is_not_zero_sum():
    """Line 23 to the letter: K' counts the pseudo-anchor, so -delta/K' leaves a rest."""
    rewards = rescue_rewards(2, divisor=3, delta=0.3).tolist()
    assert rewards == pytest.approx([0.3, -0.1, -0.1])
