"""GRPO, DAPO, GSPO and Dr. GRPO behind CARE's interface, and the paper's Table 5."""

import math

import pytest

from care_train.algorithm.advantages import RESCUE_DELTA
from care_train.algorithm.baselines import group_update, has_mixed_outcomes
from care_train.config import TABLE_5, build_config
from tests.algorithm.builders import (
    broken,
    make_rollout,
    right,
    token_advantages,
    token_weights,
    wrong,
)

# Rewards 1, 1, .1, 0: mean .525, population variance .226875; lengths 10, 8, 9, 6.
GROUP = [right(), right(think=1), wrong(think=2), broken()]
LENGTHS = [10, 8, 9, 6]
CENTRED = [0.475, 0.475, -0.425, -0.525]
STD = math.sqrt(0.226875)


def update_of(name: str, rollouts=GROUP, kept: bool = True):
    """The call the training step makes for a baseline."""
    return group_update(
        rollouts,
        divide_by_std=name != "dr_grpo",
        length_normalized=name in ("grpo", "gspo"),
        keep_without_signal=kept,
    )


def test_the_hand_computed_group():
    """What the tests below assume of GROUP."""
    assert [rollout.reward for rollout in GROUP] == pytest.approx([1, 1, 0.1, 0])
    assert [len(rollout.token_ids) for rollout in GROUP] == LENGTHS


@pytest.mark.parametrize("name", ["grpo", "dapo", "gspo"])
def test_advantages_are_z_scores_over_the_group(name):
    """GRPO, DAPO, GSPO: A_i = (r_i - mean) / std over all G."""
    advantages = [s.advantage for s in update_of(name).sequences]
    assert advantages == pytest.approx([c / STD for c in CENTRED], rel=1e-5)


def test_dr_grpo_only_centres():
    """Dr. GRPO (arXiv:2503.20783): A_i = r_i - mean, without the std."""
    assert [s.advantage for s in update_of("dr_grpo").sequences] == pytest.approx(CENTRED)


@pytest.mark.parametrize("name", ["grpo", "gspo"])
def test_sequence_means_weigh_each_sequence_alike(name):
    """GRPO, GSPO: token-uniform weights 1/T, which sum to 1 however long the response."""
    for sequence, length in zip(update_of(name).sequences, LENGTHS, strict=True):
        assert token_weights(sequence).tolist() == pytest.approx([1 / length] * length)


@pytest.mark.parametrize("name", ["dapo", "dr_grpo"])
def test_token_sums_weigh_each_token_alike(name):
    """DAPO, Dr. GRPO: weight 1 per token; what the sum is divided by is the loss's affair."""
    for sequence, length in zip(update_of(name).sequences, LENGTHS, strict=True):
        assert token_weights(sequence).tolist() == [1.0] * length


def test_all_sequences_train_and_count():
    """A baseline trains all G, right, wrong and malformed."""
    update = update_of("grpo")
    assert [s.rollout for s in update.sequences] == GROUP
    assert (update.num_sequences, update.num_tokens) == (4, sum(LENGTHS))
    assert {s.role for s in update.sequences} == {"rollout"}
    assert [s.raw_advantage for s in update.sequences] == [s.advantage for s in update.sequences]


@pytest.mark.parametrize("name", ["grpo", "dapo", "gspo", "dr_grpo"])
@pytest.mark.parametrize("level", [right, wrong, broken])
def test_equal_rewards_have_no_policy_gradient(name, level):
    """A saturated group's token advantages are exactly 0: its only gradient is the KL's."""
    update = update_of(name, [level() for _ in range(7)])
    assert len(update.sequences) == 7
    for sequence in update.sequences:
        tokens = token_advantages(sequence)
        assert tokens.tolist() == [0.0] * len(tokens)


def test_without_kl_equal_rewards_are_not_forwarded_but_count():
    """No sequence reaches the optimiser, and the mean over all sampled sequences stays one."""
    update = update_of("dapo", [right(), right()], kept=False)
    assert update.sequences == () and update.skipped == "no_signal"
    assert (update.num_sequences, update.num_tokens) == (2, 20)
    assert update_of("dapo", kept=False).sequences != ()


def test_a_difference_in_format_is_a_signal():
    """Groups are told apart by reward: right with and without format differ."""
    update = update_of("grpo", [right(), make_rollout(1.0, 0.0)], kept=False)
    assert [s.advantage for s in update.sequences] == pytest.approx([1, -1], rel=1e-4)


@pytest.mark.parametrize(
    ("accuracies", "mixed"),
    [
        ((1, 0), True),
        ((1, 1, 0, 0), True),
        ((1, 1), False),
        ((0, 0), False),
        ((0.5, 0), False),
        ((1, 0.5), True),
    ],
)
def test_dynamic_sampling_keeps_mixed_groups(accuracies, mixed):
    """DAPO: 0 < number of right answers < G."""
    assert has_mixed_outcomes([make_rollout(float(a), 1.0) for a in accuracies]) == mixed


def test_format_alone_does_not_mix_outcomes():
    """DAPO's filter reads the answers, not the reward."""
    assert not has_mixed_outcomes([right(), make_rollout(1.0, 0.0)])


@pytest.mark.parametrize(
    ("name", "low", "high", "kl_coef"),
    [
        ("care", 0.20, 0.28, 0.02),
        ("grpo", 0.20, 0.20, 0.02),
        ("dapo", 0.20, 0.28, 0.0),
        ("gspo", 3e-4, 4e-4, 0.0),
    ],
)
def test_table_5(name, low, high, kl_coef):
    """Table 5: clip ranges and KL coefficient of each method."""
    config = build_config({"algorithm": name})
    loss = config.loss
    assert (loss.clip_eps_low, loss.clip_eps_high, loss.kl_coef) == (low, high, kl_coef)
    assert config.rollout.group_size == 8


def test_table_5_row_of_care():
    """Table 5 and Sec. 8.2: K = 4, M = 6, s = 0.5, delta = 0.1, gamma+ = 0.005, one resample."""
    care = build_config({}).care
    assert (care.max_negatives, care.preselect_size, care.neg_scale) == (4, 6, 0.5)
    assert (care.rescue.enabled, RESCUE_DELTA, care.think_weight) == (True, 0.1, 0.005)
    assert care.reflection.enabled and care.reflect_scale == 0.25


def test_ratio_and_aggregation_of_each_method():
    """GSPO's ratio is per sequence, DAPO's loss a token mean, Dr. GRPO's over the longest."""
    found = {name: build_config({"algorithm": name}).loss for name in TABLE_5}
    levels = {name: (loss.ratio_level, loss.aggregation) for name, loss in found.items()}
    assert levels == {
        "care": ("token", "sequence"),
        "grpo": ("token", "sequence"),
        "dapo": ("token", "token"),
        "gspo": ("sequence", "sequence"),
        "dr_grpo": ("token", "max_length"),
    }
    assert found["dr_grpo"].kl_coef == 0.0
