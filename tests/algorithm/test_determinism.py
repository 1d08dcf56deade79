"""Same input, same update: ties, seeds and the order of rollouts."""

import random
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from care_train.algorithm.care import select_subgroup, subgroup_update
from care_train.algorithm.selection import (
    pairwise_distances,
    select_anchor,
    select_hard_negatives,
    select_proxy_anchor,
)
from care_train.algorithm.types import RolloutGroup, Subgroup
from care_train.config import CareSettings, Decisions, ReflectionSettings
from tests.algorithm.builders import indices, make_group, make_rollout, right, wrong

SETTINGS = CareSettings()


def subgroup_of(group: RolloutGroup, care: CareSettings, seed: int = 0) -> Subgroup:
    subgroup = select_subgroup(group, care, torch.Generator().manual_seed(seed))
    assert isinstance(subgroup, Subgroup)
    return subgroup


def exact(vectors) -> torch.Tensor:
    """Vectors whose products are exact in fp32, so that ties are ties on any machine."""
    return torch.tensor(vectors, dtype=torch.float32)


class TestTies:
    """Remaining ties go to the lowest rollout index."""

    def test_anchor(self):
        """Equal think and answer lengths."""
        assert select_anchor([right() for _ in range(5)], [4, 2, 3], SETTINGS) == 2

    @pytest.mark.parametrize("selector", ["nearest", "cosine_diverse", "mixed"])
    def test_hard_negatives_at_one_distance(self, selector):
        """Failures at the same place: the first K' of them, in order."""
        vectors = exact([[0.5, 0.5, 0.5, 0.5]] * 6)
        group = RolloutGroup((right(), *[wrong()] * 5), pairwise_distances(vectors))
        care = replace(SETTINGS, max_negatives=3, selector=selector)
        chosen = indices(subgroup_of(group, care))
        # MIXED takes its far half from the other end of the ranking.
        assert chosen == ([0, 1, 2, 5] if selector == "mixed" else [0, 1, 2, 3])

    def test_the_order_of_the_pool_does_not_decide(self):
        """Ties among equals around a nearer one: still by index."""
        vectors = exact([[1, 0], [0, 1], [0, -1], [1, 0], [0, 1]])
        group = RolloutGroup((right(), *[wrong()] * 4), pairwise_distances(vectors))
        care = replace(SETTINGS, max_negatives=3, selector="nearest")
        assert indices(subgroup_of(group, care)) == [0, 3, 1, 2]

    @pytest.mark.parametrize("selector", ["nearest", "cosine_diverse"])
    @pytest.mark.parametrize("width", [8, 64, 896])
    def test_equal_rationales(self, selector, width):
        """Identical embeddings tie, whatever the last bit of their products is."""
        care = replace(SETTINGS, selector=selector)
        for seed in range(8):
            generator = torch.Generator().manual_seed(seed)
            row = torch.nn.functional.normalize(torch.randn(width, generator=generator), dim=0)
            for size in (6, 9, 16):
                rows = row.repeat(size, 1)
                chosen = select_hard_negatives(range(1, size), 4, pairwise_distances(rows), 0, care)
                assert chosen == [1, 2, 3, 4]

    @pytest.mark.parametrize("score", ["mean", "sum"])
    def test_pseudo_anchor(self, score):
        """Equal log-probs of equal lengths."""
        group = [wrong() for _ in range(4)]
        sums = torch.tensor([-9.0, -3.0, -3.0, -3.0])
        assert select_proxy_anchor(group, [3, 2, 1, 0], sums, Decisions(proxy_score=score)) == 1


RANDOM = {
    "selector": replace(SETTINGS, selector="random"),
    "anchor": replace(SETTINGS, anchor="random"),
    "reflected negative": replace(SETTINGS, reflection=ReflectionSettings(negative="random")),
}


@pytest.mark.parametrize("name", sorted(RANDOM))
def test_the_generators_seed_decides(name):
    """Same seed, same subgroup; other seeds give others; the global generator is not touched."""
    group = make_group([right() if i % 2 else wrong() for i in range(12)])

    def draw(seed: int):
        subgroup = subgroup_of(group, RANDOM[name], seed)
        return (*indices(subgroup), subgroup.reflect_on)

    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = [draw(seed) for seed in range(12)]
    assert first == [draw(seed) for seed in range(12)]
    assert len(set(first)) > 3
    assert torch.equal(before, torch.get_rng_state())


def test_no_choice_reads_the_generator_by_default():
    """With the default settings even the seed does not matter."""
    group = make_group([right(think=3), right(think=5)] + [wrong() for _ in range(7)])
    assert len({tuple(indices(subgroup_of(group, SETTINGS, seed))) for seed in range(5)}) == 1


def distinct_group(seed: int, size: int, all_wrong: bool) -> RolloutGroup:
    """A group without ties: distinct lengths, log-probs and directions."""
    chance = random.Random(seed)
    lengths = chance.sample(range(1, 40), size)
    rollouts = [
        make_rollout(0.0 if all_wrong else float(i == 0 or chance.random() < 0.4), 1.0, think=n)
        for i, n in enumerate(lengths)
    ]
    generator = torch.Generator().manual_seed(seed)
    vectors = torch.nn.functional.normalize(torch.randn(size, 16, generator=generator), dim=-1)
    sums = torch.tensor([-n * (0.5 + chance.random()) for n in lengths])
    return RolloutGroup(tuple(rollouts), pairwise_distances(vectors), sums)


@settings(max_examples=30)
@given(
    seed=st.integers(0, 10_000),
    size=st.integers(2, 9),
    all_wrong=st.booleans(),
    selector=st.sampled_from(["cosine_diverse", "nearest", "mixed", "farthest"]),
    data=st.data(),
)
def test_permuting_rollouts_permutes_the_result(seed, size, all_wrong, selector, data):
    """Without ties, who is chosen and with what credit does not depend on the rollouts' order."""
    group = distinct_group(seed, size, all_wrong)
    order = data.draw(st.permutations(range(size)))
    shuffled = RolloutGroup(
        tuple(group.rollouts[i] for i in order),
        group.distances[order][:, order],
        group.log_prob_sums[order],
    )
    care = replace(SETTINGS, selector=selector, max_negatives=3, preselect_size=5)
    found, again = (select_subgroup(g, care) for g in (group, shuffled))
    if isinstance(found, str) or isinstance(again, str):
        assert found == again
        return
    assert indices(found) == [order[i] for i in indices(again)]
    assert found.reflect_on == again.reflect_on
    for one, other in zip(
        subgroup_update(found, care).sequences, subgroup_update(again, care).sequences, strict=True
    ):
        assert one.rollout is other.rollout
        assert one.advantage == pytest.approx(other.advantage)
        assert one.credit == other.credit
