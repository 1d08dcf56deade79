"""What each token weighs (Algorithm 1, lines 40-41), by hand.

Eq. 11 itself is held in tests/kernels/test_token_advantages.py.
"""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from care_train.algorithm.care import subgroup_update
from care_train.algorithm.region_weights import departures, spread_advantages
from care_train.algorithm.types import Member, Rollout, Spans, Subgroup, TrainSequence
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

G = 0.005  # gamma+


def respanned(rollout: Rollout, count: int, *spans, **fields) -> Rollout:
    """The rollout with `count` tokens and these spans."""
    return replace(rollout, spans=Spans(*spans), token_ids=tuple(range(count)), **fields)


INSIDE = respanned(right(), 7, (0, 7), (1, 6), (2, 5), (3, 4), finished=False)
BAD_FORMAT = make_rollout(0.0, 0.0, think=2, answer=1)
PAPERS = [G] * 4 + [1] * 4
SILENT = [0] * 4 + [1] * 4
BY_FORMAT = "malformed_when=bad_format"


@pytest.mark.parametrize(
    ("rollout", "is_positive", "changes", "expected"),
    [
        # acc = 1: gamma+ from <think> to </think>, 1 from <answer> to EOS. acc = 0: no rationale.
        (right(think=2, answer=1), True, [], PAPERS),
        (wrong(think=2, answer=1), False, [], SILENT),
        # Where regions overlap, the answer's weight wins.
        (INSIDE, True, [], [G, G, 1, 1, 1, G, G]),
        (INSIDE, False, [], [0, 0, 1, 1, 1, 0, 0]),
        # `tag_weight`: of tags and EOS.
        (right(think=2, answer=1), True, ["tag_weight=0.3"], [0.3, G, G, 0.3, 0.3, 1, 0.3, 0.3]),
        # `malformed`: without a complete answer pair a negative is penalised on every token.
        (broken(), False, [], [1] * 6),
        (broken(), True, [], [0] * 6),
        # care.malformed_when: bad_format: any negative with fmt < 1; correct answers keep theirs.
        (BAD_FORMAT, False, [], SILENT),
        (BAD_FORMAT, False, [BY_FORMAT], [1] * 8),
        # Not the paper's: every token alike; a negative's rationale too (Figure 8's control).
        *[(right(), good, ["credit=uniform"], [1] * 10) for good in (True, False)],
        *[(broken(), good, ["credit=uniform"], [1] * 6) for good in (True, False)],
        (wrong(think=2, answer=1), False, ["credit=unmasked"], PAPERS),
        # `think_share`: of a positive's credit; a negative's rationale weighs 0 whatever it is.
        (right(think=2, answer=1), True, ["think_share=0.25"], [1 / 3] * 4 + [1] * 4),
        (wrong(think=2, answer=1), False, ["think_share=0.25"], SILENT),
    ],
)
def test_weights_by_hand(rollout, is_positive, changes, expected):
    """Line 40, of a positive or of a negative; test_end_to_end.py has the rest of it."""
    found = region_weights(
        rollout, care(*changes), is_negative=not is_positive, earns_rationale=is_positive
    )
    assert found.tolist() == pytest.approx(expected)


@pytest.mark.parametrize("think", [1, 24, 400])
def test_a_rationale_gets_its_share_however_long_it_is(think):
    """`think_share` = 0.25: a quarter of the credit is the rationale's."""
    settings, rollout = care("think_share=0.25"), right(think=think)
    values = region_weights(rollout, settings, is_negative=False, earns_rationale=True)
    assert float(values[: think + 2].sum() / values.sum()) == pytest.approx(0.25)


def test_token_advantages_by_hand():
    """Eq. 11: w = (.5, .5, 1), eps_w = 2: a = A w / (2 + 2); weights of 0 give zeros, not NaN."""
    rollout = replace(make_rollout(), token_ids=(0, 1, 2))
    credit = credit_of([0.5, 0.5, 1.0], weight_eps=2.0)
    found = token_advantages(TrainSequence(rollout, -8.0, credit))
    assert found.tolist() == pytest.approx([-1.0, -1.0, -2.0])
    assert not token_advantages(TrainSequence(rollout, 2.0, credit_of([0.0] * 3))).any()


def response(accuracy: float, *token_ids: int, reflected: bool = False, wrong_step=None):
    made = right() if accuracy else wrong()
    spans = replace(made.spans, wrong_step=wrong_step)
    return replace(made, token_ids=token_ids, reflected=reflected, spans=spans)


def departures_of(*rollouts: Rollout) -> list[int]:
    anchor, *others = (Member(r, r.reward, is_negative=r.accuracy == 0) for r in rollouts)
    return departures(Subgroup(anchor, tuple(others)))


class TestDepartures:
    """`care.credit: departure`."""

    @pytest.mark.parametrize(
        ("rollouts", "expected"),
        [
            # [1 2 9 9] leaves the anchor at 2, [1 8 9] at 1, where the anchor does first.
            ([(1, 1, 2, 3, 4), (0, 1, 2, 9, 9), (0, 1, 8, 9)], [1, 2, 1]),
            # Of several positives a negative leaves the one that it follows longest.
            ([(1, 1, 2, 3), (1, 1, 5, 6, 7), (0, 1, 5, 6, 9)], [1, 3, 3]),
            # A response cut short by its limit leaves no token that differs.
            ([(1, 1, 2, 3), (0, 1, 2)], [2, 2]),
        ],
    )
    def test_by_hand(self, rollouts, expected):
        """Accuracy and tokens of each member."""
        assert departures_of(*(response(*rollout) for rollout in rollouts)) == expected

    def test_a_reflected_response_is_compared_with_none(self):
        """It follows a prompt of its own: it weighs whole and moves nobody's departure."""
        repairs = response(0, 7, 7, reflected=True), response(1, 1, 2, 3, reflected=True)
        assert departures_of(response(1, 1, 2, 3), response(0, 1, 2, 9), *repairs) == [2, 2, 0, 0]

    @given(st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=6), min_size=2, max_size=6))
    def test_they_lie_within_their_response(self, token_ids):
        """Each is between 0 and the length, and the tokens before it are the anchor's."""
        found = departures_of(*(response(i == 0, *ids) for i, ids in enumerate(token_ids)))
        for start, ids in zip(found[1:], token_ids[1:], strict=True):
            assert start <= len(ids) and ids[:start] == token_ids[0][:start]
            assert found[0] <= start

    def test_the_update_weighs_from_there_on(self):
        """The negative's credit is spread over its last two tokens, the anchor's over three."""
        anchor, near, far = response(1, 1, 2, 3, 4), response(0, 1, 2, 9, 9), response(0, 1, 8, 9)
        update = subgroup_update(make_subgroup(anchor, [near, far]), care("credit=departure"))
        found = [token_weights(sequence).tolist() for sequence in update.sequences]
        third, half = 1 / 3, 1 / 2
        expected = [[0, third, third, third], [0, 0, half, half], [0, half, half]]
        assert found == [pytest.approx(row) for row in expected]


def test_verified_steps_are_credited_and_the_wrong_one_is_blamed():
    """Sec. 10.2, whatever the answer: of four tokens each weighs a quarter of |A|."""
    lucky, named = (
        response(1, 1, 2, 3, 4, wrong_step=(2, 3)),
        response(0, 1, 2, 9, 9, wrong_step=(1, 2)),
    )
    subgroup = make_subgroup(lucky, [named, response(0, 1, 8, 9, 9)])
    sequences = subgroup_update(subgroup, care("credit=steps")).sequences
    sizes = torch.tensor([[abs(sequence.advantage) / 4] for sequence in sequences])
    signs = torch.tensor([[1.0, 1, -1, 0], [1, -1, 0, 0], [-1, -1, -1, -1]])
    assert [sequence.advantage > 0 for sequence in sequences] == [True, False, False]
    torch.testing.assert_close(spread_advantages(sequences).view(3, 4), signs * sizes)
