"""Which rollouts of a group train, and with what: by the configuration, without a model.

A step asks it of sampled groups, `care-train replay` of archived ones.
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

    Args:
        group: with distances and log-prob sums, unless it is skipped before them.
        config: its `care` section, and the seed of the random selectors.
        step: counted from 0.
        draw: the prompt's `Sample.draw`.
        fixability: what the steps before have taught, for `selector: learned`.
    """
    # Beyond the rollouts' and the reflection's own indices.
    index = config.rollout.group_size + 1
    generator = torch.Generator().manual_seed(request_seed(config.seed, step, draw, index))
    return care.select_subgroup(group, config.care, generator, fixability)


def fixability_of(config: Config) -> Fixability | None:
    """What `care.selector: learned` learns into; None under another selector."""
    learns = config.algorithm == "care" and config.care.selector == "learned"
    return Fixability() if learns else None


def outcome_of(subgroup: Subgroup | str, update: GroupUpdate) -> tuple[str, str]:
    """anchored | rescued | trained | skipped, and why it is skipped: what the archive says of it.

    Args:
        subgroup: `choose_subgroup`'s; empty for a baseline.
        update: what the group trains.
    """
    reason = subgroup if isinstance(subgroup, str) and subgroup else update.skipped
    if reason:
        return "skipped", reason
    if isinstance(subgroup, Subgroup):
        return ("rescued" if update.rescued else "anchored"), ""
    return "trained", ""


def group_updates(
    groups: Sequence[RolloutGroup], config: Config, total: Callable[[list[float]], list[float]]
) -> list[GroupUpdate]:
    """Lines 15-19 and 26-41, or a baseline's advantages: what each group trains.

    Args:
        groups: a batch's, with their subgroups and reflections.
        config: the algorithm and its settings.
        total: sums numbers over what else is of the batch, on other ranks; for a baseline alone.
    """
    loss = config.loss
    if config.algorithm == "care":
        updates = [_care_update(group, config) for group in groups]
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
    return [
        baselines.without_truncated(update, _counted(group, update, config))
        for group, update in zip(groups, updates, strict=True)
    ]


def _counted(group: RolloutGroup, update: GroupUpdate, config: Config) -> Sequence[Rollout]:
    """The responses that the update's denominators count: S*, or all that were sampled."""
    if config.algorithm == "care" and not _counts_all(config):
        return [sequence.rollout for sequence in update.sequences]
    return group.responses


def _counts_all(config: Config) -> bool:
    return config.care.decisions.beyond_subgroup == "regularized"


def _care_update(group: RolloutGroup, config: Config) -> GroupUpdate:
    if isinstance(group.subgroup, str):
        update = care.skipped_update(group.subgroup)
    else:
        update = care.subgroup_update(group.subgroup, config.care, group.reflected)
    if _counts_all(config):
        update = with_rest(update, group.responses, has_kl=config.loss.kl_coef > 0)
    return update
