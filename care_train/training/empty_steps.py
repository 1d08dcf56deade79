"""Steps that have no group to learn from: what to say of one, and when several end the run."""

import logging
from collections import Counter
from collections.abc import Sequence
from typing import Literal

import torch

from care_train.algorithm.types import GroupUpdate
from care_train.config import Config
from care_train.distributed import all_max, gather, is_main
from care_train.training.failures import CHANGES, NoSignalError
from care_train.training.groups import Group

logger = logging.getLogger(__name__)

FINISHED_SHARE = 0.9
"""Of the groups of empty steps: where as many are all right, the policy has learnt its prompts.
Some never come right, as their keys are wrong."""
FINISHED_GROUPS = 64
FAILED_GROUPS = 8
"""Groups of the empty steps, or all training prompts where they are fewer, before the run ends as
finished, or with an error: with a prompt or two per step, empty ones in a row are chance."""

_KINDS = {
    "right": "with all responses right",
    "partly": "whose best response is partly right",
    "wrong": "with all responses wrong and no rescue",
    "mixed": "with right and wrong ones but equal rewards, or none that credit goes to",
}
_FAULTS = {
    "cut": ("cut by the length limit", "raise rollout.max_new_tokens (now {limit})"),
    "untagged": (
        "without a complete answer span",
        "begin with a cold start (`care-train sft`), or ask in prompt.system for <{tag}>",
    ),
    "unverified": ("unverified", "look at the rows' answers: comparing them takes too long"),
}
"""What may be wrong with responses, and what helps where it is with most of them."""


class EmptySteps:
    """Counts the steps in a row that trained nothing; the same on all ranks."""

    def __init__(self, config: Config, num_prompts: int, device: torch.device) -> None:
        """Start at 0."""
        self._config, self._num_prompts, self._device = config, num_prompts, device
        self.steps = 0
        """In a row, up to the last one."""
        self._groups = self._right = 0
        self._message = ""

    @property
    def ending(self) -> Literal["finished", "failed"] | None:
        """How the run ends here; None where it goes on."""
        limit = self._config.limits.empty_steps
        if limit is None or self.steps < limit:
            return None
        finished = self._right >= FINISHED_SHARE * self._groups
        least = FINISHED_GROUPS if finished else FAILED_GROUPS
        if self._groups < min(least, self._num_prompts):
            return None
        return "finished" if finished else "failed"

    def add(self, groups: Sequence[Group], dropped: Sequence[Group], done: int) -> None:
        """Count step `done`, from 1, with what dynamic sampling dropped; warn of an empty one. A
        collective call."""
        if all_max(any(has_signal(group.update) for group in groups), self._device):
            self.steps = self._groups = self._right = 0
            return
        found = gather(_counts([*groups, *dropped]))
        total = sum((counts for counts, _, _ in found), Counter[str]())
        rewards = [reward for _, own, _ in found for reward in own]
        best = max(graded for _, _, graded in found)
        self.steps += 1
        self._groups += total["groups"]
        self._right += total["right"]
        self._message = f"{_described(total, rewards)}: {self._advice(total, rewards, best)}"
        # The first of a row, the second, the fourth, ...
        if is_main() and self.steps & (self.steps - 1) == 0:
            row = f", as did the {self.steps - 1} before" if self.steps > 1 else ""
            logger.warning("warning: step %d trained nothing%s: %s", done, row, self._message)

    def finish_text(self) -> str:
        """What a run that ends as finished says."""
        return (
            f"training is finished: {self._right} of the last {self._groups} groups, in "
            f"{self.steps} steps, had only right responses, so the policy has nothing left to "
            "learn from these prompts. If it is not meant so: harder rows (data.path) or a "
            "stricter reward; limits.empty_steps=null trains on"
        )

    def error(self) -> NoSignalError:
        """What ends a run that failed; what counts from here on is a new row of steps."""
        error = NoSignalError(
            f"{self.steps} steps in a row trained nothing (limits.empty_steps = "
            f"{self._config.limits.empty_steps}): {self._message}; {CHANGES}"
        )
        self.steps = self._groups = self._right = 0
        return error

    def state(self) -> list[int]:
        """What a checkpoint keeps."""
        return [self.steps, self._groups, self._right]

    def restore(self, state: Sequence[int]) -> None:
        """Be where `state` was taken."""
        self.steps, self._groups, self._right = state

    def _advice(self, total: Counter[str], rewards: Sequence[float], best: float) -> str:
        config, groups = self._config, total["groups"]
        threshold, is_care = config.reward.success_threshold, config.algorithm == "care"
        if total["right"] >= FINISHED_SHARE * groups:
            return "the policy answers these prompts: training is finished, or takes harder rows"
        is_graded = total["partly"] > groups / 2 and len(set(rewards)) > 1
        if is_graded and (threshold or is_care):
            now = "1, as it is null" if threshold is None else f"{threshold:g}"
            return (
                f"set reward.success_threshold (now {now}) no higher than the best accuracy that "
                f"was seen, {best:.4g}"
            )
        for fault, (_, fix) in _FAULTS.items():
            if total[fault] > total["responses"] / 2:
                tag, limit = config.prompt.answer_tag, config.rollout.max_new_tokens
                return fix.format(tag=tag, limit=limit)
        if total["same"] > groups / 2:
            return "the responses to a prompt are all the same: raise rollout.temperature"
        if total["wrong"] == groups:
            rescue = ", or care.rescue=1" if is_care and config.care.rescue == 0 else ""
            return (
                "easier rows, a longer cold start, a larger rollout.group_size"
                f"{rescue}; `care-train verify` says what the verifier makes of an answer"
            )
        return (
            "raise rollout.group_size or rollout.temperature, or set train.dynamic_sampling=true; "
            "a reward function that gives all responses the same teaches nothing"
        )


def has_signal(update: GroupUpdate) -> bool:
    """Whether the rewards of a group train any token: a KL term alone is no signal."""
    return any(s.advantage != 0 and s.credit.is_given for s in update.sequences)


def _counts(groups: Sequence[Group]) -> tuple[Counter[str], list[float], float]:
    """What groups were, the lowest and highest reward, and the best accuracy."""
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    counts = Counter({"groups": len(groups), "responses": len(rollouts)})
    counts.update(_kind(group) for group in groups)
    counts["same"] = sum(len({r.token_ids for r in group.rollouts}) == 1 for group in groups)
    counts["cut"] = sum(not r.finished for r in rollouts)
    counts["untagged"] = sum(not r.spans.well_formed for r in rollouts)
    counts["unverified"] = sum("unverified: " in r.verdict for r in rollouts)
    rewards = [rollout.reward for rollout in rollouts]
    return counts, [min(rewards), max(rewards)], max(r.graded for r in rollouts)


def _kind(group: Group) -> str:
    right = [rollout.accuracy == 1 for rollout in group.rollouts]
    if any(right):
        return "right" if all(right) else "mixed"
    return "partly" if any(rollout.graded > 0 for rollout in group.rollouts) else "wrong"


def _described(total: Counter[str], rewards: Sequence[float]) -> str:
    groups = [f"{total[kind]} {text}" for kind, text in _KINDS.items() if total[kind]]
    faults = [f"{total[fault]} {text}" for fault, (text, _) in _FAULTS.items() if total[fault]]
    of_responses = [f"of {total['responses']} responses {', '.join(faults)}"] if faults else []
    spread = f"rewards from {min(rewards):.4g} to {max(rewards):.4g}"
    return "; ".join([f"of {total['groups']} groups {', '.join(groups)}", *of_responses, spread])
