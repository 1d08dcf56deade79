"""A plan: memory of a configuration on so many GPUs, and what to change if it does not fit."""

import argparse
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from rich.console import Console
from rich.table import Table

from care_train.config import Config
from care_train.planning.memory import (
    PHASES,
    checkpoint_bytes,
    host_bytes,
    plan_memory,
)
from care_train.planning.workload import GIB, Workload, gpu, read_architecture

GPU_COUNTS = (1, 2, 4, 8, 16, 32, 64)
"""Rows of `--table`."""
_STAGES = (0, 1, 2, 3)


def plan(config: Config, options: argparse.Namespace) -> None:
    """`care-train plan`: print the plan, or with `--table` the peaks on 1 to 64 GPUs.

    Raises:
        ValueError: an unknown GPU or model, or an option that is out of range.
    """
    if options.gpus < 1:
        raise ValueError(f"--gpus: got {options.gpus}, wanted at least 1")
    device, pixels = gpu(options.gpu), _pixels(options.image_size)
    model = read_architecture(config.model.path)
    work = Workload(config, model, device, options.gpus, options.images, pixels)
    console = Console(width=None if Console().is_terminal else 110)
    if options.table:
        table = plan_table(work)
        print(json.dumps(table)) if options.json else _show_table(work, table, console)
    elif options.json:
        print(json.dumps(plan_values(work)))
    else:
        _show_plan(work, console)


def _pixels(size: str | None) -> int | None:
    if size is None:
        return None
    match = re.fullmatch(r"(\d+)[xX](\d+)", size)
    if match is None:
        raise ValueError(f"--image-size: got {size!r}, wanted the form 1024x768")
    return int(match[1]) * int(match[2])


def plan_values(work: Workload) -> dict[str, Any]:
    """All numbers of a plan, in bytes."""
    memory = plan_memory(work)
    return {
        "model": work.model.name,
        "parameters": work.model.num_parameters,
        "trained_parameters": work.num_trained,
        "gpus": work.gpus,
        "gpu": work.device.name,
        "zero_stage": work.stage,
        "peak_bytes": round(memory.peak),
        "peak_phase": memory.peak_phase,
        "limit_bytes": round(memory.limit),
        "fits": memory.fits,
        "items": {item.name: round(item.num_bytes) for item in memory.items},
        "phases": {phase: round(memory.phase_bytes(phase)) for phase in PHASES},
        "checkpoint_bytes": round(checkpoint_bytes(work)),
        "host_bytes": round(host_bytes(work)),
        "advice": advise(work),
    }


def plan_table(work: Workload) -> list[dict[str, Any]]:
    """Peak bytes and whether they fit, for each of `GPU_COUNTS` and ZeRO stage."""
    rows = []
    for gpus in GPU_COUNTS:
        for stage in _STAGES:
            memory = plan_memory(_at_stage(replace(work, gpus=gpus), stage))
            row = {"gpus": gpus, "zero_stage": stage, "peak_bytes": round(memory.peak)}
            rows.append(row | {"fits": memory.fits})
    return rows


def advise(work: Workload) -> list[str]:
    """Changes that lower the peak, each kept for those after it, until one fits; none if it does.

    The order is that of their cost in time: checkpointing computes each layer's forward once more,
    ZeRO-3 gathers every layer over the links, offload moves the optimiser to the CPU.
    """
    memory, lines = plan_memory(work), []
    if memory.fits:
        return []
    for change in _CHANGES:
        for text, changed in change(work):
            lower = plan_memory(changed)
            if lower.peak > 0.99 * memory.peak:
                continue
            memory, work = lower, changed
            lines.append(f"set {text}: {memory.peak / GIB:.1f} GiB, in {memory.peak_phase}")
            if memory.fits:
                return lines
    lines.append(
        "still too much: more GPUs, larger ones, a LoRA adapter (model.lora.rank), or shorter "
        "prompt.max_prompt_tokens and rollout.max_new_tokens"
    )
    return lines


Changed = Iterator[tuple[str, Workload]]


def _set(key: str, value: Any, note: str = "") -> Callable[[Workload], Changed]:
    section, name = key.split(".")

    def change(work: Workload) -> Changed:
        yield f"{key}={str(value).lower()}{note}", _with(work, section, **{name: value})

    return change


def _fewer_sequences(work: Workload) -> Changed:
    train = work.config.train
    for share in (0.25, 0.0):
        if train.micro_batch_tokens is None:
            name, now, value = "size", train.micro_batch_size, max(1, int(work.micro_batch * share))
        else:
            now = train.micro_batch_tokens
            name, value = "tokens", max(work.context, int(now * share))
        if value < now:
            yield from _set(f"train.micro_batch_{name}", value)(work)


def _generate_fewer(work: Workload) -> Changed:
    if work.config.rollout.batch_size > 16:
        yield from _set("rollout.batch_size", 16)(work)


def _next_stages(work: Workload) -> Changed:
    # One rank has no other to share with.
    for stage in range(work.stage + 1, 4) if work.gpus > 1 else ():
        yield f"deepspeed.zero_stage={stage}", _at_stage(work, stage)


def _offload(work: Workload) -> Changed:
    deepspeed = work.config.deepspeed
    if work.stage >= 1:
        zero = dict(deepspeed.zero) | {"offload_optimizer": {"device": "cpu"}}
        text = "deepspeed.config.zero_optimization.offload_optimizer.device=cpu"
        config = deepspeed.config | {"zero_optimization": zero}
        yield text, _with(work, "deepspeed", config=config)


_CHANGES: tuple[Callable[[Workload], Changed], ...] = (
    _set("train.gradient_checkpointing", True),
    _fewer_sequences,
    _generate_fewer,
    _set("model.dtype", "bfloat16"),
    _next_stages,
    _generate_fewer,
    _set("loss.kl_coef", 0, ", which needs no reference model"),
    _offload,
    # What another phase's peak hid before.
    _fewer_sequences,
    _generate_fewer,
)
"""What `advise` tries. A change that is made already lowers nothing, and so is not advised."""


def _at_stage(work: Workload, stage: int) -> Workload:
    deepspeed = work.config.deepspeed
    # What the stage cannot offload stays where it is.
    drop = {"stage"} | ({"offload_param"} if stage < 3 else set())
    drop |= {"offload_optimizer"} if stage < 1 else set()
    zero = {key: value for key, value in deepspeed.zero.items() if key not in drop}
    config = deepspeed.config | {"zero_optimization": zero}
    return _with(work, "deepspeed", zero_stage=stage, config=config)


def _with(work: Workload, section: str, **values: Any) -> Workload:
    """The workload with other settings in a section of its configuration."""
    changed = replace(getattr(work.config, section), **values)
    return replace(work, config=replace(work.config, **{section: changed}))


def _show_table(work: Workload, rows: list[dict[str, Any]], console: Console) -> None:
    console.print(
        f"{work.model.name}, {work.device.name} with {work.device.memory / GIB:.1f} GiB: peak GiB "
        "per rank; * does not fit",
        highlight=False,
    )
    table = Table("GPUs", *(f"ZeRO-{stage}" for stage in _STAGES))
    for gpus in GPU_COUNTS:
        peaks = [
            f"{row['peak_bytes'] / GIB:.1f}{'*' * (not row['fits'])}"
            for row in rows
            if row["gpus"] == gpus
        ]
        table.add_row(str(gpus), *peaks)
    console.print(table)


def _show_plan(work: Workload, console: Console) -> None:
    memory = plan_memory(work)
    console.print(_headline(work), highlight=False)
    items = Table("memory per rank", "GiB", "there in")
    items.columns[1].justify = "right"
    for item in memory.items:
        is_always = set(item.phases) >= set(PHASES) - {"load"}
        when = "all phases" if is_always else ", ".join(item.phases)
        items.add_row(item.name, f"{item.num_bytes / GIB:.2f}", when)
    phases = Table(*PHASES, title="GiB in each phase", title_justify="left")
    phases.add_row(*(f"{memory.phase_bytes(phase) / GIB:.1f}" for phase in PHASES))
    console.print(items, phases)
    console.print(
        f"peak {memory.peak / GIB:.1f} GiB per rank, in {memory.peak_phase}, of "
        f"{memory.limit / GIB:.1f} GiB: {'fits' if memory.fits else 'DOES NOT FIT'}\n"
        f"a checkpoint has {checkpoint_bytes(work) / GIB:.1f} GiB; main memory per node at least "
        f"{host_bytes(work) / GIB:.0f} GiB",
        highlight=False,
    )
    advice = advise(work)
    if advice:
        console.print("to make it fit, in this order, each with those before it:")
        for line in advice:
            console.print(f"  {line}", highlight=False)


def _headline(work: Workload) -> str:
    model, train = work.model, work.config.train
    at_once = f"{train.micro_batch_tokens} tokens at a time"
    if train.micro_batch_tokens is None:
        at_once = f"{train.micro_batch_size} at a time"
    return (
        f"{model.name}: {model.num_parameters / 1e9:.2f} B parameters, "
        f"{work.num_trained / 1e9:.2f} B trained, {work.gpus} x {work.device.name}, "
        f"ZeRO-{work.stage}, {work.config.model.dtype}"
        + (", gradient checkpointing" if train.gradient_checkpointing else "")
        + (f", LoRA of rank {work.lora_rank}" if work.lora_rank else "")
        + f"\nper rank and step: {work.prompts:g} prompts x {work.config.rollout.group_size} "
        f"responses, up to {work.prompts * work.trained_per_group:g} sequences trained, {at_once}"
        + (", packed" if train.packing else "")
        + f"\nfor sequences of up to {work.context} tokens ({work.prompt} prompt, {work.patches} "
        "image patches)"
    )
