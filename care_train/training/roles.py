"""The part that each rollout of a group played, and the group of a step that people are shown."""

from collections.abc import Callable, Sequence

from care_train.algorithm.types import Rollout, Subgroup
from care_train.reporting import SampleRecord
from care_train.rollout.engine import Completion
from care_train.training.credit import outcome_of
from care_train.training.groups import Group

_REFLECTED = {"repaired": "reflected_success", "failed": "reflected_failure"}


def reflection_outcome(group: Group) -> str:
    """What became of lines 11-19: none | too_long | repaired | failed | partial."""
    if reflected_place(group) is None:
        return "none"
    if group.reflected is None:
        return "too_long"
    accuracy = group.reflected.accuracy
    return "repaired" if accuracy == 1 else "failed" if accuracy == 0 else "partial"


def reflected_place(group: Group) -> int | None:
    """The place of the negative that was to be repaired; None: none was."""
    subgroup = group.subgroup
    if not isinstance(subgroup, Subgroup) or subgroup.reflect_on is None:
        return None
    return subgroup.others[subgroup.reflect_on].index


def roles_of(group: Group) -> dict[int, tuple[str, int | None]]:
    """By place in the group, the role of each member of S before the reflection and, of a negative,
    its rank from the anchor on; then that of the reflection, whose place is the group's size."""
    if not isinstance(group.subgroup, Subgroup):
        return {}
    anchor, others = group.subgroup.anchor, group.subgroup.others
    found: dict[int, tuple[str, int | None]] = {}
    if anchor.index is not None:
        found[anchor.index] = ("pseudo_anchor" if group.subgroup.rescued else "anchor", None)
    for place, member in enumerate(others, start=1):
        if member.index is not None:
            is_negative = member.is_negative
            found[member.index] = ("hard_negative", place) if is_negative else ("positive", None)
    if group.reflected is not None:
        role = _REFLECTED.get(reflection_outcome(group), "reflected_partial")
        found[len(group.rollouts)] = (role, None)
    return found


def case_study(
    groups: Sequence[Group], step: int, text_of: Callable[[Completion], str]
) -> tuple[Group, str, list[SampleRecord]]:
    """The first group of a step with a reflection, else the first that trained, else the first.

    Args:
        groups: of the step.
        step: counted from 1.
        text_of: decodes a reflection's own tokens, without the rationale that it goes on from.

    Returns:
        The group; its outcome; anchor, nearest hard negative (the one that was repaired where one
        was) and reflection. Of a group without an anchor, such as a baseline's: the rollouts of the
        highest and of the lowest advantage, or the first one where none has any.
    """
    group = max(groups, key=lambda g: (g.reflected is not None, bool(g.update.sequences)))
    outcome, reason = outcome_of(group.subgroup, group.update)
    reflection = reflection_outcome(group)
    parts = [outcome, reason, f"reflection {reflection}" if reflection != "none" else ""]

    def record(role: str, rollout: Rollout) -> SampleRecord:
        sample, text = group.sample, rollout.text
        if rollout is group.reflected and group.repair is not None:
            text = text_of(group.repair.completion)
        return SampleRecord(step, sample.prompt, text, sample.answer, rollout.reward, role)

    return group, " · ".join(filter(None, parts)), [record(*part) for part in _parts(group)]


def _parts(group: Group) -> list[tuple[str, Rollout]]:
    """The rollouts that say most of the group, each with its role."""
    roles = {place: role for place, (role, _) in roles_of(group).items()}
    if roles:
        negative = reflected_place(group)
        if negative is None:
            negative = next((p for p, role in roles.items() if role == "hard_negative"), None)
        return [
            (role, group.responses[place])
            for place, role in roles.items()
            if place == negative or role not in ("hard_negative", "positive")
        ]
    trained = sorted(group.update.sequences, key=lambda sequence: -sequence.advantage)
    ends = trained[:1] + trained[1:][-1:]
    return [("trained", one.rollout) for one in ends] or [("unused", group.rollouts[0])]
