"""Settings of the optimisers' loops and of DeepSpeed."""

from collections.abc import Mapping
from dataclasses import field
from typing import Annotated, Any, Literal

from pydantic import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from care_train.config.base import Role, Share, check, section
from care_train.config.data import DataSettings

Measure = Literal["accuracy", "format", "greedy_accuracy", "greedy_format"]
Schedule = Literal["constant", "cosine", "linear"]


@section
class TrainSettings:
    """Reinforcement learning, and what the cold start shares with it."""

    steps: PositiveInt = 100
    """Rollout batches."""
    learning_rate: PositiveFloat = 1e-6
    """Peak learning rate of AdamW, whose betas are 0.9 and 0.999."""
    warmup_steps: NonNegativeInt = 10
    """Optimiser steps of linear warm-up, in the cold start too."""
    save_every: Annotated[NonNegativeInt, Role.FREE] = 0
    """Steps between checkpoints, in the cold start too, whose checkpoints are deleted at its end.
    0: the final one only, or where a signal asks."""
    eval_every: Annotated[NonNegativeInt, Role.FREE] = 0
    """Steps between evaluations of `eval.data`, in the cold start of the loss on `sft.eval_data`.
    0: `train` evaluates before and after, `sft` after the last step."""
    schedule: Schedule = "constant"
    """Shape of the learning rate after the warm-up; cosine and linear end at 0."""
    weight_decay: NonNegativeFloat = 0.0
    """AdamW's decoupled weight decay."""
    max_grad_norm: PositiveFloat = 1.0
    """Gradients are scaled down to this global norm."""
    prompts_per_step: PositiveInt = 32
    """Prompts per rollout batch, over all ranks."""
    num_iterations: PositiveInt = 1
    """Passes over each rollout batch."""
    mini_batches: PositiveInt = 1
    """Optimiser steps per pass; the batch is split by prompts."""
    micro_batch_size: PositiveInt = 64
    """Sequences per forward and backward on one rank, in the cold start too; gradients accumulate
    over them."""
    micro_batch_tokens: PositiveInt | None = None
    """Tokens per forward and backward on one rank, padding included, instead of
    `micro_batch_size`: sequences of similar cost together, and never more than fit. null: by
    sequences."""
    packing: bool = False
    """Lay the sequences of a micro-batch end to end instead of padding them to the longest, in the
    cold start too. Same numbers, no work on padding; worth most with flash_attention_2, as the
    others compute attention between all tokens of a pack and mask it."""
    gradient_checkpointing: bool = False
    """Keep each layer's input alone and compute the layer again in the backward, in the cold start
    too: far less memory, about a third more time."""
    max_skipped_updates: Annotated[NonNegativeInt, Role.FREE] = 0
    """Updates whose loss or gradient is not finite that are left out with a warning, counted since
    the run began or went on; one more ends it."""
    dynamic_sampling: bool = False
    """Draw more prompts, up to three times, until every group of the batch has both right and wrong
    rollouts (DAPO); then the batch is trained as it is."""
    rollouts_ahead: Literal[0, 1] = 0
    """1: while a step trains, the next one's rollouts are sampled with the weights before its
    update, and weighed for it by `loss.importance_sampling`. Needs `rollout.vllm.server`."""
    keep_checkpoints: Annotated[PositiveInt, Role.FREE] = 2
    """How many of the newest checkpoints are kept."""
    keep_best: Annotated[Measure | None, Role.FREE] = None
    """Also keep the checkpoint that was best in this number of the evaluations every `eval_every`
    steps, saved whenever one beats those before; `checkpoints/best.json` names it."""

    def __post_init__(self) -> None:
        can_compare = self.keep_best is None or self.eval_every > 0
        wanted = "null, or train.eval_every above 0: without evaluations none is best"
        check(can_compare, "train.keep_best", self.keep_best, wanted)
        is_divisor = self.prompts_per_step % self.mini_batches == 0
        wanted = f"a divisor of train.prompts_per_step = {self.prompts_per_step}"
        check(is_divisor, "train.mini_batches", self.mini_batches, wanted)


@section
class SftSettings:
    """Cold start (Sec. 3.1's format), before reinforcement learning. After `train.warmup_steps` the
    learning rate falls as a cosine; there is no weight decay, and gradients have a norm of at most
    1."""

    data: DataSettings = field(default_factory=DataSettings)
    """Rows with a `rationale`."""
    steps: PositiveInt = 160
    """Optimiser steps."""
    learning_rate: PositiveFloat = 1e-5
    """Peak learning rate of AdamW."""
    batch_size: PositiveInt = 64
    """Rows per step, over all ranks."""
    eval_data: Annotated[str | None, Role.FREE] = None
    """Held-out rows with a `rationale`, as data.path, whose loss is logged as `eval_loss`. None:
    none."""
    slip_share: Share = 0.0
    """Share of rows learnt as a slip, the same rows in every epoch: the wrong rationale and the
    answer it leads to, for rows that have both (`failed_rationale`, and a column `failed_answer`).
    What comes out knows and slips, as a start for experiments with near misses."""
    repair_share: Share = 0.0
    """Share of rows shown as a repair: a wrong rationale, the cue, then the right one. A model that
    cannot follow instructions yet learns there what the cue asks for."""


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
            wanted, got = f"no such key: {owner} decides", self.config.get(key)
            check(key not in self.config, f"deepspeed.config.{key}", got, wanted)
        own, stage = self.zero_stage, self.zero.get("stage", self.zero_stage)
        wanted = f"{own}, which is deepspeed.zero_stage, or no such key"
        check(stage == own, "deepspeed.config.zero_optimization.stage", stage, wanted)
        for part, least in (("optimizer", 1), ("param", 3)):
            fits, name = not self.offloads(part) or own >= least, f"offload_{part}"
            wanted = f"none below deepspeed.zero_stage {least}, got stage {own}"
            check(fits, f"deepspeed.config.zero_optimization.{name}", self.zero.get(name), wanted)

    @property
    def zero(self) -> Mapping[str, Any]:
        """DeepSpeed's `zero_optimization`."""
        return self._section("zero_optimization")

    @property
    def builds_adamw(self) -> bool:
        """Whether the optimiser is DeepSpeed's for CPUs, which the C++ compiler builds."""
        return self.offloads("optimizer") and self.config.get("zero_force_ds_cpu_optimizer", True)

    def offloads(self, part: str) -> bool:
        """Whether `optimizer` states or `param`eters live in main memory, or on a disk."""
        section = self._section("zero_optimization", f"offload_{part}")
        return section.get("device", "none") != "none"

    def check_dtype(self, dtype: str) -> None:
        """`model.dtype` decides the precision.

        Raises:
            ValueError: DeepSpeed is told another.
        """
        is_bf16 = dtype == "bfloat16"
        enabled = self._section("bf16").get("enabled", is_bf16)
        wanted = f"{str(is_bf16).lower()} with model.dtype = {dtype}, or no such key"
        check(enabled == is_bf16, "deepspeed.config.bf16.enabled", enabled, wanted)

    def _section(self, *names: str) -> Mapping[str, Any]:
        found, path = self.config, "deepspeed.config"
        for name in names:
            found, path = found.get(name) or {}, f"{path}.{name}"
            check(isinstance(found, Mapping), path, found, "keys")
        return found
