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
from care_train.algorithm.region_weights import spread_advantages
from care_train.algorithm.types import GroupUpdate, RolloutGroup, Subgroup
from care_train.config import CareSettings, build_config
from tests.algorithm.builders import (
    broken,
    care,
    indices,
    make_group,
    make_rollout,
    make_subgroup,
    right,
    token_advantages,
    token_weights,
    with_reward,
    wrong,
)

SETTINGS = CareSettings()
ROOT2, ROOT3, ROOT43 = math.sqrt(2), math.sqrt(3), math.sqrt(4 / 3)
HALF = with_reward(right(), 0.5)
REPAIRED = right(reflected=True)
REPAIRED_UNFORMED = make_rollout(1.0, 0.0, reflected=True)
FAILED = wrong(reflected=True)


def subgroup_of(group: RolloutGroup, settings: CareSettings = SETTINGS) -> Subgroup:
    subgroup = select_subgroup(group, settings)
    assert isinstance(subgroup, Subgroup), subgroup
    return subgroup


def advantages(update: GroupUpdate) -> list[float]:
    return pytest.approx([sequence.advantage for sequence in update.sequences], rel=1e-4)


def roles(update: GroupUpdate) -> list[str]:
    return [sequence.role for sequence in update.sequences]


class TestSubgroup:
    """Lines 3-10 and 21-25."""

    def test_anchor_and_nearest_failures(self):
        """Lines 5-10: S = {y+} and K' = K = 2 hard negatives; a partial answer is left out."""
        settings = replace(SETTINGS, max_negatives=2, preselect_size=2)
        rollouts = [wrong(), right(think=9), wrong(), right(think=2), make_rollout(0.5), wrong()]
        subgroup = subgroup_of(make_group(rollouts, [50, 0, 90, 100, 101, 130]), settings)
        assert indices(subgroup) == [3, 2, 5]
        assert [m.is_negative for m in subgroup.members] == [False, True, True]
        assert [m.shaped_reward for m in subgroup.members] == [1.0, 0.1, 0.1]
        assert not subgroup.rescued and subgroup.reflect_on == 0

    @pytest.mark.parametrize(
        ("target", "degrees", "count", "scale"),
        [
            (2.0, (60, 60, 60), 1, 0.5),  # one negative: 1 / s
            (3.0, (60, 300, 60), 2, 0.5),  # two with |h_1 + h_2| = 1: 2 / s
            (3.0, (60, 60, 60), 3, 1 / 3),  # three that are the same: 1 / s
        ],
    )
    def test_negatives_and_their_scale_adapt_to_a_target(self, target, degrees, count, scale):
        """`target_snr`: as many negatives as it takes, else a smaller s, of a failed reflection
        too."""
        settings = replace(SETTINGS, target_snr=target, selector="nearest")
        group = make_group([right(), wrong(), wrong(), wrong()], [0, *degrees])
        subgroup = subgroup_of(group, settings)
        assert indices(subgroup) == [0, 1, 2, 3][: count + 1]
        same = replace(SETTINGS, neg_scale=scale, selector="nearest", max_negatives=4)
        plain = make_subgroup(right(), [wrong()] * count, reflect_on=0)
        found, expected = (
            subgroup_update(one, chosen, FAILED)
            for one, chosen in ((subgroup, settings), (plain, same))
        )
        assert [s.advantage for s in found.sequences] == advantages(expected)

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
        subgroup = subgroup_of(make_group([right(), wrong(), right(), wrong()]))
        assert indices(subgroup) == [0, 1, 3] and subgroup.num_negatives == 2

    def test_rescue(self):
        """Lines 22-24: the likeliest failure against its nearest others, r~ = (delta, -delta/3)."""
        group = make_group([wrong()] * 4, [40, 0, 10, 80], [-3.0, -1.0, -2.0, -5.0])
        subgroup = subgroup_of(group)
        assert subgroup.rescued and subgroup.reflect_on is None
        assert indices(subgroup) == [1, 2, 0, 3]
        assert [m.is_negative for m in subgroup.members] == [False, True, True, True]

    @pytest.mark.parametrize(
        ("failures", "changes", "shaped"),
        [
            # Line 23: K' = min(K, ...), the same K' in -delta/K'.
            (8, ["max_negatives=3"], [0.1] + [-0.1 / 3] * 3),
            (3, [], [0.1] + [-0.05] * 2),
            # To the letter K' counts the pseudo-anchor: not zero-sum where failures are few.
            (3, ["rescue_size=literal"], [0.1] + [-0.1 / 3] * 2),
            (3, ["rescue_size=literal", "max_negatives=2"], [0.1] + [-0.05] * 2),
        ],
    )
    def test_rescue_size(self, failures, changes, shaped):
        """`rescue_size`: min(K, failures - 1), or line 23's min(K, failures)."""
        subgroup = subgroup_of(make_group([wrong()] * failures), care(*changes))
        assert [m.shaped_reward for m in subgroup.members] == pytest.approx(shaped)

    @pytest.mark.parametrize(
        ("accuracies", "changes", "reason"),
        [
            ((1, 0), [], None),
            ((0, 0), [], None),
            ((1, 1), [], "all_correct"),
            ((1, 0.5), [], "no_failures"),
            ((0,), [], "all_wrong"),
            ((0, 0), ["rescue=0"], "all_wrong"),
            ((0, 0, 0.5), [], "no_positives"),
            ((0.5, 0.5), [], "no_positives"),
        ],
    )
    def test_who_is_skipped(self, accuracies, changes, reason):
        """Line 7, with a true reason; known before the old policy's forward, which it saves."""
        settings, rollouts = care(*changes), [make_rollout(float(a)) for a in accuracies]
        found = select_subgroup(make_group(rollouts), settings)
        assert (found if isinstance(found, str) else None) == reason
        assert (skip_before_forward(tuple(rollouts), settings) is None) == (reason is None)


CASES = {
    # r = (1, .1, .1): A_raw = (sqrt 2, -1/sqrt 2 x2), s = 1/2, sqrt(4/2).
    "two negatives": ([], 2, None, [2, -0.5, -0.5], "aNN"),
    "K_S = K is not rescaled": ([], 4, None, [2] + [-0.25] * 4, "aNNNN"),
    "Figure 9's control": (["equalize=false"], 2, None, [ROOT2] + [-ROOT2 / 4] * 2, "aNN"),
    "scale is for rescues alone": (["rescue=0.25"], 2, None, [2, -0.5, -0.5], "aNN"),
    # Lines 15-16, 34-39: S = {1, 1, .1}, K_S = 1, factor 2; the repair is not the anchor.
    "repaired": ([], 2, REPAIRED, [ROOT2, ROOT2, -ROOT2], "aSN"),
    "repaired, penalised": (
        ["repaired_advantage=penalized"],
        *(2, REPAIRED, [ROOT2, -ROOT2 / 2, -ROOT2], "aSN"),
    ),
    # Line 18: S = {1, .1, .1, .1}: s_refl = s/2, K_S = 3.
    "failed": (
        [],
        *(2, FAILED, [ROOT43 * x / ROOT3 for x in (3, -0.5, -0.5, -0.25)], "aNNF"),
    ),
    "failed, replaces": (["failed_reflection=replace"], 2, FAILED, [2, -0.25, -0.5], "aFN"),
    "s_refl up to s": (
        ["failed_reflection=replace", "reflection.reflect_scale=0.4"],
        *(2, FAILED, [2, -0.4, -0.5], "aFN"),
    ),
    # Line 39: K_S = K + 1 is not scaled down.
    "K_S > K": (
        ["max_negatives=2"],
        *(2, FAILED, [x / ROOT3 for x in (3, -0.5, -0.5, -0.25)], "aNNF"),
    ),
}
ROLES = {"a": "anchor", "N": "negative", "S": "reflected_success", "F": "reflected_failure"}


class TestAdvantages:
    """Lines 26-39."""

    @pytest.mark.parametrize("name", CASES)
    def test_by_hand(self, name):
        """An anchor and well-formed failures, the first of which reflects."""
        changes, negatives, reflected, expected, who = CASES[name]
        subgroup = make_subgroup(right(), [wrong()] * negatives, reflect_on=0)
        update = subgroup_update(subgroup, care(*changes), reflected)
        assert advantages(update) == expected
        assert roles(update) == [ROLES[letter] for letter in who]
        assert update.num_negatives == who.count("N") + who.count("F")
        assert update.num_sequences == len(who)
        assert update.num_tokens == sum(len(s.rollout.token_ids) for s in update.sequences)
        assert not (update.rescued or update.anchor_clamped) and update.skipped is None

    def test_format_gaps_among_negatives(self):
        """r = (1, .1, 0, 0): mu = .275, sigma^2 = .171875; better negatives are blamed less."""
        update = subgroup_update(make_subgroup(right(), [wrong(), broken(), broken()]), SETTINGS)
        sigma = math.sqrt(0.176875) + 1e-6
        expected = [0.725, -0.5 * 0.175, -0.5 * 0.275, -0.5 * 0.275]
        assert advantages(update) == [ROOT43 * x / sigma for x in expected]

    def test_a_negative_above_the_mean_is_still_blamed(self):
        """Line 37: -s |A_raw|: r = (1, .9, 0, 0) has a negative with A_raw > 0."""
        negatives = [with_reward(wrong(), 0.9), broken(), broken()]
        update = subgroup_update(make_subgroup(right(), negatives), SETTINGS)
        assert update.sequences[1].raw_advantage > 0 > update.sequences[1].advantage

    def test_statistics_follow_the_reflection(self):
        """Line 29 is after line 20: a repaired sample without format moves mu and sigma."""
        subgroup = make_subgroup(right(), [broken()] * 2, reflect_on=1)
        update = subgroup_update(subgroup, SETTINGS, REPAIRED_UNFORMED)
        mu = (1.0 + 0.0 + 0.9) / 3
        sigma = math.sqrt(((1 - mu) ** 2 + mu**2 + (0.9 - mu) ** 2) / 3) + 1e-6
        raw = [sequence.raw_advantage for sequence in update.sequences]
        assert raw == pytest.approx([(1 - mu) / sigma, -mu / sigma, (0.9 - mu) / sigma])

    @pytest.mark.parametrize(
        ("changes", "negatives", "count"),
        [
            ([], 2, 1),
            (["count_negatives_by=reward"], 2, 2),
            # Line 27: nothing to contrast with by accuracy, one negative to the letter.
            ([], 1, 0),
            (["count_negatives_by=reward"], 1, 1),
        ],
    )
    def test_who_counts_as_negative(self, changes, negatives, count):
        """Line 26: K_S counts acc = 0, or rewards below the anchor's: a repair with less format."""
        subgroup = make_subgroup(right(), [wrong()] * negatives, reflect_on=0)
        update = subgroup_update(subgroup, care(*changes), REPAIRED_UNFORMED)
        assert (update.num_negatives if update.sequences else 0) == count
        assert update.skipped == (None if count else "no_negatives")
        assert count_negatives(subgroup, care(*changes)) == negatives

    @pytest.mark.parametrize("clamped", [True, False])
    def test_an_anchor_below_the_mean(self, clamped):
        """r = (.5, 1, .1): A_raw(anchor) < 0 becomes 0, leaves S* and is counted; line 34: not."""
        settings = care(f"clamp_anchor={clamped}")
        subgroup = make_subgroup(HALF, [wrong()] * 2, reflect_on=0)
        update = subgroup_update(subgroup, settings, REPAIRED)
        assert update.anchor_clamped == clamped
        assert roles(update) == ["anchor"] * (not clamped) + ["reflected_success", "negative"]
        assert clamped or update.sequences[0].advantage < 0

    def test_zero_advantage_is_outside_s_star(self):
        """Eq. 12: S* = {A != 0}: r = (1, .5, 0) leaves the middle out of sequences and counts."""
        negatives = [with_reward(wrong(), 0.5), with_reward(wrong(think=30), 0.0)]
        update = subgroup_update(make_subgroup(right(), negatives), SETTINGS)
        assert [s.rollout.reward for s in update.sequences] == [1.0, 0.0]
        assert update.num_sequences == 2
        assert update.num_tokens == len(right().token_ids) + len(negatives[1].token_ids)

    @pytest.mark.parametrize(("count", "reason"), [(0, "no_negatives"), (3, "no_signal")])
    def test_equal_rewards_train_nothing(self, count, reason):
        """Eq. 7 gives zeros everywhere: no sequence, no count, and a reason."""
        level = [with_reward(wrong(), 0.5)] * count
        update = subgroup_update(make_subgroup(HALF, level), SETTINGS)
        assert (update.skipped, update.num_sequences, update.num_tokens) == (reason, 0, 0)

    @pytest.mark.parametrize(
        ("scale", "expected"), [(1.0, [2, -0.5, -0.5]), (0.25, [0.5, -0.125, -0.125])]
    )
    def test_rescue(self, scale, expected):
        """Corollary 2 with K' = 2, K = 4: A = (2, -.5, -.5), times care.rescue.

        The factor reported is sqrt(K / K_S) alone.
        """
        settings = care(f"rescue={scale}")
        group = make_group([wrong()] * 3, log_prob_sums=[-9.0, -1.0, -9.0])
        update = subgroup_update(subgroup_of(group, settings), settings)
        assert advantages(update) == expected
        assert roles(update) == ["proxy_anchor", "negative", "negative"]
        assert update.rescued and update.skipped is None
        assert update.equalize_factor == pytest.approx(ROOT2)


class TestCredit:
    """Lines 40-41 through the subgroup."""

    def test_rationales_by_role(self):
        """acc = 1 earns gamma+ on its rationale (anchor, repaired), acc = 0 nothing."""
        subgroup = make_subgroup(right(), [wrong()] * 2, reflect_on=0)
        update = subgroup_update(subgroup, SETTINGS, REPAIRED)
        share = 0.005 / (5 * 0.005 + 5)
        first = [float(token_weights(s)[0]) for s in update.sequences]
        assert first == pytest.approx([share, share, 0.0])

    @pytest.mark.parametrize("credit", ["regions", "departure"])
    def test_a_pseudo_anchor_is_a_failure(self, credit):
        """Line 40 reads acc: its answer is encouraged, its rationale is not, nor is that of the
        negatives corrected, which may be right where they depart from it."""
        update = subgroup_update(subgroup_of(make_group([wrong()] * 3)), care(f"credit={credit}"))
        for sequence in update.sequences:
            weights = token_weights(sequence)
            assert weights.tolist() == pytest.approx([0.0] * 5 + [0.2] * 5)

    def test_verified_steps_of_a_rescue(self):
        """Where the first wrong step of each is known, each is credited up to it and blamed for it,
        the pseudo-anchor too; where one is not, the group is skipped."""
        steps = {(1, 2, 3, 4, 9): (4, 5), (1, 2, 8, 4, 9): (2, 3), (1, 7, 3, 4, 9): (1, 2)}
        rollouts = [
            replace(wrong(), token_ids=ids, spans=replace(wrong().spans, wrong_step=span))
            for ids, span in steps.items()
        ]
        settings = care("credit=steps")
        group = make_group(rollouts, log_prob_sums=[-1.0, -9.0, -9.0])
        sequences = subgroup_update(subgroup_of(group, settings), settings).sequences
        signs = [spread_advantages([sequence]).sign().tolist() for sequence in sequences]
        assert signs == [[1, 1, 1, 1, -1], [1, 1, -1, 0, 0], [1, -1, 0, 0, 0]]
        group = make_group([*rollouts[:2], wrong()], log_prob_sums=[-1.0, -9.0, -9.0])
        assert subgroup_update(subgroup_of(group, settings), settings).skipped == "no_wrong_step"

    def test_a_malformed_pseudo_anchor_earns_nothing(self):
        """Its advantage is positive: with weights, broken output would be rewarded."""
        settings = care("proxy_requires_format=false")
        group = make_group([broken(), wrong(), wrong()], log_prob_sums=[-1.0, -90.0, -90.0])
        sequence = subgroup_update(subgroup_of(group, settings), settings).sequences[0]
        assert sequence.role == "proxy_anchor" and sequence.advantage > 0
        assert token_weights(sequence).tolist() == [0.0] * 6


class TestToTheLetter:
    """Three ways Algorithm 1 fails when taken to the letter, and what the defaults do instead."""

    DEFAULT, LITERAL = build_config({}).care, build_config({"preset": "literal"}).care
    UNREASONED = make_rollout(1.0, 0.0, think=None)
    GARBAGE = broken(think=None)
    LONG = (wrong(think=0, answer=0), wrong(think=20))

    @pytest.mark.parametrize(
        ("rollouts", "sums", "default", "literal"),
        [
            # T_think = 0 always wins Eq. 2: rewarded, it teaches the policy to stop reasoning.
            ([wrong(), right(think=12), UNREASONED, right(think=7)], None, 3, 2),
            # Where no positive is well-formed there is still an anchor.
            ([wrong(), make_rollout(1.0, 0.0, think=4), UNREASONED], None, 2, 2),
            # A sum of log-probs is highest for the shortest garbage, which then takes over.
            ([wrong(think=9), GARBAGE, wrong(think=6)], (-32.0, -4.0, -14.0), 2, 1),
            # Equally likely per token, a longer failure loses nothing; here it is a little better.
            (LONG, [-p * len(r.token_ids) for p, r in zip((0.5, 0.49), LONG, strict=True)], 1, 0),
        ],
        ids=["unreasoned", "no format", "garbage", "length"],
    )
    def test_the_anchor(self, rollouts, sums, default, literal):
        """Well-formed ones first, and likelihood per token; or Eq. 2 and line 22 as printed."""
        group = make_group(rollouts, log_prob_sums=sums)
        assert indices(subgroup_of(group, self.DEFAULT))[0] == default
        assert indices(subgroup_of(group, self.LITERAL))[0] == literal

    def test_only_garbage_is_not_rescued(self):
        """Without a well-formed failure nothing is worth pulling toward: the group is skipped."""
        group = make_group([broken(), broken(think=1), self.GARBAGE])
        assert select_subgroup(group, self.DEFAULT) == "no_proxy_anchor"
        assert isinstance(select_subgroup(group, self.LITERAL), Subgroup)

    def test_broken_output_is_penalised(self):
        """Line 40 has no region in it, so nothing would: by default all T = 7 tokens share A."""
        group = make_group([right(), broken(think=4), wrong()])
        for settings, share in ((self.DEFAULT, 1 / 7), (self.LITERAL, 0.0)):
            update = subgroup_update(subgroup_of(group, settings), settings)
            sequence = next(s for s in update.sequences if not s.rollout.spans.well_formed)
            assert sequence.advantage < 0
            credit = token_advantages(sequence).tolist()
            assert credit == pytest.approx([sequence.advantage * share] * 7)
