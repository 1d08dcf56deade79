"""Settings of DeepSpeed, and what may not contradict them."""

from collections.abc import Mapping
from dataclasses import field
from typing import Annotated, Any, Literal

from care_train.config.base import Role, check, section

_OWNED = {
    "optimizer": "train.learning_rate and train.weight_decay",
    "scheduler": "train.schedule and train.warmup_steps",
    "gradient_clipping": "train.max_grad_norm",
    "train_batch_size": "train.prompts_per_step",
    "train_micro_batch_size_per_gpu": "train.micro_batch_size",
    "gradient_accumulation_steps": "train.micro_batch_size",
    "fp16": "model.dtype: float16 is not offered",
}
"""DeepSpeed's keys that other settings decide."""


@section
class DeepSpeedSettings:
    """What deepspeed.initialize gets. `deepspeed=NAME` takes the whole section from
    configs/deepspeed/NAME.yaml (zero1 | zero2 | zero3 | zero3_offload) or from a file of yours."""

    zero_stage: Annotated[Literal[0, 1, 2, 3], Role.FIXED] = 0
    """ZeRO stage: what the ranks share. 0: nothing, 1: the optimiser's states, 2: gradients too,
    3: weights too."""
    config: dict[str, Any] = field(default_factory=dict)
    """More DeepSpeed keys, laid over those made here (for example `zero_optimization`)."""

    def __post_init__(self) -> None:
        for key, owner in _OWNED.items():
            check(
                key not in self.config,
                f"deepspeed.config.{key}",
                self.config.get(key),
                f"no such key: {owner} decides",
            )
        zero = self.zero
        check(
            zero.get("stage", self.zero_stage) == self.zero_stage,
            "deepspeed.config.zero_optimization.stage",
            zero.get("stage"),
            f"{self.zero_stage}, which is deepspeed.zero_stage, or no such key",
        )
        for part, least in (("optimizer", 1), ("param", 3)):
            check(
                not self.offloads(part) or self.zero_stage >= least,
                f"deepspeed.config.zero_optimization.offload_{part}",
                zero.get(f"offload_{part}"),
                f"none below deepspeed.zero_stage {least}, got stage {self.zero_stage}",
            )

    @property
    def zero(self) -> Mapping[str, Any]:
        """DeepSpeed's `zero_optimization`."""
        return self.config.get("zero_optimization") or {}

    @property
    def offloads_optimizer(self) -> bool:
        """Whether the optimiser's states live in main memory, or on a disk."""
        return self.offloads("optimizer")

    def offloads(self, part: str) -> bool:
        """Whether `optimizer` states or `param`eters live in main memory, or on a disk."""
        section = self.zero.get(f"offload_{part}") or {}
        return section.get("device", "none") != "none"

    def check_dtype(self, dtype: str) -> None:
        """`model.dtype` decides the precision.

        Raises:
            ValueError: DeepSpeed is told another.
        """
        section = self.config.get("bf16") or {}
        is_bf16 = dtype == "bfloat16"
        check(
            section.get("enabled", is_bf16) == is_bf16,
            "deepspeed.config.bf16.enabled",
            section.get("enabled"),
            f"{str(is_bf16).lower()} with model.dtype = {dtype}, or no such key",
        )
