"""Which rollouts of a group train, and with what: by the configuration, without a model.

A step asks it of sampled groups, `care-train replay` of archived ones.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from care_train.algorithm import baselines, care
from care_train.algorithm.released import with_rest
from care_train.algorithm.types import GroupUpdate, Rollout, RolloutGroup, Subgroup
from care_train.config import Config
from care_train.rollout.engine import request_seed


def choose_subgroup(group: RolloutGroup, config: Config, step: int, draw: str) -> Subgroup | str:
    """Lines 3-10 and 21-25: CARE's S, or why the group is skipped.

    Args:
        group: with distances and log-prob sums, unless it is skipped before them.
        config: its `care` section, and the seed of the random selectors.
        step: counted from 0.
        draw: the prompt's `Sample.draw`.
    """
    # Beyond the rollouts' and the reflection's own indices.
    index = config.rollout.group_size + 1
    generator = torch.Generator().manual_seed(request_seed(config.seed, step, draw, index))
    return care.select_subgroup(group, config.care, generator)


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


class Choice(NamedTuple):
    """What a group's credit is made from."""

    rollouts: Sequence[Rollout]
    subgroup: Subgroup | str
    """`choose_subgroup`'s; not read by a baseline."""
    reflected: Rollout | None
    """The verified reflection, where there is one."""

    @property
    def sampled(self) -> list[Rollout]:
        """All responses."""
        return [*self.rollouts, *([self.reflected] if self.reflected else [])]


def group_updates(
    choices: Sequence[Choice], config: Config, total: Callable[[list[float]], list[float]]
) -> list[GroupUpdate]:
    """Lines 15-19 and 26-41, or a baseline's advantages: what each group trains.

    Args:
        choices: a batch's groups.
        config: the algorithm and its settings.
        total: sums numbers over what else is of the batch, on other ranks; for a baseline alone.
    """
    loss = config.loss
    if config.algorithm == "care":
        updates = [_care_update(choice, config) for choice in choices]
    else:
        updates = baselines.baseline_updates(
            [tuple(choice.rollouts) for choice in choices],
            config.algorithm,
            total,
            # A token mean or Dr. GRPO's constant divides by length itself.
            length_normalized=loss.aggregation == "sequence",
            keep_without_signal=loss.kl_coef > 0,
        )
    if not loss.mask_truncated:
        return updates
    return [
        baselines.without_truncated(update, _counted(choice, update, config))
        for choice, update in zip(choices, updates, strict=True)
    ]


def _counted(choice: Choice, update: GroupUpdate, config: Config) -> list[Rollout]:
    """The responses that the update's denominators count: S*, or all that were sampled."""
    if config.algorithm == "care" and not _counts_all(config):
        return [sequence.rollout for sequence in update.sequences]
    return choice.sampled


def _counts_all(config: Config) -> bool:
    return config.care.decisions.beyond_subgroup == "regularized"


def _care_update(choice: Choice, config: Config) -> GroupUpdate:
    if isinstance(choice.subgroup, str):
        update = care.skipped_update(choice.subgroup)
    else:
        update = care.subgroup_update(choice.subgroup, config.care, choice.reflected)
    if _counts_all(config):
        update = with_rest(update, choice.sampled, has_kl=config.loss.kl_coef > 0)
    return update
