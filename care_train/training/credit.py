"""Which rollouts of a group train, with what, and in which role: by the configuration, without a
model. A step asks it of sampled groups, `care-train replay` of archived ones.
"""

from collections.abc import Callable, Sequence

import torch

from care_train.algorithm import baselines, care
from care_train.algorithm.fixability import Fixability
from care_train.algorithm.released import with_rest
from care_train.algorithm.types import GroupUpdate, Rollout, RolloutGroup, Subgroup
from care_train.config import Config
from care_train.rollout.engine import request_seed


def choose_subgroup(
    group: RolloutGroup,
    config: Config,
    step: int,
    draw: str,
    fixability: Fixability | None = None,
) -> Subgroup | str:
    """Lines 3-10 and 21-25: CARE's S, or why the group is skipped.

    `group` has distances and log-prob sums, unless it is skipped before them; `step` counts from 0;
    `draw` is the prompt's `Sample.draw`.
    """
    # Beyond the rollouts' and the reflection's own indices.
    index = config.rollout.group_size + 1
    generator = torch.Generator().manual_seed(request_seed(config.seed, step, draw, index))
    return care.select_subgroup(group, config.care, generator, fixability)


def fixability_of(config: Config) -> Fixability | None:
    """What `care.selector: learned` learns into; None under another selector."""
    learns = config.algorithm == "care" and config.care.selector == "learned"
    return Fixability() if learns else None


def group_updates(
    groups: Sequence[RolloutGroup], config: Config, total: Callable[[list[float]], list[float]]
) -> list[GroupUpdate]:
    """Lines 15-19 and 26-41, or a baseline's advantages: what each group trains.

    `total` sums numbers over what else is of the batch, on other ranks; for a baseline alone.
    """
    loss, is_care = config.loss, config.algorithm == "care"
    counts_all = config.care.decisions.beyond_subgroup == "regularized"
    if is_care:
        updates = [_care_update(group, config, counts_all) for group in groups]
    else:
        updates = baselines.baseline_updates(
            [group.rollouts for group in groups],
            config.algorithm,
            total,
            # A token mean or Dr. GRPO's constant divides by length itself.
            length_normalized=loss.aggregation == "sequence",
            keep_without_signal=loss.kl_coef > 0,
        )
    if not loss.mask_truncated:
        return updates
    masked = []
    for group, update in zip(groups, updates, strict=True):
        # The responses that the update's denominators count: S*, or all that were sampled.
        trained = [sequence.rollout for sequence in update.sequences]
        counted = trained if is_care and not counts_all else group.responses
        masked.append(baselines.without_truncated(update, counted))
    return masked


def _care_update(group: RolloutGroup, config: Config, counts_all: bool) -> GroupUpdate:
    if isinstance(group.subgroup, str):
        update = care.skipped_update(group.subgroup)
    else:
        update = care.subgroup_update(group.subgroup, config.care, group.reflected)
    if counts_all:
        update = with_rest(update, group.responses, has_kl=config.loss.kl_coef > 0)
    return update


def outcome_of(subgroup: Subgroup | str, update: GroupUpdate) -> tuple[str, str]:
    """anchored | rescued | trained | skipped, and why it is skipped: as the archive says it."""
    reason = subgroup if isinstance(subgroup, str) and subgroup else update.skipped
    if reason:
        return "skipped", reason
    if isinstance(subgroup, Subgroup):
        return ("rescued" if update.rescued else "anchored"), ""
    return "trained", ""


def reflected_place(group: RolloutGroup) -> int | None:
    """The place of the negative that was to be repaired; None: none was."""
    subgroup = group.subgroup
    if not isinstance(subgroup, Subgroup) or subgroup.reflect_on is None:
        return None
    return subgroup.others[subgroup.reflect_on].index


def reflection_outcome(group: RolloutGroup) -> str:
    """What became of lines 11-19: none | too_long | repaired | failed | partial."""
    if reflected_place(group) is None:
        return "none"
    if group.reflected is None:
        return "too_long"
    accuracy = group.reflected.accuracy
    return "repaired" if accuracy == 1 else "failed" if accuracy == 0 else "partial"


def roles_of(group: RolloutGroup) -> dict[int, tuple[str, int | None]]:
    """By place in the group, the role of each member of S before the reflection and, of a negative,
    its rank from the anchor on; then that of the reflection, whose place is the group's size."""
    if not isinstance(group.subgroup, Subgroup):
        return {}
    anchor, others = group.subgroup.anchor, group.subgroup.others
    found: dict[int, tuple[str, int | None]] = {}
    if anchor.index is not None:
        found[anchor.index] = ("pseudo_anchor" if group.subgroup.rescued else "anchor", None)
    for rank, member in enumerate(others, start=1):
        if member.index is not None:
            is_negative = member.is_negative
            found[member.index] = ("hard_negative", rank) if is_negative else ("positive", None)
    if group.reflected is not None:
        roles = {"repaired": "reflected_success", "failed": "reflected_failure"}
        role = roles.get(reflection_outcome(group), "reflected_partial")
        found[len(group.rollouts)] = (role, None)
    return found


def telling_rollouts(group: RolloutGroup, update: GroupUpdate) -> list[tuple[str, Rollout]]:
    """The rollouts that say most of a group, each with its role.

    Anchor, nearest hard negative (the one that was repaired where one was) and reflection. Of a
    group without an anchor, such as a baseline's: the rollouts of the highest and of the lowest
    advantage, or the first one where none has any.
    """
    roles = {place: role for place, (role, _) in roles_of(group).items()}
    if not roles:
        trained = sorted(update.sequences, key=lambda sequence: -sequence.advantage)
        ends = trained[:1] + trained[1:][-1:]
        return [("trained", one.rollout) for one in ends] or [("unused", group.rollouts[0])]
    negative = reflected_place(group)
    if negative is None:
        negative = next((p for p, role in roles.items() if role == "hard_negative"), None)
    return [
        (role, group.responses[place])
        for place, role in roles.items()
        if place == negative or role not in ("hard_negative", "positive")
    ]
