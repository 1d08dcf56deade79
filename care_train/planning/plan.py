"""A plan: memory and time of a configuration on so many GPUs, and what to change if it does not
fit."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from care_train.config import Config
from care_train.planning import states
from care_train.planning.architecture import Architecture, read_architecture
from care_train.planning.hardware import GIB, Accelerator
from care_train.planning.memory import MemoryPlan, plan_memory
from care_train.planning.timing import Efficiencies, TimePlan, plan_time
from care_train.planning.workload import (
    Scenario,
    Training,
    Workload,
    training_of,
    with_micro_batch,
    workload_of,
)

GPU_COUNTS = (1, 2, 4, 8, 16, 32, 64)
"""Rows of `--table`."""


@dataclass(frozen=True)
class Plan:
    """What a run will need."""

    architecture: Architecture
    training: Training
    work: Workload
    device: Accelerator
    memory: MemoryPlan
    time: TimePlan
    advice: tuple[str, ...]
    """What to change where it does not fit."""

    @property
    def checkpoint_bytes(self) -> float:
        """One checkpoint on disk."""
        return states.checkpoint_bytes(self.architecture, self.training)

    @property
    def host_bytes(self) -> float:
        """Main memory of one node, data excluded."""
        return states.host_bytes(self.architecture, self.training, self.device.gpus_per_node)


def make_plan(
    config: Config,
    scenario: Scenario,
    device: Accelerator,
    architecture: Architecture | None = None,
) -> Plan:
    """The plan of a configuration.

    Args:
        config: the run.
        scenario: what the configuration does not say.
        device: one GPU.
        architecture: the model's, where it is known already.

    Raises:
        ValueError: the model is not known, or the prompts do not divide over the GPUs.
    """
    if scenario.gpus < 1:
        raise ValueError(f"--gpus: got {scenario.gpus}, wanted at least 1")
    if architecture is None:
        architecture = read_architecture(config.model.path)
    training = training_of(config, scenario.gpus)
    work = workload_of(config, architecture, scenario)
    memory = plan_memory(architecture, training, work, device)
    advice = () if memory.fits else tuple(advise(architecture, training, work, device))
    return Plan(
        architecture,
        training,
        work,
        device,
        memory,
        plan_time(architecture, training, work, device, Efficiencies()),
        advice,
    )


def advise(
    architecture: Architecture, training: Training, work: Workload, device: Accelerator
) -> list[str]:
    """Changes that lower the peak, each kept for those after it, until one fits.

    Cheap ones are tried first: checkpointing costs a third of the training time, ZeRO-3
    communication, offload the most.
    """
    peak, lines = plan_memory(architecture, training, work, device).peak, []
    for change in _CHANGES:
        for text, new_training, new_work in change(training, work):
            memory = plan_memory(architecture, new_training, new_work, device)
            if memory.peak > 0.99 * peak:
                continue
            peak, training, work = memory.peak, new_training, new_work
            lines.append(f"{text}: {peak / GIB:.1f} GiB, in {memory.peak_phase}")
            if memory.fits:
                return lines
    lines.append(
        "still too much: more GPUs, larger ones, a LoRA adapter (model.lora), or shorter "
        "prompt.max_prompt_tokens and rollout.max_new_tokens"
    )
    return lines


Changed = Iterator[tuple[str, Training, Workload]]


def _checkpoint(training: Training, work: Workload) -> Changed:
    if not training.checkpointing:
        yield "turn gradient checkpointing on", replace(training, checkpointing=True), work


def _fewer_sequences(training: Training, work: Workload) -> Changed:
    for share in (0.25, 0.0):
        setting, smaller = with_micro_batch(work, share)
        if smaller.micro_batch < work.micro_batch:
            yield f"set {setting}", training, smaller


def _generate_fewer(training: Training, work: Workload) -> Changed:
    if work.engine == "transformers" and work.generated_at_once > 16:
        yield "set rollout.batch_size=16", training, replace(work, generated_at_once=16)


def _bfloat16(training: Training, work: Workload) -> Changed:
    if training.parameter_bytes == 4:
        narrow = replace(training, parameter_bytes=2, has_master=True)
        yield "set model.dtype=bfloat16", narrow, work


def _next_stages(training: Training, work: Workload) -> Changed:
    for stage in range(training.stage + 1, 4):
        # One rank has nobody to share with.
        if training.gpus > 1:
            sharded = replace(training, stage=stage, has_master=True)
            yield f"set deepspeed.zero_stage={stage}", sharded, work


def _no_reference(training: Training, work: Workload) -> Changed:
    if work.has_reference:
        text = "set loss.kl_coef=0, which needs no reference model"
        yield text, training, replace(work, has_reference=False)


def _offload(training: Training, work: Workload) -> Changed:
    if not training.offload_optimizer and training.stage >= 1:
        text = "set deepspeed.config.zero_optimization.offload_optimizer.device=cpu"
        yield text, replace(training, offload_optimizer=True), work


_CHANGES: tuple[Callable[[Training, Workload], Changed], ...] = (
    _checkpoint,
    _fewer_sequences,
    _generate_fewer,
    _bfloat16,
    _next_stages,
    _generate_fewer,
    _no_reference,
    _offload,
    # What another phase's peak hid before.
    _fewer_sequences,
    _generate_fewer,
)


def plan_table(
    config: Config, scenario: Scenario, device: Accelerator
) -> list[tuple[int, dict[int, Plan]]]:
    """For 1-64 GPUs, the plan under each ZeRO stage."""
    architecture = read_architecture(config.model.path)
    rows = []
    for gpus in GPU_COUNTS:
        plans = {}
        for stage in (0, 1, 2, 3):
            changed = replace(config, deepspeed=_with_stage(config, stage))
            at = replace(scenario, gpus=gpus)
            plans[stage] = make_plan(changed, at, device, architecture)
        rows.append((gpus, plans))
    return rows


def _with_stage(config: Config, stage: int):
    values = dict(config.deepspeed.config)
    # What the stage cannot offload stays where it is.
    drop = {"stage"} | ({"offload_param"} if stage < 3 else set())
    drop |= {"offload_optimizer"} if stage < 1 else set()
    zero = {k: v for k, v in values.get("zero_optimization", {}).items() if k not in drop}
    return replace(
        config.deepspeed,
        zero_stage=stage,  # pyright: ignore[reportArgumentType]
        config=values | {"zero_optimization": zero},
    )
