"""The order of prompts is a fresh permutation per epoch and a pure function of the position."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from care_train.data import PromptOrder


@given(st.integers(1, 40), st.integers(0, 2**40), st.integers(0, 30))
def test_each_epoch_is_a_permutation(num_samples: int, seed: int, epoch: int):
    """Every row is drawn once per epoch."""
    draws = PromptOrder(num_samples, seed).take(epoch * num_samples, num_samples)
    assert sorted(draws) == list(range(num_samples))


@given(st.integers(1, 40), st.integers(0, 99), st.integers(0, 200), st.lists(st.integers(0, 50)))
def test_position_is_the_only_state(num_samples: int, seed: int, start: int, counts: list[int]):
    """Draws split in any way, from any position, equal one long draw."""
    whole = PromptOrder(num_samples, seed).take(start, sum(counts))
    pieces, position = [], start
    for count in counts:
        pieces += PromptOrder(num_samples, seed).take(position, count)
        position += count
    assert pieces == whole


def test_epochs_and_seeds_differ():
    """Neither two epochs nor two seeds share an order."""
    order = PromptOrder(50, 0)
    assert order.take(0, 50) != order.take(50, 50)
    assert order.take(0, 50) != PromptOrder(50, 1).take(0, 50)


def test_order_is_fixed():
    """The order is the same on every machine and in every version: resumed runs depend on it."""
    assert PromptOrder(6, 0).take(0, 12) == [3, 4, 5, 0, 2, 1, 4, 5, 3, 1, 2, 0]


def test_wrong_arguments():
    """No rows and negative positions are refused."""
    with pytest.raises(ValueError, match="num_samples: got 0"):
        PromptOrder(0, 0)
    with pytest.raises(ValueError, match="got -1, 2"):
        PromptOrder(3, 0).take(-1, 2)
