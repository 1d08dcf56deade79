"""AdamW, its learning rate over time, and what DeepSpeed is told about them."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from deepspeed.ops.adam import DeepSpeedCPUAdam

from care_train.config import DeepSpeedSettings, SftSettings, TrainSettings


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

    @classmethod
    def of_training(cls, train: TrainSettings) -> "OptimizerSettings":
        """Those of reinforcement learning."""
        return cls(
            learning_rate=train.learning_rate,
            total_steps=train.steps * train.num_iterations * train.mini_batches,
            warmup_steps=train.warmup_steps,
            schedule=train.schedule,
            min_learning_rate=train.min_learning_rate,
            weight_decay=train.weight_decay,
            betas=train.adam_betas,
            max_grad_norm=train.max_grad_norm,
            max_skipped_updates=train.max_skipped_updates,
        )

    @classmethod
    def of_cold_start(cls, sft: SftSettings) -> "OptimizerSettings":
        """Those of supervised fine-tuning."""
        return cls(
            learning_rate=sft.learning_rate,
            total_steps=sft.steps,
            warmup_steps=sft.warmup_steps,
            schedule=sft.schedule,
            weight_decay=sft.weight_decay,
            max_grad_norm=sft.max_grad_norm,
        )


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


def adamw(
    parameters: list[torch.nn.Parameter], optimizer: OptimizerSettings, settings: DeepSpeedSettings
) -> torch.optim.Optimizer:
    """torch's AdamW, or where its states are in main memory DeepSpeed's for CPUs.

    The latter is built by the C++ compiler at first use, which takes a minute or two;
    `zero_force_ds_cpu_optimizer: false` asks for torch's, several times slower.
    """
    shared: dict[str, Any] = {
        "lr": optimizer.learning_rate,
        "betas": optimizer.betas,
        "weight_decay": optimizer.weight_decay,
    }
    if settings.offloads_optimizer and settings.config.get("zero_force_ds_cpu_optimizer", True):
        return DeepSpeedCPUAdam(parameters, adamw_mode=True, **shared)
    return torch.optim.AdamW(parameters, **shared)


def deepspeed_config(
    optimizer: OptimizerSettings, settings: DeepSpeedSettings, bf16: bool
) -> dict[str, Any]:
    """DeepSpeed's configuration: ours, with `deepspeed.config` laid over it."""
    base: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": optimizer.max_grad_norm,
        "zero_optimization": {"stage": settings.zero_stage},
        "zero_allow_untested_optimizer": True,
        # ZeRO-1 and 2 otherwise apply bfloat16 gradients that are not finite.
        "bf16": {"enabled": bf16, "check_grad_overflow": True},
        "steps_per_print": 2**31,
    }
    for key, value in settings.config.items():
        both = isinstance(value, dict) and isinstance(base.get(key), dict)
        base[key] = base[key] | value if both else value
    return base
