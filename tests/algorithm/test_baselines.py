"""The baselines behind CARE's interface, and the paper's Table 5."""

import math

import pytest

from care_kernels import Cispo, Clip, Sapo
from care_train.algorithm.advantages import RESCUE_DELTA
from care_train.algorithm.baselines import (
    baseline_updates,
    has_mixed_outcomes,
    without_truncated,
)
from care_train.algorithm.care import skipped_update
from care_train.algorithm.spans import overlong_penalty
from care_train.config import TABLE_5, build_config
from care_train.training.update import surrogate_of
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


def updates_of(name, groups, kept: bool = True, total=None):
    """The call the training step makes for a baseline, on one rank."""
    return baseline_updates(
        groups,
        name,
        total or (lambda values: values),
        length_normalized=name in ("grpo", "gspo", "sapo"),
        keep_without_signal=kept,
    )


def update_of(name, rollouts=GROUP, kept: bool = True):
    return updates_of(name, [rollouts], kept)[0]


def test_the_hand_computed_group():
    """What the tests below assume of GROUP."""
    assert [rollout.reward for rollout in GROUP] == pytest.approx([1, 1, 0.1, 0])
    assert [len(rollout.token_ids) for rollout in GROUP] == LENGTHS


@pytest.mark.parametrize("name", ["grpo", "dapo", "gspo", "cispo", "sapo"])
def test_advantages_are_z_scores_over_the_group(name):
    """GRPO, DAPO, GSPO: A_i = (r_i - mean) / std over all G."""
    advantages = [s.advantage for s in update_of(name).sequences]
    assert advantages == pytest.approx([c / STD for c in CENTRED], rel=1e-5)


def test_dr_grpo_only_centres():
    """Dr. GRPO (arXiv:2503.20783): A_i = r_i - mean, without the std."""
    assert [s.advantage for s in update_of("dr_grpo").sequences] == pytest.approx(CENTRED)


def test_rloo_compares_with_the_others():
    """RLOO (arXiv:2402.14740): A_i = r_i - mean of the other three: 1 - 1.1/3, .1 - 2/3, 0 - .7."""
    advantages = [s.advantage for s in update_of("rloo").sequences]
    assert advantages == pytest.approx([1 - 1.1 / 3, 1 - 1.1 / 3, 0.1 - 2 / 3, 0 - 2.1 / 3])


class TestReinforcePlusPlus:
    """arXiv:2501.03262: the z-score over the whole batch, each token with its response's reward."""

    # Of rewards 1, .1 with 10, 10 tokens and 1, 1 with 10, 10 tokens.
    GROUPS = ([right(), wrong()], [right(), right()])
    MEAN = 0.775
    STD = math.sqrt((3 * 0.225**2 + 0.675**2) / 4)

    def test_the_batch_is_the_baseline(self):
        """A group of equal rewards has a gradient: others of the batch did worse."""
        updates = updates_of("reinforce_pp", self.GROUPS, kept=False)
        found = [[s.advantage for s in update.sequences] for update in updates]
        good, bad = 0.225 / self.STD, -0.675 / self.STD
        assert found == [pytest.approx(row, rel=1e-5) for row in ([good, bad], [good, good])]

    def test_long_responses_count_as_often_as_they_have_tokens(self):
        """Rewards 1 with 14 tokens and 0 with 6: mean .7, variance .21."""
        group = [right(think=7), broken()]
        assert [len(r.token_ids) for r in group] == [14, 6]
        (update,) = updates_of("reinforce_pp", [group])
        found = [sequence.advantage for sequence in update.sequences]
        assert found == pytest.approx([0.3 / math.sqrt(0.21), -0.7 / math.sqrt(0.21)], rel=1e-5)

    def test_ranks_share_mean_and_deviation(self):
        """With a second rank that holds the other group, sums come from both."""
        sums: list[list[float]] = []

        def remember(values):
            sums.append(values)
            return values

        for group in self.GROUPS:
            updates_of("reinforce_pp", [group], total=remember)
        both = [a + b for a, b in zip(*sums, strict=True)]
        (update,) = updates_of("reinforce_pp", self.GROUPS[:1], total=lambda values: both)
        found = [sequence.advantage for sequence in update.sequences]
        assert found == pytest.approx([0.225 / self.STD, -0.675 / self.STD], rel=1e-5)

    def test_equal_rewards_have_no_gradient(self):
        """Over the whole batch."""
        updates = updates_of("reinforce_pp", [[right(), right()]] * 2, kept=False)
        assert [update.skipped for update in updates] == ["no_signal"] * 2


class TestTruncated:
    """loss.mask_truncated: cut responses leave the loss, their rewards stay in the group's."""

    GROUP = (right(), right(finished=False), wrong())

    def test_a_baseline(self):
        """Advantages are those of all three; two train, and two are counted."""
        update = update_of("grpo", self.GROUP)
        masked = without_truncated(update, self.GROUP)
        assert masked.sequences == (update.sequences[0], update.sequences[2])
        assert (masked.num_sequences, masked.num_tokens) == (2, 20)

    def test_without_a_signal_denominators_lose_them_too(self):
        """A group of equal rewards trains nothing and counts its finished responses."""
        group = [right(), right(finished=False)]
        masked = without_truncated(update_of("dapo", group, kept=False), group)
        assert (masked.num_sequences, masked.num_tokens, masked.skipped) == (1, 10, "no_signal")

    def test_a_group_of_cut_responses_is_skipped(self):
        """And says why."""
        group = [right(finished=False), wrong(finished=False)]
        masked = without_truncated(update_of("grpo", group), group)
        assert (masked.sequences, masked.num_sequences, masked.skipped) == ((), 0, "truncated")
        assert without_truncated(skipped_update("all_wrong"), []).skipped == "all_wrong"


@pytest.mark.parametrize(
    ("num_tokens", "penalty"), [(10, 0), (80, 0), (85, -0.25), (90, -0.5), (100, -1)]
)
def test_the_soft_overlong_punishment(num_tokens, penalty):
    """DAPO, Eq. 13: 0 up to L_max - L_cache = 80, then falling to -1 at L_max = 100."""
    assert overlong_penalty(num_tokens, 100, 0.2) == pytest.approx(penalty)


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
    assert (care.rescue, RESCUE_DELTA, care.think_weight) == (1.0, 0.1, 0.005)
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
        "rloo": ("token", "max_length"),
        "reinforce_pp": ("token", "token"),
        "cispo": ("token", "token"),
        "sapo": ("token", "sequence"),
    }
    assert {name: loss.surrogate for name, loss in found.items() if loss.surrogate != "clip"} == {
        "cispo": "cispo",
        "sapo": "sapo",
    }
    assert surrogate_of(found["cispo"]) == Cispo(5.0, 0.0)
    assert surrogate_of(found["sapo"]) == Sapo(1.0, 1.05)
    assert surrogate_of(found["dapo"]) == Clip(0.2, 0.28)
    assert found["dr_grpo"].kl_coef == 0.0
