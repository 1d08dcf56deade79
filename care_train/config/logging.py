"""Settings of what a run tells."""

from dataclasses import field
from typing import Literal

from pydantic import NonNegativeInt

from care_train.config.base import section

Tracker = Literal["tensorboard", "wandb", "trackio"]


@section
class LoggingSettings:
    """What a run tells."""

    report_to: list[Tracker] = field(default_factory=lambda: ["tensorboard"])
    """Where metrics go beside metrics.jsonl: tensorboard (event files in the run's folder), wandb,
    trackio; the last two must be installed."""
    project: str = "care"
    """Project name for wandb and trackio."""
    samples_every: NonNegativeInt = 25
    """Steps between printed sample completions; 0: never."""
    progress: bool = True
    """Show progress bars."""
