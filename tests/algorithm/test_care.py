"""Algorithm 1, line range by line range, on groups computed by hand."""

import math
from dataclasses import replace

import pytest

from care_train.algorithm.care import (
    count_negatives,
    select_subgroup,
    skip_before_forward,
    subgroup_update,
)
from care_train.algorithm.types import Subgroup
from care_train.config import CareSettings, ReflectionSettings, RescueSettings
from tests.algorithm.builders import (
    broken,
    care,
    indices,
    make_group,
    make_rollout,
    make_subgroup,
    right,
    token_weights,
    with_reward,
    wrong,
)

SETTINGS = CareSettings()
NO_REFLECTION = replace(SETTINGS, reflection=ReflectionSettings(enabled=False))


def advantages(update) -> list[float]:
    return [sequence.advantage for sequence in update.sequences]


def raw_advantages(update) -> list[float]:
    return [sequence.raw_advantage for sequence in update.sequences]


def roles(update) -> list[str]:
    return [sequence.role for sequence in update.sequences]


class TestSubgroup:
    """Lines 3-10 and 21-25."""

    def test_anchor_and_nearest_failures(self):
        """Lines 5-10: S = {y+} and K' = K = 2 hard negatives; a partial answer is left out."""
        settings = replace(SETTINGS, max_negatives=2, preselect_size=2)
        rollouts = [wrong(), right(think=9), wrong(), right(think=2), make_rollout(0.5), wrong()]
        group = make_group(rollouts, [50, 0, 90, 100, 101, 130])
        subgroup = select_subgroup(group, settings)
        assert isinstance(subgroup, Subgroup)
        assert indices(subgroup) == [3, 2, 5]
        assert [m.is_negative for m in subgroup.members] == [False, True, True]
        assert [m.shaped_reward for m in subgroup.members] == [1.0, 0.1, 0.1]
        assert not subgroup.rescued and subgroup.reflect_on == 0

    def test_every_positive_may_join_as_an_anchor(self):
        """`anchor: all`: Eq. 2's anchor leads, negatives follow, the other positives close S, and
        Eq. 8 scales the negatives alone."""
        settings = replace(SETTINGS, anchor="all", max_negatives=2, equalize=False)
        group = make_group([wrong(), right(think=9), wrong(), right(think=2), wrong(), right()])
        subgroup = select_subgroup(group, settings)
        assert isinstance(subgroup, Subgroup)
        assert indices(subgroup) == [3, 2, 4, 1, 5] and subgroup.reflect_on == 0
        assert [m.is_negative for m in subgroup.members] == [False, True, True, False, False]
        update = subgroup_update(subgroup, settings, wrong(reflected=True))
        expected = ["anchor", "negative", "negative", "positive", "positive", "reflected_failure"]
        assert roles(update) == expected and update.num_negatives == 3
        for sequence in update.sequences:
            scale = {"negative": 0.5, "reflected_failure": 0.25}.get(sequence.role, 1.0)
            assert sequence.advantage == pytest.approx(scale * sequence.raw_advantage)

    def test_k_prime_shrinks_to_the_failures(self):
        """Eq. 3: K' = min(K, |F|)."""
        group = make_group([right(), wrong(), right(), wrong()])
        subgroup = select_subgroup(group, SETTINGS)
        assert isinstance(subgroup, Subgroup)
        assert indices(subgroup) == [0, 1, 3] and subgroup.num_negatives == 2

    def test_all_correct_is_skipped(self):
        """Line 7: K' = 0 under saturated rewards is no update."""
        assert select_subgroup(make_group([right(), right()]), SETTINGS) == "all_correct"

    def test_right_and_partly_right_is_skipped(self):
        """Line 7: partial answers are no failures, so K' = 0 here too."""
        group = make_group([right(), make_rollout(0.5), right()])
        assert isinstance(select_subgroup(group, SETTINGS), str)

    def test_rescue(self):
        """Lines 22-24: the likeliest failure against its nearest others, r~ = (delta, -delta/3)."""
        group = make_group([wrong()] * 4, [40, 0, 10, 80], [-3.0, -1.0, -2.0, -5.0])
        subgroup = select_subgroup(group, SETTINGS)
        assert isinstance(subgroup, Subgroup) and subgroup.rescued
        assert indices(subgroup) == [1, 2, 0, 3]
        shaped = [m.shaped_reward for m in subgroup.members]
        assert shaped == pytest.approx([0.1] + [-0.1 / 3] * 3)
        assert [m.is_negative for m in subgroup.members] == [False, True, True, True]
        assert subgroup.reflect_on is None

    def test_rescue_takes_at_most_k(self):
        """Line 23: K' = min(K, ...)."""
        group = make_group([wrong()] * 8)
        subgroup = select_subgroup(group, replace(SETTINGS, max_negatives=3))
        assert isinstance(subgroup, Subgroup) and subgroup.num_negatives == 3
        assert subgroup.others[0].shaped_reward == pytest.approx(-0.1 / 3)

    @pytest.mark.parametrize(
        ("rollouts", "settings", "skips"),
        [
            ([right(), wrong()], SETTINGS, False),
            ([right(), right()], SETTINGS, True),
            ([wrong(), wrong()], SETTINGS, False),
            ([wrong(), wrong()], replace(SETTINGS, rescue=RescueSettings(enabled=False)), True),
            ([wrong()], SETTINGS, True),
            ([wrong(), wrong(), make_rollout(0.5)], SETTINGS, True),
            ([make_rollout(0.5), make_rollout(0.5)], SETTINGS, True),
        ],
    )
    def test_known_before_the_forward(self, rollouts, settings, skips):
        """Groups that cannot train cost no forward of the old policy, and the others get one."""
        assert (skip_before_forward(tuple(rollouts), settings) is not None) == skips
        assert isinstance(select_subgroup(make_group(rollouts), settings), str) == skips

    @pytest.mark.parametrize(
        ("accuracies", "reason"),
        [
            ((1, 1), "all_correct"),
            ((1, 0.5), "no_failures"),
            ((0,), "all_wrong"),
            ((0, 0.5), "no_positives"),
            ((0.5, 0.5), "no_positives"),
        ],
    )
    def test_the_reason_is_true(self, accuracies, reason):
        """A group is called all right or all wrong only where every rollout is."""
        group = make_group([make_rollout(float(accuracy)) for accuracy in accuracies])
        assert select_subgroup(group, SETTINGS) == reason


class TestAdvantages:
    """Lines 26-39."""

    def test_by_hand(self):
        """r = (1, .1, .1): A_raw = (sqrt 2, -1/sqrt 2); s = 1/2; sqrt(4/2): A = (2, -1/2, -1/2)."""
        update = subgroup_update(make_subgroup(right(), [wrong()] * 2), SETTINGS)
        root = math.sqrt(2)
        assert raw_advantages(update) == pytest.approx([root, -1 / root, -1 / root], rel=1e-5)
        assert advantages(update) == pytest.approx([2.0, -0.5, -0.5], rel=1e-5)
        assert update.equalize_factor == pytest.approx(root)
        assert roles(update) == ["anchor", "negative", "negative"]
        assert (update.num_negatives, update.num_sequences) == (2, 3)
        assert update.num_tokens == 3 * len(right().token_ids)
        assert not (update.rescued or update.anchor_clamped) and update.skipped is None

    def test_a_full_subgroup_is_not_rescaled(self):
        """Line 39: K_S = K: A = (sqrt 4, -s / sqrt 4)."""
        update = subgroup_update(make_subgroup(right(), [wrong()] * 4), SETTINGS)
        assert advantages(update) == pytest.approx([2.0] + [-0.25] * 4, rel=1e-5)
        assert update.equalize_factor == 1.0

    def test_format_gaps_among_negatives(self):
        """r = (1, .1, 0, 0): mu = .275, sigma^2 = .171875; better negatives are blamed less."""
        negatives = [wrong(), broken(), broken()]
        update = subgroup_update(make_subgroup(right(), negatives), SETTINGS)
        sigma, factor = math.sqrt(0.176875) + 1e-6, math.sqrt(4 / 3)
        expected = [0.725, -0.5 * 0.175, -0.5 * 0.275, -0.5 * 0.275]
        assert advantages(update) == pytest.approx([factor * x / sigma for x in expected])

    def test_a_negative_above_the_mean_is_still_blamed(self):
        """Line 37: -s |A_raw|: r = (1, .9, 0, 0) has a negative with A_raw > 0."""
        negatives = [with_reward(wrong(), 0.9), broken(), broken()]
        update = subgroup_update(make_subgroup(right(), negatives), SETTINGS)
        assert update.sequences[1].raw_advantage > 0 > update.sequences[1].advantage

    def test_reflection_succeeded(self):
        """Lines 16, 34-39: S = {1, 1, .1}: A_raw = (.707, .707, -1.414), K_S = 1, factor 2."""
        subgroup = make_subgroup(right(), [wrong()] * 2, reflect_on=0)
        update = subgroup_update(subgroup, SETTINGS, right(reflected=True))
        root = math.sqrt(2)
        assert raw_advantages(update) == pytest.approx([1 / root, 1 / root, -root], rel=1e-5)
        assert advantages(update) == pytest.approx([root, root, -root], rel=1e-5)
        assert roles(update) == ["anchor", "reflected_success", "negative"]
        assert update.num_negatives == 1

    def test_reflection_failed(self):
        """Lines 18, 36: S = {1, .1, .1, .1}: A_raw = (sqrt 3, -1/sqrt 3 x3), s and s/2, K_S = 3."""
        subgroup = make_subgroup(right(), [wrong()] * 2, reflect_on=0)
        update = subgroup_update(subgroup, SETTINGS, wrong(reflected=True))
        factor = math.sqrt(4 / 3)
        expected = [math.sqrt(3), -0.5 / math.sqrt(3), -0.5 / math.sqrt(3), -0.25 / math.sqrt(3)]
        assert advantages(update) == pytest.approx([factor * x for x in expected], rel=1e-5)
        assert roles(update) == ["anchor", "negative", "negative", "reflected_failure"]
        assert update.num_negatives == 3

    def test_a_failed_reflection_may_exceed_k(self):
        """Line 39: K_S = K + 1 is not scaled down: S = {1, .1 x3} with K = 2."""
        subgroup = make_subgroup(right(), [wrong()] * 2, reflect_on=0)
        settings = replace(SETTINGS, max_negatives=2)
        update = subgroup_update(subgroup, settings, wrong(reflected=True))
        assert update.num_negatives == 3 and update.equalize_factor == 1.0
        assert update.sequences[0].advantage == pytest.approx(math.sqrt(3), rel=1e-5)

    def test_no_negative_left(self):
        """Line 27: the only negative was repaired: K_S = 0, skip."""
        subgroup = make_subgroup(right(), [wrong()], reflect_on=0)
        update = subgroup_update(subgroup, SETTINGS, right(reflected=True))
        assert update.skipped == "no_negatives" and update.sequences == ()
        assert (update.num_sequences, update.num_tokens) == (0, 0)

    def test_statistics_follow_the_reflection(self):
        """Line 29 is after line 20: a repaired sample without format moves mu and sigma."""
        subgroup = make_subgroup(right(), [broken()] * 2, reflect_on=1)
        update = subgroup_update(subgroup, SETTINGS, make_rollout(1.0, 0.0, reflected=True))
        mu = (1.0 + 0.0 + 0.9) / 3
        sigma = math.sqrt(((1 - mu) ** 2 + mu**2 + (0.9 - mu) ** 2) / 3) + 1e-6
        expected = [(1 - mu) / sigma, -mu / sigma, (0.9 - mu) / sigma]
        assert raw_advantages(update) == pytest.approx(expected)

    def test_an_anchor_below_the_mean_is_clamped(self):
        """r = (.5, 1, .1): A_raw(anchor) < 0 becomes 0, leaves S* and is counted."""
        subgroup = make_subgroup(with_reward(right(), 0.5), [wrong()] * 2, reflect_on=0)
        update = subgroup_update(subgroup, SETTINGS, right(reflected=True))
        assert update.anchor_clamped
        assert roles(update) == ["reflected_success", "negative"]
        assert update.num_sequences == 2

    def test_zero_advantage_is_outside_s_star(self):
        """Eq. 12: S* = {A != 0}: r = (1, .5, 0) leaves the middle out of sequences and counts."""
        negatives = [with_reward(wrong(), 0.5), with_reward(wrong(think=30), 0.0)]
        update = subgroup_update(make_subgroup(right(), negatives), SETTINGS)
        assert [s.rollout.reward for s in update.sequences] == [1.0, 0.0]
        assert update.num_sequences == 2
        assert update.num_tokens == len(right().token_ids) + len(negatives[1].token_ids)

    def test_equal_rewards_train_nothing(self):
        """Eq. 7 gives zeros everywhere: no sequence, no count, and a reason."""
        update = subgroup_update(make_subgroup(with_reward(right(), 0.5), []), SETTINGS)
        assert update.skipped == "no_negatives"
        level = [with_reward(wrong(), 0.5)] * 3
        update = subgroup_update(make_subgroup(with_reward(right(), 0.5), level), SETTINGS)
        assert update.skipped == "no_signal" and update.num_sequences == 0

    def test_rescue_by_hand(self):
        """Corollary 2 with K' = 2, K = 4: A = sqrt 2 (sqrt 2, -s / sqrt 2 x2) = (2, -.5, -.5)."""
        group = make_group([wrong()] * 3, log_prob_sums=[-9.0, -1.0, -9.0])
        subgroup = select_subgroup(group, SETTINGS)
        assert isinstance(subgroup, Subgroup)
        update = subgroup_update(subgroup, SETTINGS)
        assert advantages(update) == pytest.approx([2.0, -0.5, -0.5], rel=1e-4)
        assert roles(update) == ["proxy_anchor", "negative", "negative"]
        assert update.rescued and update.num_negatives == 2


class TestCounting:
    """Line 26."""

    def test_by_accuracy_and_by_reward(self):
        """A repaired sample below the anchor is no negative; to line 26 it is one."""
        subgroup = make_subgroup(right(), [wrong(), wrong()])
        repaired = replace(
            subgroup.others[0], rollout=make_rollout(1.0, 0.0), shaped_reward=0.9, is_negative=False
        )
        subgroup = replace(subgroup, others=(repaired, subgroup.others[1]))
        assert count_negatives(subgroup, SETTINGS) == 1
        assert count_negatives(subgroup, care("count_negatives_by=reward")) == 2


class TestCredit:
    """Lines 40-41 through the subgroup."""

    def test_rationales_by_role(self):
        """acc = 1 earns gamma+ on its rationale (anchor, repaired), acc = 0 nothing."""
        subgroup = make_subgroup(right(), [wrong()] * 2, reflect_on=0)
        update = subgroup_update(subgroup, SETTINGS, right(reflected=True))
        share = 0.005 / (5 * 0.005 + 5)
        first = [float(token_weights(s)[0]) for s in update.sequences]
        assert first == pytest.approx([share, share, 0.0])

    def test_a_pseudo_anchor_is_a_failure(self):
        """Line 40 reads acc: its answer is encouraged, its rationale is not."""
        subgroup = select_subgroup(make_group([wrong()] * 3), SETTINGS)
        assert isinstance(subgroup, Subgroup)
        weights = token_weights(subgroup_update(subgroup, SETTINGS).sequences[0])
        assert weights.tolist() == pytest.approx([0.0] * 5 + [0.2] * 5)

    def test_a_malformed_pseudo_anchor_earns_nothing(self):
        """Its advantage is positive: with weights, broken output would be rewarded."""
        settings = care("proxy_requires_format=false")
        group = make_group([broken(), wrong(), wrong()], log_prob_sums=[-1.0, -90.0, -90.0])
        subgroup = select_subgroup(group, settings)
        assert isinstance(subgroup, Subgroup)
        sequence = subgroup_update(subgroup, settings).sequences[0]
        assert sequence.role == "proxy_anchor" and sequence.advantage > 0
        assert token_weights(sequence).tolist() == [0.0] * 6
