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


@pytest.mark.parametrize(
    ("by", "positive", "failed"),
    [("accuracy", [0, 3], [1, 4, 5]), ("reward", [0, 1, 2, 3], [4, 5])],
)
def test_positives_and_failures(by, positive, failed):
    """Line 3: acc = 1, acc = 0, and a partial answer is neither; or by reward > 0."""
    group = [right(), wrong(), make_rollout(0.5, 1.0), make_rollout(1.0, 0.0), broken()]
    group.append(with_reward(broken(), -1.0))
    assert (positives(group, by), failures(group, by)) == (positive, failed)


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


def test_random_anchor_is_a_well_formed_positive():
    """Sec. 9.2's control (`anchor: random`); test_determinism.py holds it to its seed."""
    group = [right(think=i + 1) if i % 2 else wrong() for i in range(8)]
    group.append(make_rollout(1.0, 0.0))
    settings = replace(SETTINGS, anchor="random")
    drawn = {
        select_anchor(group, positives(group), settings, torch.Generator().manual_seed(seed))
        for seed in range(40)
    }
    assert drawn == {1, 3, 5, 7}


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
    found = distances([30, 90, 120, 210, 30])[0].tolist()
    assert found == pytest.approx([0.0, 0.5, 1.0, 2.0, 0.0], abs=1e-6)


@pytest.mark.parametrize(
    ("degrees", "count", "changes", "expected"),
    [
        # Sec. 3.3: F by ascending d_cos, the first K'; Figure 5's controls, nearest of them first.
        ([80, 10, -30, 170], 2, {"selector": "nearest"}, [2, 3]),
        ([80, 10, -30, 170], 2, {"selector": "farthest"}, [1, 4]),
        # MIXED: half nearest, half farthest; an odd one goes to the nearest.
        *[
            ([80, 10, -30, 170, 60], count, {"selector": "mixed"}, expected)
            for count, expected in ((1, [2]), (2, [2, 4]), (3, [2, 3, 4]), (4, [2, 3, 1, 4]))
        ],
        # Of 10, 12, 40, 80 degrees M = 3 keeps three to spread: 10 and 40; M > 3 reaches 80.
        ([80, 12, 40, 10], 2, {"preselect_size": 3}, [4, 3]),
        ([80, 12, 40, 10], 2, {"preselect_size": 4}, [4, 1]),
        ([80, 12, 40, 10], 2, {"preselect_size": 100}, [4, 1]),
        # M <= K': the nearest K' as they are.
        ([80, 12, 40, 10], 2, {"preselect_size": 1}, [4, 2]),
        ([80, 12, 40, 10], 2, {"preselect_size": 2}, [4, 2]),
        # N is handed on nearest first, whichever order the spreading chose; K' = |F| takes all.
        ([80, 12, 40, 10], 3, {}, [4, 3, 1]),
        ([80, 12, 40], 3, {}, [2, 3, 1]),
    ],
)
def test_hard_negatives(degrees, count, changes, expected):
    """Who is chosen among rollouts 1.. for an anchor at index 0 and 0 degrees."""
    between, pool = distances([0, *degrees]), range(1, len(degrees) + 1)
    settings = replace(SETTINGS, **changes)
    assert select_hard_negatives(pool, count, between, 0, settings) == expected


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


@pytest.mark.parametrize(
    ("degrees", "count", "start", "expected"),
    [
        # From 10 degrees 80 is farthest, then 40 (not 12).
        *[([10, 12, 40, 80], n, 0, [0, 3, 2, 1][:n]) for n in (1, 2, 3)],
        ([10, 12, 40, 80], 4, 0, [0, 1, 2, 3]),
        # Max-min: the third is 45 (45 from both), not 90 (10 from 100).
        ([0, 90, 100, 45], 3, 0, [0, 2, 3]),
        # It starts where told: from 10 to -60, or from -60 to 50.
        ([10, 50, -60], 2, 0, [0, 2]),
        ([10, 50, -60], 2, 2, [2, 1]),
    ],
)
def test_farthest_first_by_hand(degrees, count, start, expected):
    """Sec. 3.3's greedy max-min pass."""
    pool = list(range(len(degrees)))
    assert farthest_first(pool, count, distances(degrees), start) == expected


def test_farthest_first_ties_go_to_the_nearer():
    """Two equally far candidates: the one ranked nearer to the anchor."""
    between = pairwise_distances(torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, -1.0]]))
    assert farthest_first([0, 1, 2], 2, between) == [0, 1]
    assert farthest_first([0, 2, 1], 2, between) == [0, 2]


# 8, 8 and 5 tokens; then a right one and two broken ones.
CANDIDATES = [wrong(think=1, answer=2), wrong(think=2, answer=1), wrong(think=0, answer=0)]
CANDIDATES += [right(), broken(), broken()]
SUMS = torch.tensor([-8.5, -8.0, -6.0, -0.1, -1.0, -2.0])


@pytest.mark.parametrize(
    ("pool", "changes", "expected"),
    [
        # Sec. 3.7 by mean: -8 over 8 tokens beats -6 over 5; line 22 to the letter sums.
        ([0, 1, 2], {}, 1),
        ([0, 1, 2], {"proxy_score": "sum"}, 2),
        # Of the pool alone; well-formed, unless format is not asked for.
        ([0, 2], {}, 0),
        ([0, 4, 5], {}, 0),
        ([4, 5], {}, None),
        ([4, 5], {"proxy_requires_format": False}, 4),
    ],
)
def test_pseudo_anchor(pool, changes, expected):
    """Lines 22-23: the likeliest failure under the old policy."""
    assert [len(r.token_ids) for r in CANDIDATES[:3]] == [8, 8, 5]
    assert select_proxy_anchor(CANDIDATES, pool, SUMS, Decisions(**changes)) == expected
