"""Settings of how long things may take before a run ends instead of hanging."""

from dataclasses import dataclass, fields

from care_train.config.base import STRICT, check


@dataclass(frozen=True, kw_only=True)
class LimitSettings:
    """Seconds that things may take; a run that is over them ends and says where it hung. A rank
    that waits for another one, which is within its own limit, does not hang. 0: no limit."""

    __pydantic_config__ = STRICT

    generate: float = 3600.0
    """Sampling one batch."""
    reward: float = 1800.0
    """Verifying one batch."""
    forward: float = 3600.0
    """Log-probs of one batch."""
    update: float = 3600.0
    """One optimiser step with all its micro-batches."""
    sync: float = 1800.0
    """Sending the weights to the rollout engine."""
    save: float = 3600.0
    """Writing one checkpoint or model."""
    other: float = 3600.0
    """Anything else at a stretch: loading, image processing, reports."""
    rank: float = 300.0
    """Silence of a rank, after which it counts as lost; and of another machine's process that holds
    the lock of the run's folder. One that dies on the same machine is noticed within seconds."""
    start: float = 600.0
    """Until all ranks have found each other."""
    collective: float = 7200.0
    """One collective operation of the process group (NCCL's or gloo's own timeout)."""

    def __post_init__(self) -> None:
        for key in fields(self):
            value = getattr(self, key.name)
            if key.name in ("start", "collective"):
                check(value > 0, f"limits.{key.name}", value, "above 0")
            else:
                check(value >= 0, f"limits.{key.name}", value, "at least 0")
