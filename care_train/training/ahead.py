"""One step ahead: the next step's rollouts are sampled while this step trains.

They come from the weights before this step's update, one update old when they are trained on. The
engine's log-probs, those of the policy that sampled, correct for it: each token's (or sequence's)
gradient is weighed by pi_trainer / pi_engine (`mismatch.py`).
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from care_train.data import Sample
from care_train.rollout.engine import Completion
from care_train.rollout.errors import RolloutServerError
from care_train.training.sampling import GroupSampler, SampledGroup, StartedGroups


class RolloutsAhead:
    """Hands out each step's rollouts and starts the next step's."""

    def __init__(
        self, sampler: GroupSampler, draw: Callable[[], Sequence[Sample]], steps: int
    ) -> None:
        """Nothing is sampled yet.

        Args:
            sampler: starts and finishes batches.
            draw: deals this rank's next prompts.
            steps: `train.steps`; nothing is sampled for a later one.
        """
        self._sampler = sampler
        self._draw = draw
        self._steps = steps
        self._next: StartedGroups | None = None

    @property
    def has_next(self) -> bool:
        """Whether the prompts drawn last are still to be trained on."""
        return self._next is not None

    def take(self, step: int) -> list[SampledGroup]:
        """The rollouts of `step`; those of the one after it begin, with the weights synced last."""
        started = self._next or self._sampler.start_groups(self._draw(), step)
        assert started.step == step
        groups = self._sampler.finish_groups(started)
        self._next = None
        if step + 1 < self._steps:
            self._next = self._sampler.start_groups(self._draw(), step + 1)
        return groups

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps of them, once they are sampled; empty where there are none."""
        if self._next is None:
            return {}
        try:
            completions = self._next.completions.result()
        except RolloutServerError:
            # The next step will say so. A checkpoint without them still is one: resumed, the run
            # samples them anew.
            return {}
        return {
            "step": self._next.step,
            "token_ids": [list(c.token_ids) for c in completions],
            "finished": [c.finished for c in completions],
            "log_probs": [None if c.log_probs is None else list(c.log_probs) for c in completions],
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Be where `state` was taken; its prompts are drawn again."""
        if not state:
            return
        fields = zip(state["token_ids"], state["finished"], state["log_probs"], strict=True)
        completions = [
            Completion(tuple(ids), finished, None if values is None else tuple(values))
            for ids, finished, values in fields
        ]
        self._next = self._sampler.resume_groups(self._draw(), state["step"], completions)
