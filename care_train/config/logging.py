"""Settings of what a run tells."""

from dataclasses import field
from typing import Literal

from pydantic import NonNegativeFloat, NonNegativeInt

from care_train.config.base import section

Tracker = Literal["tensorboard", "wandb", "trackio", "mlflow", "swanlab"]


@section
class LoggingSettings:
    """What a run tells."""

    report_to: list[Tracker] = field(default_factory=lambda: ["tensorboard"])
    """Where metrics go beside metrics.jsonl: tensorboard (event files in the run's folder), wandb,
    trackio, mlflow, swanlab; all but the first must be installed."""
    project: str = "care"
    """Project name for the trackers that have projects."""
    samples_every: NonNegativeInt = 25
    """Steps between groups that the terminal and the trackers show: the anchor, the nearest hard
    negative, its repair; 0: never."""
    archive_gib: NonNegativeFloat | None = 20.0
    """Every group of every step and every evaluated answer is kept in the run's `archive/`, for
    `care-train report` and `care-train replay` (docs/archive.md), up to this size in GiB, images
    included, at which its oldest steps are dropped. null: no limit. 0: no archive."""
    progress: bool = True
    """Show progress bars; false: a plain line per training step."""
