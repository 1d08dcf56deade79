"""What each token weighs (Algorithm 1, lines 40-41), by hand.

Eq. 11 itself is held in tests/kernels/test_spans.py.
"""

from dataclasses import replace

import pytest
import torch

from care_train.algorithm.care import subgroup_update
from care_train.algorithm.region_weights import departures, spread_advantages
from care_train.algorithm.types import Member, Rollout, Subgroup
from tests.algorithm.builders import (
    broken,
    care,
    make_group,
    make_subgroup,
    region_weights,
    right,
    subgroup_of,
    token_weights,
    wrong,
)

G = 0.005  # gamma+
PAPERS = [G] * 4 + [1] * 4
SILENT = [0] * 4 + [1] * 4


@pytest.mark.parametrize(
    ("rollout", "is_positive", "change", "expected"),
    [
        # acc = 1: gamma+ from <think> to </think>, 1 from <answer> to EOS. acc = 0: no rationale.
        (right(think=2, answer=1), True, "credit=regions", PAPERS),
        (wrong(think=2, answer=1), False, "credit=regions", SILENT),
        # Not the paper's: every token alike; a negative's rationale too (Figure 8's control).
        (right(), True, "credit=uniform", [1] * 10),
        (broken(), False, "credit=uniform", [1] * 6),
        (wrong(think=2, answer=1), False, "credit=unmasked", PAPERS),
        # A percentage is of a positive's credit, however long its rationale is; a negative's
        # rationale weighs 0 whatever it is.
        (right(think=2, answer=1), True, "think_weight=25%", [1 / 3] * 4 + [1] * 4),
        (right(think=398, answer=1), True, "think_weight=25%", [1 / 300] * 400 + [1] * 4),
        (wrong(think=2, answer=1), False, "think_weight=25%", SILENT),
    ],
)
def test_weights_by_hand(rollout, is_positive, change, expected):
    """Line 40, of a positive or of a negative; test_end_to_end.py has the rest of it."""
    found = region_weights(
        rollout, care(change), is_negative=not is_positive, earns_rationale=is_positive
    )
    assert found.tolist() == pytest.approx(expected)


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


@pytest.mark.parametrize("credit", ["regions", "departure"])
def test_a_pseudo_anchor_is_a_failure(credit):
    """Line 40 reads acc: its answer is encouraged, its rationale is not, nor is that of the
    negatives corrected, which may be right where they depart from it."""
    update = subgroup_update(subgroup_of(make_group([wrong()] * 3)), care(f"credit={credit}"))
    for sequence in update.sequences:
        weights = token_weights(sequence)
        assert weights.tolist() == pytest.approx([0.0] * 5 + [0.2] * 5)


def test_verified_steps_of_a_rescue():
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
