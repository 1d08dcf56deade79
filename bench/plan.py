"""`care-train plan` against what training really takes, at sizes that a CPU can hold.

    python -m bench.plan
    python -m bench.plan --cases text vision

Each case trains a tiny model for two steps in a process of its own, as `care-train train` does:
DeepSpeed, a reference model, two micro-batches. Its peak resident memory, less what it had with all
libraries loaded and warm, is compared with the plan's largest phase; the bytes of the model's
states are counted tensor by tensor. The last line is one JSON object.
"""

import argparse
import copy
import ctypes
import gc
import json
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from rich.console import Console
from rich.table import Table

from bench.measure import peak_of
from care_train.cli import quiet_libraries
from care_train.config import Config, PromptSettings, build_config
from care_train.data import Sample
from care_train.distributed import initialize_process_group, own_environment
from care_train.models.batch import TokenSequence
from care_train.models.load import LoadedModel, load_model, recompute_activations
from care_train.models.prompts import EncodedPrompt, PromptEncoder
from care_train.models.tiny import build_tiny_model
from care_train.planning.memory import plan_memory
from care_train.planning.workload import Device, Workload, read_architecture
from care_train.training.weights import tensor_bytes

MIB = 2**20


@dataclass(frozen=True)
class Case:
    """A model and a configuration, small enough to measure."""

    kind: str
    hidden_size: int
    stage: int = 0
    dtype: str = "float32"
    micro_batch: int = 4
    image_side: int = 0
    """Pixels; 0: text."""
    checkpointing: bool = False
    prompt: int = 64
    response: int = 64


CASES = {
    "text": Case("tiny-qwen2", 1024),
    "text-long": Case("tiny-qwen2", 512, micro_batch=16, prompt=256, response=256),
    "text-checkpointed": Case(
        "tiny-qwen2", 512, micro_batch=16, prompt=256, response=256, checkpointing=True
    ),
    "vision": Case("tiny-qwen2.5-vl", 1024, micro_batch=8, image_side=112),
    "zero-2": Case("tiny-qwen2.5-vl", 1024, stage=2, image_side=112),
    "zero-2-bfloat16": Case("tiny-qwen3-vl", 1024, stage=2, dtype="bfloat16", image_side=112),
    "zero-3": Case("tiny-qwen2", 1024, stage=3),
}
"""By name."""


@dataclass(frozen=True)
class Comparison:
    """Bytes: predicted, measured."""

    states: int
    """Parameters, gradients, optimiser states, master weights, the reference model."""
    measured_states: int
    peak: int
    measured_peak: int

    @property
    def ratio(self) -> float:
        """Predicted over measured peak."""
        return self.peak / self.measured_peak

    @property
    def state_ratio(self) -> float:
        """Predicted over measured states."""
        return self.states / self.measured_states


def main() -> int:
    """Measure every case and print the table and one JSON line."""
    parser = argparse.ArgumentParser(description="`care-train plan` against real training.")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    quiet_libraries()
    if options.child:
        print(json.dumps(measure(Case(**json.loads(options.child)))))
        return 0
    table = Table("case", "states MiB", "measured", "ratio", "peak MiB", "measured", "ratio")
    results = {}
    for name in options.cases:
        found = compare(CASES[name])
        results[name] = asdict(found) | {"ratio": round(found.ratio, 3)}
        results[name]["state_ratio"] = round(found.state_ratio, 3)
        cells = (found.states, found.measured_states, found.peak, found.measured_peak)
        states, own, peak, real = (f"{value / MIB:.0f}" for value in cells)
        row = (states, own, f"{found.state_ratio:.2f}", peak, real, f"{found.ratio:.2f}")
        table.add_row(name, *row)
    Console(width=100).print(table)
    ratios = [entry["ratio"] for entry in results.values()]
    print(json.dumps({"min_ratio": min(ratios), "max_ratio": max(ratios), "cases": results}))
    return 0


def compare(case: Case) -> Comparison:
    """Measure a case in a fresh process, beside its prediction."""
    command = [sys.executable, "-m", "bench.plan", "--child", json.dumps(asdict(case))]
    environment = own_environment() | {"DS_ACCELERATOR": "cpu", "TRANSFORMERS_VERBOSITY": "error"}
    # Freed memory goes back at once, so that the peak is what was in use.
    environment |= {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": str(64 * 1024)}
    done = subprocess.run(
        command, capture_output=True, text=True, env=environment, cwd=Path(__file__).parents[1]
    )
    if done.returncode:
        raise RuntimeError(f"bench.plan: {case}: {done.stderr[-2000:]}")
    measured = json.loads(done.stdout.strip().splitlines()[-1])
    return Comparison(**predict(case, measured.pop("lengths")), **measured)


def predict(case: Case, lengths: dict[str, int]) -> dict[str, int]:
    """The plan's bytes for the sequences that were trained.

    Args:
        case: what was measured.
        lengths: `prompt`, `context` and `patches` of a sequence.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = build_tiny_model(case.kind, folder, hidden_size=case.hidden_size)
        architecture = read_architecture(str(path))
    config, cpu = _config(case, lengths["prompt"]), Device("CPU", 2.0**40, is_cpu=True)
    images = 1 if case.image_side else 0
    work = Workload(config, architecture, cpu, 1, images, case.image_side**2)
    assert (work.context, work.patches) == (lengths["context"], lengths["patches"])
    plan = plan_memory(work)
    names = ("parameters", "fp32 master weights", "optimiser states", "gradients")
    states = plan.item_bytes(*names, "reference model")
    peak = max(plan.phase_bytes(phase) for phase in ("load", "train", "step"))
    return {"states": round(states), "peak": round(peak)}


def measure(case: Case) -> dict[str, Any]:
    """Train for two steps in this process; the bytes of its states, and its peak."""
    torch.set_num_threads(1)
    initialize_process_group()
    # Libraries, kernels and thread pools load here, and count for nothing.
    _train(replace(case, hidden_size=64, micro_batch=1))
    _trim()
    found: list[Any] = []
    peak = peak_of(lambda: found.extend(_train(case)), "cpu")
    states, lengths = found
    return {"measured_states": states, "measured_peak": peak, "lengths": lengths}


def _train(case: Case) -> tuple[int, dict[str, int]]:
    """Two optimiser steps of two micro-batches; the bytes of states, and the sequences' sizes."""
    # They load DeepSpeed, which the process that compares does without.
    from care_train.training.engine import MicroBatch, PolicyEngine
    from care_train.training.optimizer import OptimizerSettings

    config = _config(case)
    with tempfile.TemporaryDirectory() as folder:
        path = build_tiny_model(case.kind, folder, hidden_size=case.hidden_size)
        _trim()
        loaded = load_model(config.model, path)
    if case.checkpointing:
        recompute_activations(loaded.model)
    reference = copy.deepcopy(loaded.model).requires_grad_(False)
    engine = PolicyEngine(
        loaded,
        OptimizerSettings(1e-6, total_steps=2),
        config,
        torch.device("cpu"),
        copy_for_rollouts=True,
    )
    prompt = _prompt(loaded, case)
    sequence = TokenSequence(prompt, (), tuple(20 + i % 40 for i in range(case.response)))
    batch = engine.collate([sequence] * case.micro_batch)
    rows = len(batch.target_ids)
    arguments = {"advantages": torch.full((rows,), 1e-3), "kl_weights": torch.full((rows,), 1e-3)}
    arguments["ref_log_probs"] = engine.log_probs(batch, 1.0)[0]
    gradients = _count_gradients(engine)
    for _ in range(2):
        engine.step([MicroBatch(batch, arguments)] * 2, 1.0)
    states = _state_bytes(engine, reference) + max(gradients)
    lengths = {"prompt": len(prompt.token_ids), "context": len(sequence.token_ids)}
    grid = prompt.image_grid_thw
    return states, lengths | {"patches": 0 if grid is None else int(grid.prod())}


def _count_gradients(engine: Any) -> list[int]:
    """A list that gets the gradients' bytes before every optimiser step, which frees them."""
    inner, step, counts = engine._engine, engine._engine.step, []

    def counted() -> None:
        own = [p.grad for p in engine._policy.parameters() if p.grad is not None]
        sharded = [
            getattr(inner.optimizer, name, None)
            for name in ("averaged_gradients", "grad_partitions_flat_buffer")
        ]
        counts.append(tensor_bytes([*own, *sharded]))
        step()

    inner.step = counted
    return counts


def _state_bytes(engine: Any, reference: torch.nn.Module) -> int:
    """Bytes of the weights, the optimiser's states and own weights, and the reference model."""
    weights = list(engine._policy.parameters())
    groups = [p for group in engine.optimizer.param_groups for p in group["params"]]
    held = {p.data_ptr() for p in weights}
    master = [p for p in groups if p.data_ptr() not in held]
    trees = (weights, list(engine.optimizer.state.values()), master, list(reference.parameters()))
    return sum(map(tensor_bytes, trees))


def _prompt(loaded: LoadedModel, case: Case) -> EncodedPrompt:
    if not case.image_side:
        return EncodedPrompt(tuple(20 + i % 40 for i in range(case.prompt)))
    drawn = Image.new("RGB", (case.image_side, case.image_side), "red")
    sample = Sample(id="0", prompt="what is it?", answer="red", images=(drawn,))
    return PromptEncoder(loaded, PromptSettings()).encode([sample])[0]


def _config(case: Case, prompt: int | None = None) -> Config:
    """Of a case, whose prompt is known to be so long once it is rendered."""
    return build_config(
        {
            "model": {"path": case.kind, "dtype": case.dtype},
            "rollout": {"max_new_tokens": case.response, "batch_size": 1},
            "prompt": {"max_prompt_tokens": prompt or case.prompt},
            "care": {"reflection": {"negative": "none"}},
            "train": {
                "micro_batch_size": case.micro_batch,
                "prompts_per_step": 1,
                "gradient_checkpointing": case.checkpointing,
            },
            "deepspeed": {"zero_stage": case.stage},
        }
    )


def _trim() -> None:
    """Give freed memory back to the system."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)


if __name__ == "__main__":
    sys.exit(main())
