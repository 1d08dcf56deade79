"""`care.selector=learned` (Sec. 10.2): which failures a reflection would repair."""

import json
import random
from dataclasses import replace

import pytest

from care_train.algorithm.care import select_subgroup
from care_train.algorithm.fixability import (
    MIN_OUTCOMES,
    Fixability,
    Outcome,
    features_of,
    outcomes_of,
)
from care_train.algorithm.types import RolloutGroup
from tests.algorithm.builders import care, indices, make_group, right, wrong

LEARNED = care("selector=learned", "max_negatives=2")


def synthetic(count: int, seed: int = 0) -> list[Outcome]:
    """A failure is repaired in nine of ten cases where it departs late, in one of ten where not;
    its other features are noise."""
    rng = random.Random(seed)
    found = []
    for _ in range(count):
        departure = rng.random()
        is_repaired = rng.random() < (0.9 if departure > 0.5 else 0.1)
        noise = (rng.random(), rng.gauss(-1, 0.3), rng.gauss(0, 0.2))
        found.append((*noise, departure, float(is_repaired)))
    return found


def group_of_departures(*places: int) -> RolloutGroup:
    """An anchor of 12 tokens, and failures that leave it at these places; the first is nearest."""
    anchor = replace(right(), token_ids=tuple(range(12)))
    failures = [
        replace(wrong(), token_ids=(*range(place), *range(50 + place, 62))) for place in places
    ]
    return make_group([anchor, *failures], log_prob_sums=[-12.0] * (len(places) + 1))


def test_features_by_hand():
    """Distance, mean log-prob, length beyond the anchor's, and the share of tokens they have in
    common at the beginning."""
    anchor = replace(right(), token_ids=(1, 2, 3, 4))
    failure = replace(wrong(), token_ids=(1, 2, 9, 4, 5))
    group = make_group([anchor, failure], degrees=[0, 60], log_prob_sums=[-1.0, -10.0])
    assert features_of(group, 0, 1) == pytest.approx((0.5, -2.0, 0.25, 0.4))


@pytest.mark.parametrize(
    "outcomes",
    [[], synthetic(MIN_OUTCOMES - 1), [(*o[:-1], 1.0) for o in synthetic(MIN_OUTCOMES)]],
    ids=["none", "too few", "of one kind"],
)
def test_before_enough_is_known_it_is_the_default(outcomes: list[Outcome]):
    """The same subgroup as `cosine_diverse`, and the same failure reflects."""
    group = group_of_departures(1, 9, 4, 6, 2)
    found = select_subgroup(group, LEARNED, fixability=Fixability(outcomes))
    default = select_subgroup(group, replace(LEARNED, selector="cosine_diverse"))
    assert found == default
    # TRL and verl have no reflections that it could learn from.
    with pytest.raises(ValueError, match=r"care\.selector: got learned, wanted another one"):
        select_subgroup(group, LEARNED)


def test_it_learns_a_rule_and_chooses_by_it():
    """Late departures are chosen, the latest first, which is the one that reflects."""
    fixability = Fixability(synthetic(400))
    group = group_of_departures(1, 9, 4, 11, 2)
    found = select_subgroup(group, LEARNED, fixability=fixability)
    assert not isinstance(found, str)
    assert indices(found) == [0, 4, 2] and found.reflect_on == 0
    odds = fixability.log_odds(group, 0, [1, 2, 3, 4, 5])
    assert odds[0] < 0 < odds[3]


def test_the_outcomes_are_the_state():
    """Through JSON and back, and step by step as at once: the same numbers, to the last bit."""
    outcomes, group = synthetic(1500), group_of_departures(1, 9, 4)
    by_step = Fixability()
    for start in range(0, 1500, 60):
        by_step.learn(outcomes[start : start + 60])
    resumed = Fixability()
    resumed.learn(json.loads(json.dumps(by_step.outcomes)))
    at_once = Fixability(outcomes[-1024:])
    expected = by_step.log_odds(group, 0, [1, 2, 3])
    assert len(by_step.outcomes) == 1024 and len(expected) == 3
    assert resumed.log_odds(group, 0, [1, 2, 3]) == expected
    assert at_once.log_odds(group, 0, [1, 2, 3]) == expected


def test_what_a_reflection_teaches():
    """The features of the failure that reflected, and whether its repair was right; groups without
    a reflection teach nothing."""
    group = group_of_departures(9, 4)
    subgroup = select_subgroup(group, LEARNED, fixability=Fixability())
    chosen = replace(group, subgroup=subgroup)
    repaired = replace(chosen, reflected=right(reflected=True))
    failed = replace(chosen, reflected=wrong(reflected=True))
    features = features_of(group, 0, 1)
    found = outcomes_of([repaired, chosen, failed, replace(group, subgroup="all_wrong")])
    assert found == [(*features, 1.0), (*features, 0.0)]
