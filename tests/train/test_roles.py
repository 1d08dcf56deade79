"""The group of a step that the terminal and the trackers show (Sec. 3.6's case studies)."""

from dataclasses import replace

import pytest

from care_train.algorithm.types import Rollout, Subgroup
from care_train.rollout.engine import Completion
from care_train.training.archiving import case_study
from care_train.training.credit import choose_subgroup, group_updates, roles_of
from care_train.training.groups import Answer, Group
from tests.algorithm.builders import make_group, right, wrong
from tests.algorithm.fakes import sampled_group
from tests.train.builders import make_config

CARE = make_config()
REPAIR = Completion((7, 8), True)


def _group(
    *rollouts: Rollout, reflected: Rollout | None = None, config=CARE, name: str = "0"
) -> Group:
    """A group as a step leaves it; the rationale of rollout i stands at 10 i degrees."""
    embedded = make_group(rollouts)
    group = sampled_group(
        rollouts, name, distances=embedded.distances, log_prob_sums=embedded.log_prob_sums
    )
    if config.algorithm == "care":
        group = replace(group, subgroup=choose_subgroup(group, config, 0, name))
    if reflected is not None:
        group = replace(group, reflected=reflected, repair=Answer(group.sample, REPAIR))
    (update,) = group_updates([group], config, lambda values: values)
    return replace(group, update=update)


def _shown(*groups: Group) -> tuple[str, str, list[tuple[str, str, float]]]:
    group, outcome, records = case_study(groups, 25, lambda completion: str(completion.token_ids))
    assert {(r.step, r.prompt, r.answer) for r in records} == {(25, "?", "1")}
    return group.sample.id, outcome, [(r.role, r.completion, r.reward) for r in records]


ANCHORED = (right(text="a"), wrong(text="far", think=9), wrong(text="near"), wrong(text="b"))


@pytest.mark.parametrize(
    ("repair", "outcome", "role"),
    [
        (right(reflected=True), "repaired", "reflected_success"),
        (wrong(reflected=True), "failed", "reflected_failure"),
    ],
)
def test_a_repaired_group_is_shown_before_others(repair: Rollout, outcome: str, role: str):
    """Anchor, the negative that was repaired, and of the repair its own tokens alone."""
    found = _group(*ANCHORED, reflected=repair, name="repaired")
    assert isinstance(found.subgroup, Subgroup) and found.subgroup.reflect_on is not None
    negative = found.subgroup.others[found.subgroup.reflect_on].rollout
    name, title, shown = _shown(_group(right(), right()), _group(*ANCHORED), found)
    assert (name, title) == ("repaired", f"anchored · reflection {outcome}")
    assert shown == [
        ("anchor", "a", 1.0),
        ("hard_negative", negative.text, 0.1),
        (role, "(7, 8)", repair.reward),
    ]


def test_the_nearest_negative_is_shown_without_a_reflection():
    """By its distance to the anchor, whatever order it was sampled in."""
    without = make_config({"care": {"reflection": {"enabled": False}}})
    _, title, shown = _shown(_group(*ANCHORED, config=without))
    assert title == "anchored" and [role for role, *_ in shown] == ["anchor", "hard_negative"]
    assert shown[1][1] == "far"  # at 10 degrees; the others stand at 20 and 30


def test_a_rescued_group_shows_its_pseudo_anchor():
    _, title, shown = _shown(_group(right(), right()), _group(wrong(text="p"), wrong(), wrong()))
    assert title == "rescued" and [role for role, *_ in shown] == ["pseudo_anchor", "hard_negative"]


def test_a_baselines_best_and_worst_are_shown():
    """By advantage, as it has no anchor; a group whose rollouts are all alike shows one of them."""
    grpo = make_config({"algorithm": "grpo", "loss": {"kl_coef": 0.0}})
    mixed = _group(wrong(text="w"), right(text="r"), wrong(text="x"), config=grpo)
    alike = _group(wrong(text="w"), wrong(text="x"), config=grpo)
    assert _shown(alike, mixed)[1:] == ("trained", [("trained", "r", 1.0), ("trained", "x", 0.1)])
    _, title, shown = _shown(alike)
    assert title.startswith("skipped · ") and shown == [("unused", "w", 0.1)]


def test_roles_cover_the_subgroup_and_its_reflection():
    """Each member of S by its place, negatives ranked from the anchor on, the reflection last."""
    group = _group(*ANCHORED, reflected=right(reflected=True))
    roles = roles_of(group)
    assert isinstance(group.subgroup, Subgroup)
    assert roles[0] == ("anchor", None) and roles[4] == ("reflected_success", None)
    ranks = [rank for role, rank in roles.values() if role == "hard_negative"]
    assert set(ranks) == set(range(1, len(group.subgroup.others) + 1)) and len(ranks) > 1
    assert set(roles) == {4, *(member.index for member in group.subgroup.members)}
