"""Settings of what a run tells."""

from dataclasses import dataclass

from care_train.config.base import STRICT, check_at_least


@dataclass(frozen=True, kw_only=True)
class LoggingSettings:
    """What a run tells."""

    __pydantic_config__ = STRICT

    tensorboard: bool = True
    """Write TensorBoard event files."""
    wandb: bool = False
    """Log to Weights & Biases, when installed."""
    trackio: bool = False
    """Log to trackio, when installed."""
    project: str = "care"
    """Project name for wandb and trackio."""
    samples_every: int = 25
    """Steps between printed sample completions; 0: never."""
    progress: bool = True
    """Show progress bars."""

    def __post_init__(self) -> None:
        check_at_least(self, "logging", samples_every=0)
