"""A plan for people, and as one JSON object."""

import json
from typing import Any

from rich.console import Console
from rich.table import Table

from care_train.planning import states
from care_train.planning.hardware import GIB
from care_train.planning.memory import PHASES
from care_train.planning.plan import Plan
from care_train.planning.timing import Efficiencies
from care_train.planning.workload import Workload


def show_plan(plan: Plan, console: Console) -> None:
    """Memory by item and phase, time by part, and the verdict."""
    console.print(_headline(plan), highlight=False)
    console.print(_memory_table(plan), _phase_table(plan), _time_table(plan))
    memory = plan.memory
    verdict = "fits" if memory.fits else "DOES NOT FIT"
    console.print(
        f"peak {memory.peak / GIB:.1f} GiB per rank, in {memory.peak_phase}, of "
        f"{memory.limit / GIB:.1f} GiB: {verdict}",
        f"about {plan.time.total:.0f} s per step; a checkpoint has "
        f"{plan.checkpoint_bytes / GIB:.1f} GiB; main memory per node at least "
        f"{plan.host_bytes / GIB:.0f} GiB",
        sep="\n",
        highlight=False,
    )
    if plan.advice:
        console.print("to make it fit, in this order, each with those before it:")
        for line in plan.advice:
            console.print(f"  {line}", highlight=False)


def show_table(rows: list[tuple[int, dict[int, Plan]]], console: Console) -> None:
    """Peak per rank and seconds per step over GPUs and ZeRO stages."""
    first = rows[0][1][0]
    console.print(
        f"{first.architecture.name}, {first.device.name} with {first.memory.limit / GIB:.1f} GiB: "
        "peak GiB per rank / seconds per step; * does not fit",
        highlight=False,
    )
    table = Table("GPUs", *(f"ZeRO-{stage}" for stage in rows[0][1]), title_justify="left")
    for gpus, plans in rows:
        cells = [
            f"{p.memory.peak / GIB:.1f}{'' if p.memory.fits else '*'} / {p.time.total:.0f} s"
            for p in plans.values()
        ]
        table.add_row(str(gpus), *cells)
    console.print(table)


def plan_to_json(plan: Plan) -> str:
    """All numbers of a plan on one line: bytes and seconds."""
    memory = plan.memory
    values: dict[str, Any] = {
        "model": plan.architecture.name,
        "parameters": plan.architecture.num_parameters,
        "trained_parameters": states.num_trained(plan.architecture, plan.training),
        "gpus": plan.training.gpus,
        "gpu": plan.device.name,
        "zero_stage": plan.training.stage,
        "peak_bytes": round(memory.peak),
        "peak_phase": memory.peak_phase,
        "limit_bytes": round(memory.limit),
        "fits": memory.fits,
        "items": {item.name: round(item.num_bytes) for item in memory.items},
        "phases": {phase: round(memory.phase_bytes(phase)) for phase in PHASES},
        "seconds": {name: round(value, 3) for name, value in plan.time.parts.items()},
        "step_seconds": round(plan.time.total, 3),
        "checkpoint_bytes": round(plan.checkpoint_bytes),
        "host_bytes": round(plan.host_bytes),
        "advice": list(plan.advice),
    }
    return json.dumps(values)


def table_to_json(rows: list[tuple[int, dict[int, Plan]]]) -> str:
    """The table on one line: GPUs, stage, peak bytes, whether it fits, seconds per step."""
    entries = [
        {
            "gpus": gpus,
            "zero_stage": stage,
            "peak_bytes": round(plan.memory.peak),
            "fits": plan.memory.fits,
            "step_seconds": round(plan.time.total, 3),
        }
        for gpus, plans in rows
        for stage, plan in plans.items()
    ]
    return json.dumps(entries)


def _at_once(work: Workload) -> str:
    packed = ", packed" if work.packing else ""
    if work.micro_batch_tokens is None:
        return f"{work.micro_batch:g} at a time{packed}"
    return f"{work.micro_batch_tokens} tokens at a time{packed}"


def _headline(plan: Plan) -> str:
    training, work, model = plan.training, plan.work, plan.architecture
    trained = states.num_trained(model, training)
    lines = [
        f"{model.name}: {model.num_parameters / 1e9:.2f} B parameters, {trained / 1e9:.2f} B "
        f"trained, {training.gpus} x {plan.device.name}, ZeRO-{training.stage}, "
        f"{'bfloat16' if training.parameter_bytes == 2 else 'float32'}"
        + (", gradient checkpointing" if training.checkpointing else "")
        + (f", LoRA of rank {training.lora_rank}" if training.lora_rank else ""),
        f"per rank and step: {work.prompts:g} prompts x {work.group_size} responses, up to "
        f"{work.prompts * work.trained_per_group:g} sequences trained, {_at_once(work)}",
        f"memory for sequences of up to {work.context} tokens ({work.prompt} prompt, "
        f"{work.patches} image patches); time for {work.mean_length:.0f} on average",
        f"assumed: {Efficiencies().describe()}",
    ]
    return "\n".join(lines)


def _memory_table(plan: Plan) -> Table:
    table = Table("memory per rank", "GiB", "there in", title_justify="left")
    table.columns[1].justify = "right"
    for item in plan.memory.items:
        always = set(item.phases) >= set(PHASES) - {"load"}
        when = "all phases" if always else ", ".join(item.phases)
        table.add_row(item.name, f"{item.num_bytes / GIB:.2f}", when)
    return table


def _phase_table(plan: Plan) -> Table:
    table = Table(*PHASES, title="GiB in each phase", title_justify="left")
    table.add_row(*(f"{plan.memory.phase_bytes(phase) / GIB:.1f}" for phase in PHASES))
    return table


def _time_table(plan: Plan) -> Table:
    table = Table("part of a step", "seconds", title_justify="left")
    table.columns[1].justify = "right"
    for name, seconds in plan.time.parts.items():
        table.add_row(name, f"{seconds:.2f}")
    return table
