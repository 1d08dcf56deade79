"""What the optimiser is told, and its learning rate over time."""

import math
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class OptimizerSettings:
    """AdamW and its schedule."""

    learning_rate: float
    total_steps: int
    warmup_steps: int = 0
    schedule: str = "constant"
    min_learning_rate: float = 0.0
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    max_grad_norm: float = 1.0
    max_skipped_updates: int = 0


def learning_rate_factor(settings: OptimizerSettings) -> Callable[[int], float]:
    """What the learning rate is multiplied by at an optimiser step, counted from 0."""
    floor = settings.min_learning_rate / settings.learning_rate
    decay_steps = max(settings.total_steps - settings.warmup_steps, 1)

    def factor(step: int) -> float:
        if step < settings.warmup_steps:
            return (step + 1) / settings.warmup_steps
        done = min((step - settings.warmup_steps) / decay_steps, 1.0)
        if settings.schedule == "cosine":
            return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * done))
        return 1.0 if settings.schedule == "constant" else 1 - (1 - floor) * done

    return factor
