"""Settings of what a run tells."""

from pydantic import NonNegativeInt

from care_train.config.base import section


@section
class LoggingSettings:
    """What a run tells."""

    tensorboard: bool = True
    """Write TensorBoard event files."""
    wandb: bool = False
    """Log to Weights & Biases, when installed."""
    trackio: bool = False
    """Log to trackio, when installed."""
    project: str = "care"
    """Project name for wandb and trackio."""
    samples_every: NonNegativeInt = 25
    """Steps between printed sample completions; 0: never."""
    progress: bool = True
    """Show progress bars."""
