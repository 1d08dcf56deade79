"""Region weights and Eq. 11 (Algorithm 1, lines 40-41)."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from care_train.algorithm.care import subgroup_update
from care_train.algorithm.region_weights import departures, spread_advantages
from care_train.algorithm.types import Member, Spans, Subgroup, TrainSequence
from tests.algorithm.builders import (
    broken,
    care,
    credit_of,
    make_rollout,
    make_subgroup,
    region_weights,
    right,
    token_advantages,
    token_weights,
    wrong,
)

GAMMA = 0.005


def spread(advantage: float, weights: list[float], weight_eps: float = 1e-8) -> torch.Tensor:
    """Eq. 11 on tokens of any weights."""
    rollout = replace(make_rollout(), token_ids=tuple(range(len(weights))))
    credit = credit_of(weights, weight_eps=weight_eps)
    return token_advantages(TrainSequence(rollout, advantage, credit))


def weights(rollout, is_positive, **changes) -> list[float]:
    """Of a positive, or of a negative; a pseudo-anchor is tested apart."""
    values = region_weights(
        rollout,
        care(*(f"{key}={value}" for key, value in changes.items())),
        is_negative=not is_positive,
        earns_rationale=is_positive,
    )
    assert values.dtype == torch.float32
    return pytest.approx(values.tolist())


def test_a_positive_earns_its_rationale_a_little_and_its_answer_fully():
    """Line 40, acc = 1: gamma+ from <think> to </think>, 1 from <answer> to EOS."""
    expected = [GAMMA] * 4 + [1.0] * 3 + [1.0]
    assert weights(right(think=2, answer=1), True) == expected


def test_a_negative_is_not_blamed_for_its_rationale():
    """Line 40, acc = 0: the rationale weighs 0, the answer and EOS 1."""
    assert weights(wrong(think=2, answer=1), False) == [0.0] * 4 + [1.0] * 3 + [1.0]


def test_text_outside_both_spans_weighs_nothing():
    """Line 40 names two regions; a token in neither has no weight."""
    spans = Spans(think=(1, 3), think_content=(2, 2), answer=(4, 6), answer_content=(5, 5))
    rollout = replace(right(think=2, answer=2), spans=spans, token_ids=tuple(range(8)))
    assert weights(rollout, True) == [0, GAMMA, GAMMA, 0, 1, 1, 0, 1]


def test_no_eos_where_the_length_limit_cut():
    """An unfinished response's last token is no EOS."""
    spans = Spans(None, None, answer=(0, 2), answer_content=(1, 1))
    cut = replace(wrong(finished=False), spans=spans, token_ids=(1, 2, 3))
    assert weights(cut, False) == [1, 1, 0]
    assert weights(replace(cut, finished=True), False) == [1, 1, 1]


def test_an_answer_inside_the_rationale_is_an_answer():
    """Where regions overlap, the answer's weight wins."""
    spans = Spans(think=(0, 7), think_content=(1, 6), answer=(2, 5), answer_content=(3, 4))
    rollout = replace(right(), spans=spans, token_ids=tuple(range(7)), finished=False)
    assert weights(rollout, True) == [GAMMA, GAMMA, 1, 1, 1, GAMMA, GAMMA]
    assert weights(rollout, False) == [0, 0, 1, 1, 1, 0, 0]


def test_a_tag_token_shared_with_content_weighs_as_content():
    """A token that touches the content is content, whatever `tag_weight` says."""
    spans = Spans(think=(0, 4), think_content=(1, 4), answer=(4, 7), answer_content=(4, 6))
    rollout = replace(right(), spans=spans, token_ids=tuple(range(8)))
    assert weights(rollout, True, tag_weight=0.0) == [0, GAMMA, GAMMA, GAMMA, 1, 1, 0, 0]


@pytest.mark.parametrize("is_positive", [True, False])
def test_tag_weight_sets_tags_and_eos(is_positive):
    """`tag_weight`: tags of both spans and EOS weigh this much in positives and negatives."""
    think = GAMMA if is_positive else 0.0
    expected = [0.3, think, think, 0.3, 0.3, 1.0, 0.3, 0.3]
    assert weights(right(think=2, answer=1), is_positive, tag_weight=0.3) == expected


def test_think_weight_is_gamma():
    """care.think_weight is gamma+; 0 is the answer-only objective of Figure 8."""
    assert weights(right(think=1, answer=0), True, think_weight=0.25) == [0.25] * 3 + [1] * 3
    assert weights(right(think=1, answer=0), True, think_weight=0.0) == [0, 0, 0, 1, 1, 1]


@pytest.mark.parametrize(
    ("malformed", "positive", "negative"),
    [("penalize", 0.0, 1.0), ("ignore", 0.0, 0.0)],
)
def test_a_response_without_answer_span(malformed, positive, negative):
    """`malformed`: what each token of a response without a complete answer pair weighs."""
    assert weights(broken(), True, malformed=malformed) == [positive] * 6
    assert weights(broken(), False, malformed=malformed) == [negative] * 6


@pytest.mark.parametrize("malformed", ["penalize", "ignore"])
def test_a_malformed_pseudo_anchor_earns_nothing(malformed):
    """A pseudo-anchor is rewarded: where malformed, as a positive is, on no token."""
    settings = care(f"malformed={malformed}")
    found = region_weights(broken(), settings, is_negative=False, earns_rationale=False)
    assert found.tolist() == [0] * 6


@pytest.mark.parametrize(("malformed", "weight"), [("penalize", 1), ("ignore", 0)])
def test_a_negative_of_bad_format(malformed, weight):
    """care.malformed_when: bad_format: a negative with fmt < 1 is malformed, answer or not."""
    negative = make_rollout(0.0, 0.0, think=2, answer=1)
    plain = [0.0] * 4 + [1.0] * 4
    assert weights(negative, False, malformed=malformed) == plain
    changes = {"malformed": malformed, "malformed_when": "bad_format"}
    assert weights(negative, False, **changes) == [weight] * 8
    assert weights(wrong(think=2, answer=1), False, **changes) == plain


@pytest.mark.parametrize("malformed", ["penalize", "ignore"])
def test_a_positive_of_bad_format_keeps_its_regions(malformed):
    """care.malformed_when: bad_format is about negatives: a correct answer is still credited."""
    positive = make_rollout(1.0, 0.0, think=2, answer=1)
    changes = {"malformed": malformed, "malformed_when": "bad_format"}
    assert weights(positive, True, **changes) == [GAMMA] * 4 + [1.0] * 4


def test_a_response_of_eos_alone_is_malformed():
    """Nothing but EOS: penalised on that one token."""
    assert weights(make_rollout(0, 0, think=None, answer=None), False) == [1.0]


def test_token_advantages_by_hand():
    """Eq. 11: w = (.5, .5, 1), eps_w = 2: a = A w / (2 + 2)."""
    tokens = spread(-8.0, [0.5, 0.5, 1.0], weight_eps=2.0)
    assert tokens.tolist() == pytest.approx([-1.0, -1.0, -2.0])


@given(
    st.lists(st.sampled_from([0.0, 0.005, 1.0]), min_size=1, max_size=30).filter(any),
    st.floats(-3, 3),
)
def test_a_sequence_hands_out_its_whole_advantage(values, advantage):
    """Eq. 11: over a sequence the a_t sum to A, however long it is."""
    tokens = spread(advantage, values)
    assert float(tokens.sum()) == pytest.approx(advantage, rel=1e-4, abs=1e-6)


def test_no_weight_is_no_advantage():
    """eps_w: a sequence whose weights are all 0 gets zeros, not NaN."""
    assert spread(2.0, [0.0] * 4).tolist() == [0.0] * 4


class TestOtherCredit:
    """`care.credit` and `care.think_share`, which are not the paper's."""

    @staticmethod
    def rollout(accuracy: float, *token_ids: int, reflected: bool = False):
        made = right() if accuracy else wrong()
        return replace(made, token_ids=token_ids, reflected=reflected)

    @staticmethod
    def member(rollout) -> Member:
        return Member(rollout, rollout.reward, is_negative=rollout.accuracy == 0)

    def departures_of(self, *rollouts) -> list[int]:
        anchor, *others = map(self.member, rollouts)
        return departures(Subgroup(anchor, tuple(others)))

    def test_a_negative_weighs_from_where_it_leaves_the_anchor(self):
        """[1 2 3 4] is right: [1 2 9 9] departs at 2, [1 8 9] at 1, where the anchor does first."""
        found = self.departures_of(
            self.rollout(1, 1, 2, 3, 4), self.rollout(0, 1, 2, 9, 9), self.rollout(0, 1, 8, 9)
        )
        assert found == [1, 2, 1]

    def test_of_several_positives_a_negative_leaves_the_one_it_follows_longest(self):
        """[1 5 6 9] follows the first positive for one token and the second for three."""
        found = self.departures_of(
            self.rollout(1, 1, 2, 3), self.rollout(1, 1, 5, 6, 7), self.rollout(0, 1, 5, 6, 9)
        )
        assert found == [1, 3, 3]

    def test_a_reflected_response_is_compared_with_none(self):
        """It follows a prompt of its own: it weighs whole and moves nobody's departure."""
        found = self.departures_of(
            self.rollout(1, 1, 2, 3),
            self.rollout(0, 1, 2, 9),
            self.rollout(0, 7, 7, reflected=True),
            self.rollout(1, 1, 2, 3, reflected=True),
        )
        assert found == [2, 2, 0, 0]

    def test_a_prefix_departs_at_its_end(self):
        """A response cut short by its limit leaves no token that differs."""
        assert self.departures_of(self.rollout(1, 1, 2, 3), self.rollout(0, 1, 2)) == [2, 2]

    @given(st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=6), min_size=2, max_size=6))
    def test_departures_lie_within_their_response(self, token_ids):
        """Each is between 0 and the length, and the tokens before it are some other member's."""
        rollouts = [self.rollout(place == 0, *ids) for place, ids in enumerate(token_ids)]
        found = self.departures_of(*rollouts)
        for start, ids in zip(found[1:], token_ids[1:], strict=True):
            assert start <= len(ids) and ids[:start] == token_ids[0][:start]
            assert found[0] <= start

    def test_the_update_weighs_from_the_departure_on(self):
        """The negative's credit is spread over its last two tokens, the anchor's over three."""
        anchor, near, far = (
            self.rollout(1, 1, 2, 3, 4),
            self.rollout(0, 1, 2, 9, 9),
            self.rollout(0, 1, 8, 9),
        )
        settings = care("credit=departure", "reflection.enabled=false", "equalize=false")
        update = subgroup_update(make_subgroup(anchor, [near, far]), settings)
        first, second, third = (token_weights(sequence).tolist() for sequence in update.sequences)
        assert first == pytest.approx([0, 1 / 3, 1 / 3, 1 / 3])
        assert second == pytest.approx([0, 0, 1 / 2, 1 / 2])
        assert third == pytest.approx([0, 1 / 2, 1 / 2])

    def test_verified_steps_are_credited_and_the_wrong_one_is_blamed(self):
        """Sec. 10.2, whatever the answer: of four tokens each weighs a quarter of |A|."""
        lucky = self.rollout(1, 1, 2, 3, 4)
        lucky = replace(lucky, spans=replace(lucky.spans, wrong_step=(2, 3)))
        named = self.rollout(0, 1, 2, 9, 9)
        named = replace(named, spans=replace(named.spans, wrong_step=(1, 2)))
        silent = self.rollout(0, 1, 8, 9, 9)
        settings = care("credit=steps", "reflection.enabled=false", "equalize=false")
        update = subgroup_update(make_subgroup(lucky, [named, silent]), settings)
        sequences = update.sequences
        found = spread_advantages(sequences).view(3, 4)
        sizes = torch.tensor([[abs(sequence.advantage) / 4] for sequence in sequences])
        signs = torch.tensor([[1.0, 1, -1, 0], [1, -1, 0, 0], [-1, -1, -1, -1]])
        assert [sequence.advantage > 0 for sequence in sequences] == [True, False, False]
        torch.testing.assert_close(found, signs * sizes)

    def test_uniform_credit_weighs_every_token(self):
        """Of positives, negatives and malformed responses alike."""
        for rollout in (right(), broken()):
            ones = [1.0] * len(rollout.token_ids)
            assert weights(rollout, True, credit="uniform") == ones
            assert weights(rollout, False, credit="uniform") == ones

    def test_unmasked_failures_earn_like_positives(self):
        """Figure 8's control: gamma+ on a negative's rationale."""
        expected = [GAMMA] * 4 + [1.0] * 3 + [1.0]
        assert weights(wrong(think=2, answer=1), False, credit="unmasked") == expected

    @pytest.mark.parametrize("think", [1, 24, 400])
    def test_a_rationale_gets_its_share_however_long_it_is(self, think):
        """`think_share` = 0.25: a quarter of the credit is the rationale's."""
        settings = care("think_share=0.25")
        values = region_weights(
            right(think=think), settings, is_negative=False, earns_rationale=True
        )
        assert float(values[: think + 2].sum() / values.sum()) == pytest.approx(0.25)
        assert set(values[think + 2 :].tolist()) == {1.0}

    def test_a_share_leaves_negatives_as_they_are(self):
        """A negative's rationale weighs 0 whatever the share."""
        assert weights(wrong(think=2, answer=1), False, think_share=0.25) == [0] * 4 + [1.0] * 4
