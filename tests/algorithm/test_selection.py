"""Who forms the subgroup: Eqs. 2-4 and the pseudo-anchor (Algorithm 1, lines 3-9 and 22-23).

Embeddings are unit vectors in the plane, so a cosine distance grows with the angle between two.
"""

import math
from dataclasses import replace

import pytest
import torch

from care_kernels import pool_rationale
from care_train.algorithm.selection import (
    failures,
    farthest_first,
    pairwise_distances,
    positives,
    select_anchor,
    select_hard_negatives,
    select_proxy_anchor,
)
from care_train.config import CareSettings, Decisions
from tests.algorithm.builders import broken, make_rollout, right, unit_vectors, with_reward, wrong

SETTINGS = CareSettings()


def distances(degrees) -> torch.Tensor:
    """Of unit vectors at these angles."""
    return pairwise_distances(unit_vectors(degrees))


def select(degrees, count, **changes) -> list[int]:
    """Hard negatives among rollouts 1.. for the anchor at index 0."""
    settings = replace(SETTINGS, **changes)
    pool = range(1, len(degrees))
    return select_hard_negatives(pool, count, distances(degrees), 0, settings)


def test_positives_and_failures_go_by_accuracy():
    """Line 3: acc = 1 is positive, acc = 0 a failure, and a partial answer is neither."""
    group = [right(), wrong(), make_rollout(0.5, 1.0), make_rollout(1.0, 0.0), broken()]
    assert positives(group) == [0, 3]
    assert failures(group) == [1, 4]


def test_positives_and_failures_by_reward():
    """By reward (`positive: reward`), a well-formed wrong answer is a positive."""
    group = [right(), wrong(), make_rollout(0.5, 0.0), broken(), with_reward(broken(), -1.0)]
    assert positives(group, "reward") == [0, 1, 2]
    assert failures(group, "reward") == [3, 4]


@pytest.mark.parametrize(
    ("lengths", "expected"),
    [
        ([(5, 1), (2, 9), (3, 1)], 1),
        ([(4, 3), (4, 2), (4, 3)], 1),
        ([(9, 1), (4, 2), (4, 2)], 1),
        ([(1, 50), (2, 1)], 0),
    ],
)
def test_anchor_has_the_shortest_rationale(lengths, expected):
    """Eq. 2: fewest think tokens, ties toward fewer answer tokens, then the lowest index."""
    group = [right(think=think, answer=answer) for think, answer in lengths]
    assert select_anchor(group, range(len(group)), SETTINGS) == expected


def test_anchor_is_a_positive():
    """Eq. 2 minimises over P: shorter failures do not count."""
    group = [wrong(think=1), right(think=8), wrong(think=2), right(think=7)]
    assert select_anchor(group, positives(group), SETTINGS) == 3


def test_lengths_are_of_the_content():
    """T_think and T_ans are tokens inside the tags."""
    rollout = right(think=4, answer=2)
    assert (rollout.spans.think_length, rollout.spans.answer_length) == (4, 2)
    assert broken(think=None).spans.think_length == 0


def test_random_anchor_is_a_positive_and_follows_the_seed():
    """Sec. 9.2's control: any positive, the same one for the same seed."""
    group = [right(think=i + 1) if i % 2 else wrong() for i in range(8)]
    settings = replace(SETTINGS, anchor="random")

    def draw(seed: int) -> int:
        return select_anchor(group, positives(group), settings, torch.Generator().manual_seed(seed))

    drawn = [draw(seed) for seed in range(40)]
    assert set(drawn) == {1, 3, 5, 7}
    assert drawn == [draw(seed) for seed in range(40)]


def test_random_anchor_still_prefers_format():
    """`anchor: random` draws among the well-formed positives where there are any."""
    group = [make_rollout(1.0, 0.0), right(), make_rollout(1.0, 0.0)]
    settings = replace(SETTINGS, anchor="random")
    drawn = {
        select_anchor(group, [0, 1, 2], settings, torch.Generator().manual_seed(seed))
        for seed in range(20)
    }
    assert drawn == {1}


def test_rationale_embedding_by_hand():
    """Sec. 3.3: mean over the span, then unit length; (3, 0) and (0, 4) pool to (0.6, 0.8)."""
    hidden = torch.tensor([[[9.0, 9.0], [3.0, 0.0], [3.0, 8.0], [0.0, 4.0], [9.0, 9.0]]])
    pooled = pool_rationale(hidden, torch.tensor([[1, 4]]))
    expected = [2.0 / math.sqrt(20), 4.0 / math.sqrt(20)]
    assert pooled[0].tolist() == pytest.approx(expected)


def test_rationale_embeddings_are_fp32_without_gradient():
    """Sec. 3.3: stop-gradient; bf16 states are averaged in fp32."""
    hidden = torch.full((1, 300, 2), 1.0, dtype=torch.bfloat16)
    hidden[0, 0, 1] = 1.5
    hidden.requires_grad_()
    pooled = pool_rationale(hidden, torch.tensor([[0, 300]]))
    assert pooled.dtype == torch.float32 and not pooled.requires_grad
    # bf16 would round the second mean, 300.5 / 300, to 1 and lose the difference.
    assert pooled[0, 1] / pooled[0, 0] == pytest.approx(300.5 / 300, rel=1e-6)


def test_an_empty_rationale_is_far_from_everything():
    """An empty span gives the zero vector, at distance 1 from all, itself included."""
    hidden = torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(0))
    pooled = pool_rationale(hidden, torch.tensor([[0, 4], [2, 2]]))
    assert pooled[1].tolist() == [0.0] * 3
    assert pairwise_distances(pooled)[0].tolist() == pytest.approx([0.0, 1.0], abs=1e-6)
    assert pairwise_distances(pooled)[1].tolist() == [1.0, 1.0]


def test_cosine_distance_by_hand():
    """Eq. 4: 0 for the anchor itself, 1 - cos 60, 1 at right angles, 2 for the opposite."""
    assert distances([30, 90, 120, 210, 30])[0].tolist() == pytest.approx(
        [0.0, 0.5, 1.0, 2.0, 0.0], abs=1e-6
    )


def test_nearest_takes_the_nearest():
    """Sec. 3.3: rank F by ascending d_cos and keep K'."""
    degrees = [0, 80, 10, -30, 170]
    assert select(degrees, 2, selector="nearest") == [2, 3]


def test_farthest_takes_the_farthest_nearest_first():
    """Figure 5's control, in the order reflection relies on: nearest of them first."""
    assert select([0, 80, 10, -30, 170], 2, selector="farthest") == [1, 4]


@pytest.mark.parametrize(
    ("count", "expected"), [(1, [2]), (2, [2, 4]), (3, [2, 3, 4]), (4, [2, 3, 1, 4])]
)
def test_mixed_takes_half_near_and_half_far(count, expected):
    """Figure 5's MIXED: half nearest, half farthest; an odd one goes to the nearest."""
    assert select([0, 80, 10, -30, 170, 60], count, selector="mixed") == expected


def test_random_takes_distinct_failures_nearest_first():
    """Figure 5's RANDOM: K' different members of the pool, in the order reflection relies on."""
    settings = replace(SETTINGS, selector="random")
    between = distances([0, 40, 0, 30, 20, 0, 50, 10])
    nearest_first = [7, 4, 3, 1, 6]

    def draw(seed: int) -> list[int]:
        generator = torch.Generator().manual_seed(seed)
        return select_hard_negatives([1, 3, 4, 6, 7], 3, between, 0, settings, generator)

    drawn = [draw(seed) for seed in range(60)]
    assert {frozenset(one) for one in drawn} > {frozenset([7, 4, 3]), frozenset([3, 1, 6])}
    assert all(one == [i for i in nearest_first if i in one] and len(one) == 3 for one in drawn)
    assert drawn == [draw(seed) for seed in range(60)]


def test_farthest_first_by_hand():
    """Sec. 3.3: from 10, 12, 40, 80 degrees keep 10, then 80 (farthest), then 40 (not 12)."""
    between = distances([10, 12, 40, 80])
    assert farthest_first([0, 1, 2, 3], 1, between) == [0]
    assert farthest_first([0, 1, 2, 3], 2, between) == [0, 3]
    assert farthest_first([0, 1, 2, 3], 3, between) == [0, 3, 2]
    assert farthest_first([0, 1, 2, 3], 4, between) == [0, 1, 2, 3]


def test_farthest_first_measures_to_the_closest_chosen():
    """Max-min: at 0, 90, 100, 45 degrees the third is 45 (45 from both), not 90 (10 from 100)."""
    assert farthest_first([0, 1, 2, 3], 3, distances([0, 90, 100, 45])) == [0, 2, 3]


def test_farthest_first_starts_where_told():
    """At 10, 50, -60 degrees: from the nearest to -60, from the farthest (-60) to 50."""
    between = distances([10, 50, -60])
    assert farthest_first([0, 1, 2], 2, between, 0) == [0, 2]
    assert farthest_first([0, 1, 2], 2, between, 2) == [2, 1]


def test_farthest_first_ties_go_to_the_nearer():
    """Two equally far candidates: the one ranked nearer to the anchor."""
    between = pairwise_distances(torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, -1.0]]))
    assert farthest_first([0, 1, 2], 2, between) == [0, 1]
    assert farthest_first([0, 2, 1], 2, between) == [0, 2]


def test_diverse_selection_preselects_then_spreads():
    """Sec. 3.3 at K' = 2: of 10, 12, 40, 80 degrees M = 3 keeps the first three, so 10 and 40."""
    degrees = [0, 80, 12, 40, 10]
    assert select(degrees, 2, preselect_size=3) == [4, 3]
    assert select(degrees, 2, preselect_size=4) == [4, 1]
    assert select(degrees, 2, preselect_size=100) == [4, 1]


@pytest.mark.parametrize("preselect_size", [1, 2])
def test_no_diversity_pass_without_spare_candidates(preselect_size):
    """M <= K': the nearest K' as they are."""
    assert select([0, 80, 12, 40, 10], 2, preselect_size=preselect_size) == [4, 2]


def test_hard_negatives_stand_nearest_first():
    """N is handed on nearest to the anchor first, whichever order the spreading chose them in."""
    assert select([0, 80, 12, 40, 10], 3) == [4, 3, 1]


def test_all_failures_when_there_are_no_more_than_asked():
    """Eq. 3: K' = |F| takes every failure."""
    assert select([0, 80, 12, 40], 3) == [2, 3, 1]


PROXY = Decisions()


def test_pseudo_anchor_is_the_likeliest_per_token():
    """Sec. 3.7 by mean: -8 over 8 tokens beats -6 over 4 tokens."""
    group = [wrong(think=1, answer=2), wrong(think=2, answer=1), wrong(think=0, answer=0)]
    assert [len(r.token_ids) for r in group] == [8, 8, 5]
    assert select_proxy_anchor(group, [0, 1, 2], torch.tensor([-8.5, -8.0, -6.0]), PROXY) == 1


def test_pseudo_anchor_by_sum():
    """Line 22 to the letter: the largest log pi_old(y | x)."""
    group = [wrong(think=1, answer=2), wrong(think=2, answer=1), wrong(think=0, answer=0)]
    settings = replace(PROXY, proxy_score="sum")
    assert select_proxy_anchor(group, [0, 1, 2], torch.tensor([-8.5, -8.0, -6.0]), settings) == 2


def test_pseudo_anchor_comes_from_the_pool():
    """Line 22 maximises over F alone."""
    group = [right(), wrong(), wrong()]
    assert select_proxy_anchor(group, [1, 2], torch.tensor([-0.1, -9.0, -8.0]), PROXY) == 2


def test_pseudo_anchor_must_be_well_formed():
    """Without a well-formed failure there is no pseudo-anchor, unless format is not asked for."""
    group = [broken(), broken(), wrong()]
    sums = torch.tensor([-1.0, -2.0, -50.0])
    assert select_proxy_anchor(group, [0, 1, 2], sums, PROXY) == 2
    assert select_proxy_anchor(group, [0, 1], sums, PROXY) is None
    assert (
        select_proxy_anchor(group, [0, 1], sums, replace(PROXY, proxy_requires_format=False)) == 0
    )
