"""Three ways Algorithm 1 fails when taken to the letter, and what the defaults do instead."""

import pytest

from care_train.algorithm.care import select_subgroup, subgroup_update
from care_train.algorithm.types import Subgroup
from care_train.config import build_config
from tests.algorithm.builders import (
    broken,
    indices,
    make_group,
    make_rollout,
    right,
    token_advantages,
    wrong,
)

DEFAULT = build_config({}).care
LITERAL = build_config({"preset": "literal"}).care


def subgroup_of(rollouts, care, log_prob_sums=None) -> Subgroup:
    subgroup = select_subgroup(make_group(rollouts, log_prob_sums=log_prob_sums), care)
    assert isinstance(subgroup, Subgroup)
    return subgroup


class TestAnchorWithoutRationale:
    """A correct rollout without <think> has T_think = 0 and always wins Eq. 2.

    Rewarded in every group, it teaches the policy to stop reasoning.
    """

    GROUP = (wrong(), right(think=12), make_rollout(1.0, 0.0, think=None), right(think=7))

    def test_default_anchors_on_a_well_formed_rollout(self):
        """Among positives with fmt = 1 the shortest rationale wins."""
        assert indices(subgroup_of(self.GROUP, DEFAULT))[0] == 3

    def test_literal_anchors_on_the_one_that_does_not_reason(self):
        """Eq. 2 to the letter."""
        assert indices(subgroup_of(self.GROUP, LITERAL))[0] == 2

    def test_where_no_positive_is_well_formed_there_is_still_an_anchor(self):
        """Preferring format does not discard the only correct answers."""
        group = [wrong(), make_rollout(1.0, 0.0, think=4), make_rollout(1.0, 0.0, think=None)]
        assert indices(subgroup_of(group, DEFAULT))[0] == 2


class TestMalformedNegatives:
    """A response without an answer span has no region of weight 1.

    Its weights are all 0 under line 40, so nothing penalises broken output.
    """

    GROUP = (right(), broken(think=4), wrong())

    @staticmethod
    def credit(care) -> list[float]:
        update = subgroup_update(subgroup_of(TestMalformedNegatives.GROUP, care), care)
        sequence = next(s for s in update.sequences if not s.rollout.spans.well_formed)
        assert sequence.advantage < 0
        return token_advantages(sequence).tolist()

    def test_default_penalises_every_token(self):
        """All T = 7 tokens share the advantage alike, and all of it."""
        update = subgroup_update(subgroup_of(self.GROUP, DEFAULT), DEFAULT)
        advantage = update.sequences[1].advantage
        assert self.credit(DEFAULT) == pytest.approx([advantage / 7] * 7)

    def test_literal_penalises_none(self):
        """Line 40 to the letter: zero weight everywhere."""
        assert self.credit(LITERAL) == [0.0] * 7


class TestPseudoAnchorByLikelihood:
    """log pi_old(y | x) sums over tokens, so it is highest for the shortest garbage.

    Rewarded in every all-wrong group, garbage takes over.
    """

    GARBAGE = broken(think=None, finished=True)
    GROUP = (wrong(think=9), GARBAGE, wrong(think=6), wrong(think=20))
    # Garbage of one token at -4; the third is likeliest per token, the first by sum after it.
    SUMS = (-32.0, -4.0, -14.0, -60.0)

    def test_default_takes_the_likeliest_well_formed_failure_per_token(self):
        """`proxy_score: mean`, among failures with fmt = 1."""
        assert indices(subgroup_of(self.GROUP, DEFAULT, self.SUMS))[0] == 2

    def test_literal_takes_the_garbage(self):
        """Line 22 to the letter."""
        assert indices(subgroup_of(self.GROUP, LITERAL, self.SUMS))[0] == 1

    def test_length_does_not_help(self):
        """Equally likely per token, a longer failure loses nothing: here it is a little better."""
        group = [wrong(think=0, answer=0), wrong(think=20)]
        sums = [-0.5 * len(group[0].token_ids), -0.49 * len(group[1].token_ids)]
        assert indices(subgroup_of(group, DEFAULT, sums))[0] == 1
        assert indices(subgroup_of(group, LITERAL, sums))[0] == 0

    def test_only_garbage_is_not_rescued(self):
        """Without a well-formed failure nothing is worth pulling toward: the group is skipped."""
        group = make_group([broken(), broken(think=1), self.GARBAGE])
        assert select_subgroup(group, DEFAULT) == "no_proxy_anchor"
        assert isinstance(select_subgroup(group, LITERAL), Subgroup)
