"""AdamW, its learning rate over time, DeepSpeed's settings, and updates that are not finite."""

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.git_version_info import accelerator_name, installed_ops
from deepspeed.ops.adam import DeepSpeedCPUAdam

from care_train.config import DeepSpeedSettings
from care_train.distributed import gather, is_main
from care_train.models.policy import first_broken_weight
from care_train.training.failures import CHANGES, NotFiniteError

logger = logging.getLogger(__name__)

_INPUTS = (
    *("advantages", "old_log_probs", "ref_log_probs", "importance_weights"),
    *("kl_weights", "entropy_weights"),
)
_OUTPUTS = ("log_probs", "ratio", "entropy", "kl")

BETAS = (0.9, 0.999)
"""AdamW's usual ones."""


@dataclass(frozen=True)
class OptimizerSettings:
    """AdamW and its schedule."""

    learning_rate: float
    total_steps: int
    warmup_steps: int = 0
    schedule: str = "constant"
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    max_skipped_updates: int = 0


def learning_rate_factor(settings: OptimizerSettings) -> Callable[[int], float]:
    """What the learning rate is multiplied by at an optimiser step, counted from 0."""
    decay_steps = max(settings.total_steps - settings.warmup_steps, 1)

    def factor(step: int) -> float:
        if step < settings.warmup_steps:
            return (step + 1) / settings.warmup_steps
        done = min((step - settings.warmup_steps) / decay_steps, 1.0)
        if settings.schedule == "cosine":
            return 0.5 * (1 + math.cos(math.pi * done))
        return 1.0 if settings.schedule == "constant" else 1 - done

    return factor


def adamw(
    parameters: list[torch.nn.Parameter], optimizer: OptimizerSettings, settings: DeepSpeedSettings
) -> torch.optim.Optimizer:
    """torch's AdamW, or where its states are in main memory DeepSpeed's for CPUs.

    The latter is built by the C++ compiler at first use, which takes a minute or two;
    `zero_force_ds_cpu_optimizer: false` asks for torch's, several times slower.
    """
    rate, decay = optimizer.learning_rate, optimizer.weight_decay
    shared: dict[str, Any] = {"lr": rate, "betas": BETAS, "weight_decay": decay}
    if settings.builds_adamw:
        return DeepSpeedCPUAdam(parameters, adamw_mode=True, **shared)
    return torch.optim.AdamW(parameters, **shared)


def has_cpu_adamw() -> bool:
    """Whether DeepSpeed was installed with its AdamW for CPUs (DS_BUILD_CPU_ADAM=1) for this kind
    of device; else it compiles it when it is first used."""
    here: Any = get_accelerator()
    return accelerator_name == here._name and installed_ops.get("cpu_adam", False)


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


class LeftOut:
    """Counts the updates that were left out because a loss or gradient was not finite."""

    def __init__(self, allowed: int) -> None:
        """Start at 0; `allowed` may be left out, and the next one ends the run."""
        self._allowed = allowed
        self._count = 0

    def add(self, cause: str | None, loss: float, grad_norm: float) -> None:
        """Count one more and warn, naming the first rank's `cause`. A collective call.

        Raises:
            NotFiniteError: more than allowed; the message is the same on all ranks.
        """
        found = gather((cause, loss))
        rank = next((rank for rank, (first, _) in enumerate(found) if first is not None), 0)
        first, loss = found[rank]
        where = "in the gradient" if first is None else f"first: {first}, on rank {rank}"
        text = f"loss {loss}, gradient norm {grad_norm}: not finite, so no update was made"
        self._count += 1
        if self._count > self._allowed:
            raise NotFiniteError(
                f"{text} ({where}); let train.max_skipped_updates (now {self._allowed}) leave such "
                f"updates out, or lower train.learning_rate: {CHANGES}"
            )
        if is_main():
            logger.warning(
                "warning: %s (%s); %d of %d allowed", text, where, self._count, self._allowed
            )


def cause_of(
    model: torch.nn.Module,
    arguments: Mapping[str, Any],
    output: Any,
    sequence_ids: torch.Tensor,
    labels: Sequence[str],
) -> str:
    """What made a micro-batch's loss not finite: a weight of the model, or the first row quantity,
    in the order they are computed, with its token and sequence.

    `sequence_ids`, [N], say which sequence each row belongs to.
    """
    broken = first_broken_weight(model)
    if broken is not None:
        return f"the weight {broken} is not finite already"
    found = [(name, arguments.get(name)) for name in _INPUTS]
    found += [(name, getattr(output, name)) for name in _OUTPUTS]
    for name, values in found:
        if values is None or bool(values.isfinite().all()):
            continue
        row = int((~values.isfinite()).nonzero()[0])
        sequence = int(sequence_ids[row])
        start = int((sequence_ids == sequence).nonzero()[0])
        label = labels[sequence] if labels else f"sequence {sequence} of the micro-batch"
        return f"{name} is {float(values[row])} at response token {row - start} of {label}"
    return "the loss"
