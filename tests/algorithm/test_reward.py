"""Eq. 1 (Algorithm 1, line 2)."""

import pytest

from care_train.algorithm.spans import reward
from care_train.config import load_config


@pytest.mark.parametrize(
    ("accuracy", "format_score", "format_weight", "expected"),
    [
        (1.0, 1.0, 0.1, 1.0),
        (1.0, 0.0, 0.1, 0.9),
        (0.0, 1.0, 0.1, 0.1),
        (0.0, 0.0, 0.1, 0.0),
        (0.5, 1.0, 0.1, 0.55),
        (0.25, 0.5, 0.4, 0.35),
        (1.0, 0.0, 0.0, 1.0),
        (1.0, 0.0, 1.0, 0.0),
    ],
)
def test_reward_mixes_accuracy_and_format(accuracy, format_score, format_weight, expected):
    """Eq. 1: r = (1 - lambda) acc + lambda fmt."""
    assert reward(accuracy, format_score, format_weight) == pytest.approx(expected)


@pytest.mark.parametrize("format_weight", [0.0, 0.1, 0.3, 0.49])
def test_every_correct_answer_outranks_every_wrong_one(format_weight):
    """lambda < 1/2: a correct answer without form beats a wrong one with it."""
    assert reward(1.0, 0.0, format_weight) > reward(0.0, 1.0, format_weight)


@pytest.mark.parametrize("format_weight", [-0.1, 0.5, 0.9, 1.0])
def test_a_weight_that_could_invert_the_order_is_an_error(format_weight):
    """reward.format_weight outside [0, 0.5) is a configuration error."""
    with pytest.raises(ValueError, match=r"reward\.format_weight"):
        load_config(None, [f"reward.format_weight={format_weight}"])
