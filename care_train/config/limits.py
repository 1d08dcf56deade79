"""Settings of when a run ends instead of hanging, or of training on nothing."""

from pydantic import NonNegativeFloat, PositiveInt

from care_train.config.base import section


@section
class LimitSettings:
    """Seconds that things may take; a run that is over them ends and says where it hung. A rank
    that waits for another one, which is within its own limit, does not hang. 0: no limit.
    And how many steps may train nothing."""

    step: NonNegativeFloat = 3600.0
    """One part of a step: sampling a batch, verifying it, its log-probs, an optimiser step with all
    its micro-batches; or anything else at a stretch: loading, sending weights to the rollout
    engine, a checkpoint."""
    rank: NonNegativeFloat = 300.0
    """Silence of a rank, after which it counts as lost; and of another machine's process that holds
    the lock of the run's folder. One that dies on the same machine is noticed within seconds."""
    empty_steps: PositiveInt | None = 2
    """Steps in a row without a group to learn from (all right, all wrong, equal rewards), after
    which a run ends: as finished where nearly all groups are right, else with an error that says
    what they were. The first one is a warning. With few prompts per step it takes at least 8
    groups, and 64 to be finished, or as many as there are rows. None: never."""

    @property
    def collective(self) -> float:
        """Seconds of one collective operation (NCCL's or gloo's own timeout): long enough for
        `step` to be what ends a hang, and says where it is."""
        return max(7200.0, 2 * self.step) if self.step else 30 * 86400.0
