"""Who forms the subgroup (Eqs. 2-4, Secs. 3.6-3.7; Algorithm 1, lines 3-20 and 22-23).

Embeddings are unit vectors in the plane, so a cosine distance grows with the angle between two.
"""

from dataclasses import replace

import pytest
import torch

from care_train.algorithm.care import select_subgroup
from care_train.algorithm.selection import (
    choose_reflected_negative,
    farthest_first,
    merge_reflection,
    pairwise_distances,
    positives,
    reflection_prefix,
    select_anchor,
    select_hard_negatives,
    select_proxy_anchor,
)
from care_train.algorithm.spans import parse_spans
from care_train.algorithm.types import RolloutGroup, Subgroup
from care_train.config import CareSettings, Decisions, ReflectionSettings
from tests.algorithm.builders import (
    broken,
    care,
    indices,
    make_group,
    make_rollout,
    make_subgroup,
    right,
    unit_vectors,
    wrong,
)

SETTINGS = CareSettings()


def subgroup_of(group: RolloutGroup, settings: CareSettings, seed: int = 0) -> Subgroup:
    subgroup = select_subgroup(group, settings, torch.Generator().manual_seed(seed))
    assert isinstance(subgroup, Subgroup)
    return subgroup


def negatives(degrees, count, changes, seed: int = 0) -> list[int]:
    """Chosen among rollouts 1.. for an anchor at index 0 and 0 degrees."""
    between, pool = pairwise_distances(unit_vectors([0, *degrees])), range(1, len(degrees) + 1)
    generator = torch.Generator().manual_seed(seed)
    return select_hard_negatives(pool, count, between, 0, replace(SETTINGS, **changes), generator)


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
    """Eq. 2: fewest think tokens inside the tags, then answer tokens, then the lowest index; among
    P alone, whatever the order it is listed in."""
    group = [right(think=think, answer=answer) for think, answer in lengths]
    assert select_anchor(group, range(len(group))[::-1], SETTINGS) == expected
    group = [wrong(think=0, answer=0), *group]
    assert select_anchor(group, positives(group), SETTINGS) == expected + 1


def test_random_anchor_is_a_well_formed_positive():
    """Sec. 9.2's control (`anchor: random`)."""
    group = [right(think=i + 1) if i % 2 else wrong() for i in range(8)]
    group.append(make_rollout(1.0, 0.0))
    settings = replace(SETTINGS, anchor="random")
    drawn = {
        select_anchor(group, positives(group), settings, torch.Generator().manual_seed(seed))
        for seed in range(40)
    }
    assert drawn == {1, 3, 5, 7}


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
        ([80, 12, 40, 10], 2, {"preselect_size": 100}, [4, 1]),
        # M <= K': the nearest K' as they are.
        ([80, 12, 40, 10], 2, {"preselect_size": 2}, [4, 2]),
        # N is handed on nearest first, whichever order the spreading chose; K' = |F| takes all.
        ([80, 12, 40, 10], 3, {}, [4, 3, 1]),
        ([80, 12, 40], 3, {}, [2, 3, 1]),
        # At one distance the first K' of them; MIXED takes its far half from the other end.
        ([30] * 5, 3, {}, [1, 2, 3]),
        ([30] * 5, 3, {"selector": "mixed"}, [1, 2, 5]),
        ([90, -90, 0, 90], 3, {"selector": "nearest"}, [3, 1, 2]),
    ],
)
def test_hard_negatives(degrees, count, changes, expected):
    """Who is chosen."""
    assert negatives(degrees, count, changes) == expected


def test_random_takes_distinct_failures_nearest_first():
    """Figure 5's RANDOM: K' different members of the pool, in the order reflection relies on."""
    drawn = [negatives([40, 30, 20, 50, 10], 3, {"selector": "random"}, seed) for seed in range(60)]
    assert len({frozenset(one) for one in drawn}) > 5
    assert all(one == [i for i in [5, 3, 2, 1, 4] if i in one] and len(one) == 3 for one in drawn)


@pytest.mark.parametrize(
    ("degrees", "count", "start", "expected"),
    [
        # From 10 degrees 80 is farthest, then 40 (not 12).
        *[([10, 12, 40, 80], n, 0, [0, 3, 2, 1][:n]) for n in (1, 2, 3)],
        # Max-min: the third is 45 (45 from both), not 90 (10 from 100).
        ([0, 90, 100, 45], 3, 0, [0, 2, 3]),
        # It starts where told: from -60 to 50.
        ([10, 50, -60], 2, 2, [2, 1]),
        # Of equally far ones the one ranked nearer to the anchor.
        ([0, 90, -90], 2, 0, [0, 1]),
    ],
)
def test_farthest_first_by_hand(degrees, count, start, expected):
    """Sec. 3.3's greedy max-min pass."""
    between = pairwise_distances(unit_vectors(degrees))
    assert farthest_first(list(range(len(degrees))), count, between, start) == expected


@pytest.mark.parametrize("selector", ["nearest", "cosine_diverse"])
@pytest.mark.parametrize("width", [8, 64, 896])
def test_equal_rationales_tie(selector, width):
    """Identical embeddings tie, whatever the last bit of their products is."""
    for seed in range(8):
        generator = torch.Generator().manual_seed(seed)
        row = torch.nn.functional.normalize(torch.randn(width, generator=generator), dim=0)
        for size in (6, 9, 16):
            between = pairwise_distances(row.repeat(size, 1))
            settings = replace(SETTINGS, selector=selector)
            chosen = select_hard_negatives(range(1, size), 4, between, 0, settings)
            assert chosen == [1, 2, 3, 4]


# 8, 8, 5 and 8 tokens; then a right one and two broken ones.
CANDIDATES = [wrong(think=1, answer=2), wrong(think=2, answer=1), wrong(think=0, answer=0)]
CANDIDATES += [wrong(think=2, answer=1), right(), broken(), broken()]
SUMS = torch.tensor([-8.5, -8.0, -6.0, -8.0, -0.1, -1.0, -2.0])


@pytest.mark.parametrize(
    ("pool", "changes", "expected"),
    [
        # Sec. 3.7 by mean: -8 over 8 tokens beats -6 over 5; line 22 to the letter sums.
        ([0, 1, 2], {}, 1),
        ([0, 1, 2], {"proxy_score": "sum"}, 2),
        # Of the pool alone; well-formed, unless format is not asked for.
        ([0, 5, 6], {}, 0),
        ([5, 6], {}, None),
        ([5, 6], {"proxy_requires_format": False}, 5),
        # Of equally likely ones the first, whatever the pool's order.
        ([3, 1, 0], {}, 1),
    ],
)
def test_pseudo_anchor(pool, changes, expected):
    """Lines 22-23: the likeliest failure under the old policy."""
    assert [len(r.token_ids) for r in CANDIDATES[:4]] == [8, 8, 5, 8]
    assert select_proxy_anchor(CANDIDATES, pool, SUMS, Decisions(**changes)) == expected


RANDOM = {
    "selector": replace(SETTINGS, selector="random"),
    "anchor": replace(SETTINGS, anchor="random"),
    "reflected negative": replace(SETTINGS, reflection=ReflectionSettings(negative="random")),
}


@pytest.mark.parametrize("name", sorted(RANDOM))
def test_the_generators_seed_decides(name):
    """Same seed, same subgroup; others give others; the global generator is not touched. With the
    default settings even the seed does not matter."""
    group = make_group([right() if i % 2 else wrong() for i in range(12)])

    def draw(settings: CareSettings, seed: int):
        subgroup = subgroup_of(group, settings, seed)
        return (*indices(subgroup), subgroup.reflect_on)

    before = torch.get_rng_state()
    first = [draw(RANDOM[name], seed) for seed in range(12)]
    assert first == [draw(RANDOM[name], seed) for seed in range(12)]
    assert len(set(first)) > 3
    assert len({draw(SETTINGS, seed) for seed in range(5)}) == 1
    assert torch.equal(before, torch.get_rng_state())


def test_which_negative_reflects():
    """Line 12: the hardest, which stands first; or any, by the seed; line 11: none when off."""
    assert choose_reflected_negative(3, ReflectionSettings()) == 0
    assert choose_reflected_negative(3, ReflectionSettings(enabled=False)) is None
    at_random = ReflectionSettings(negative="random")
    drawn = {
        choose_reflected_negative(3, at_random, torch.Generator().manual_seed(seed))
        for seed in range(30)
    }
    assert drawn == {0, 1, 2}


def test_the_default_cue_is_the_papers():
    """Sec. 3.6's repair cue, word for word."""
    assert ReflectionSettings().cue == (
        "Your previous reasoning was incorrect. Identify the failing operation, correct it, and "
        "re-derive the necessary quantities. Keep this section concise. Do not restate the "
        "question."
    )


@pytest.mark.parametrize(
    "text",
    [
        "<think>the sides are equal</think> <answer>3</answer>",
        "<think>\n the sides are equal \n</think>\n<answer>3</answer>",
        "<think>the sides are equal<answer>3</answer>",
        "<think>the sides are equal <answer>3</answer></think>",
        "<think>the sides are equal",
        "the sides are equal <answer>3</answer>",
        "the sides are equal",
        "the sides are equal</think> <answer>3</answer>",
        "<think>the sides are equal<answer>1</answer> no <answer>2</answer>",
        "<think>the sides are equal<answer>1",
        "the sides are equal<answer>1</answer> no <answer>2</answer>",
        "<think>the sides are equal</answer> or <think>not</think>",
        "<think>the sides are equal<think></th<answer>ink>",
        "<answer>3</answer> <think>the sides are equal</think>",
    ],
)
def test_the_prompt_is_failed_rationale_and_cue_with_think_left_open(text):
    """Line 13: `<think>`, what the failure reasoned, the cue; its answer is dropped.

    What is sampled then closes the span that the prefix opened.
    """
    prefix = reflection_prefix(wrong(text=text), "look again:", "think", "answer")
    assert prefix == "<think>the sides are equal\nlook again:\n"
    whole = prefix + "they are not</think> <answer>7</answer>"
    spans = parse_spans(whole)
    assert spans.think_content is not None and spans.answer_content is not None
    assert whole[slice(*spans.think_content)].endswith("look again:\nthey are not")
    assert whole[slice(*spans.answer_content)] == "7"


def test_an_empty_rationale_leaves_the_cue():
    """A failure that only answered contributes no text."""
    failed = wrong(text="<answer>3</answer>")
    assert reflection_prefix(failed, "look:", "think", "answer") == "<think>\nlook:\n"


@pytest.mark.parametrize(
    ("accuracy", "format_score", "changes", "others"),
    [
        # Lines 15-16: a success, which acc alone makes, takes its negative's place.
        (1.0, 1.0, [], "aRc"),
        (1.0, 0.0, [], "aRc"),
        # Lines 17-18: a failure joins S; in the released code it replaces its negative.
        (0.0, 1.0, [], "abcr"),
        (0.0, 1.0, ["failed_reflection=replace"], "arc"),
        # 0 < acc < 1 is neither; to the letter whatever is no success failed.
        (0.5, 1.0, [], "abc"),
        (0.5, 1.0, ["partial=literal"], "abcr"),
        # `positive: reward` reads reward > 0, for reflections as for rollouts.
        (0.0, 1.0, ["positive=reward"], "aRc"),
        (0.0, 0.0, ["positive=reward"], "abcr"),
    ],
)
def test_how_a_reflection_joins_the_subgroup(accuracy, format_score, changes, others):
    """Negatives a, b, c of which b reflects; r is the reflection as a negative, R as a success."""
    reflected = make_rollout(accuracy, format_score, reflected=True, verdict="r")
    subgroup = make_subgroup(right(), [wrong(verdict=letter) for letter in "abc"], reflect_on=1)
    merged = merge_reflection(subgroup, reflected, care(*changes))
    assert merged.anchor is subgroup.anchor
    assert "".join(m.rollout.verdict for m in merged.others) == others.lower()
    assert [not m.is_negative for m in merged.others] == [letter == "R" for letter in others]
    for member in merged.others:
        if member.rollout is reflected:
            assert (member.shaped_reward, member.index) == (reflected.reward, None)
