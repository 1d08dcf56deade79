"""ZeRO stages, ranks, micro-batches and LoRA move where numbers live, not what they are.

Each run takes the same few RL steps. The first one samples; all others train on its responses, so
that a rounding difference in a log-prob cannot change a sampled token and with it everything after.

Started as ranks, this file runs cases itself: `python -m tests.train.test_trajectory OUT MODEL ROWS
CASES`, CASES being JSON: name -> overrides.
"""

import json
import pickle
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from care_train.config import load_config
from care_train.data import load_samples
from care_train.distributed import (
    gather,
    initialize_process_group,
    is_main,
    leave_process_group,
)
from care_train.rollout.engine import Completion, Request, RolloutEngine, SamplingSettings
from care_train.training.checkpoint import seed_all
from care_train.training.rl import PromptSource, open_policy
from care_train.training.sampler import Sampler
from care_train.training.session import open_session
from care_train.training.step import TrainStep
from tests.train.builders import load
from tests.train.runs import SMALL, data_arguments, model_of, run_ranks

FP32 = ()
BF16 = (
    "model.dtype=bfloat16",
    # DeepSpeed's own linear layer for ZeRO-3, which saves memory, rounds a sum before it adds the
    # bias: another computation in bfloat16, by 6e-2 in the measure below.
    "deepspeed.config.zero_optimization.memory_efficient_linear=false",
)
LORA = ("model.lora.rank=4", "train.learning_rate=5e-3")

TOLERANCE = 1e-4
"""Largest distance of two runs' weights, relative to how far they have moved.

The same responses and gradients: what differs is the order of sums over micro-batches and ranks,
and in norms, 1e-7 each; AdamW's division by sqrt(v) enlarges that in the few elements whose
gradients are themselves rounding noise. Measured: 5e-6 and less. A lost micro-batch, a rank counted
twice or a bias correction off by one step gives 0.1 and more.
"""
BF16_TOLERANCE = 5e-2
"""The same for bfloat16, whose weights are rounded to 2^-9 of themselves.

A master weight near the middle of two steps takes the other one on a difference of 1e-7, and on
another number of ranks a sequence shares its batch with others and is padded otherwise, so that
activations are rounded after sums in another order.
"""


def _stage(number: int, *more: str) -> list[str]:
    return [f"deepspeed.zero_stage={number}", *more]


STEPS = 3
SETTINGS = (
    *SMALL,
    "rollout.group_size=6",
    "train.learning_rate=1e-3",
    "train.schedule=constant",
    "train.mini_batches=2",
    "loss.kl_coef=0.1",
)


class Replay:
    """A rollout engine that repeats what another run sampled, by prompt, prefix and seed."""

    def __init__(self, inner: RolloutEngine, tape: dict | None) -> None:
        self._inner = inner
        self._tape = tape
        self.recorded: dict[tuple[str, int, tuple[int, ...]], Completion] = {}

    def generate(self, requests: Sequence[Request], sampling: SamplingSettings) -> list[Completion]:
        keys = [(r.prompt.location, r.seed, r.prefix_ids) for r in requests]
        if self._tape is not None:
            return [self._tape[key] for key in keys]
        completions = self._inner.generate(requests, sampling)
        self.recorded |= dict(zip(keys, completions, strict=True))
        return completions

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


def run_case(out: Path, name: str, overrides: Sequence[str], model: str, rows: str) -> None:
    """Train STEPS steps; leave weights and metrics in `out`."""
    own = (f"model.path={model}", *data_arguments(Path(rows)))
    config = load_config(None, [*SETTINGS, *own, *overrides])
    seed_all(config.seed)
    device = initialize_process_group()
    session = open_session(config, Path(model), device)
    engine, rollout, reference = open_policy(session, device)
    tape_file = out / "tape.pkl"
    replay = Replay(rollout, pickle.loads(tape_file.read_bytes()) if tape_file.exists() else None)
    sampler = Sampler(replay, session.encoder, config)
    step = TrainStep(config, engine, sampler, session.scorer, reference)
    source = PromptSource(load_samples(config.data, config.seed), config)
    metrics = [step.run(source.draw, number).metrics for number in range(STEPS)]
    weights = {n: t.detach().cpu().clone() for n, t in engine.weights(1 << 20)}
    gather(None)
    if is_main():
        if not tape_file.exists():
            tape_file.write_bytes(pickle.dumps(replay.recorded))
        torch.save({"weights": weights, "metrics": metrics}, out / f"{name}.pt")


@pytest.fixture(scope="module")
def start(from_cold_start) -> Path:
    return model_of(from_cold_start)


def _distance(start: Path, one: Path, other: Path) -> float:
    """|W_one - W_other| / |W_one - W_start|."""
    first = dict(load(start).model.named_parameters())
    weights = [torch.load(path, weights_only=True)["weights"] for path in (one, other)]
    assert weights[0].keys() == weights[1].keys() == first.keys()
    apart = moved = 0.0
    for name, tensor in first.items():
        ours, theirs = (w[name].double() for w in weights)
        apart += float((ours - theirs).square().sum())
        moved += float((ours - tensor.detach().double()).square().sum())
    assert moved > 0.1
    return (apart / moved) ** 0.5


def _check_metrics(one: Path, other: Path, rel: float = 1e-3) -> None:
    ours, theirs = (torch.load(path, weights_only=True)["metrics"] for path in (one, other))
    assert len(ours) == len(theirs) == STEPS and all(m["grad_norm"] > 0 for m in ours)
    assert sum(m["trained_sequences"] for m in ours) >= 20
    for mine, its in zip(ours, theirs, strict=True):
        for key in ("loss", "kl", "grad_norm"):
            assert mine[key] == pytest.approx(its[key], rel=rel, abs=1e-4), key
        for key in ("trained_sequences", "decoded_tokens", "reward", "accuracy"):
            assert mine[key] == pytest.approx(its[key], abs=1e-9), key


def test_stages_and_micro_batches_take_one_trajectory(start, color_rows, tmp_path):
    """One rank, fp32: ZeRO 0, 1, 2 and 3; and a batch in micro-batches of 5 sequences.

    The latter without KL: where policy and reference are one, its gradient is rounding noise alone,
    and other for each way to pad, which AdamW makes full updates of.
    """
    no_kl = "loss.kl_coef=0"
    cases = {f"zero{n}": _stage(n) for n in range(4)}
    cases |= {"whole": [no_kl], "micro": [no_kl, "train.micro_batch_size=5"]}
    for name, overrides in cases.items():
        run_case(tmp_path, name, overrides, str(start), str(color_rows))
    for name in ("zero1", "zero2", "zero3"):
        files = tmp_path / "zero0.pt", tmp_path / f"{name}.pt"
        assert _distance(start, *files) < TOLERANCE, name
        _check_metrics(*files)
    assert _distance(start, tmp_path / "whole.pt", tmp_path / "micro.pt") < TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("more", [FP32, BF16, LORA], ids=["fp32", "bf16", "lora"])
def test_ranks_and_stages_take_one_trajectory(more, start, color_rows, tmp_path):
    """One and two ranks under ZeRO 0-3, in fp32, bfloat16 and with LoRA."""
    single = {f"zero{n}": _stage(n, *more) for n in range(4)}
    cases = tmp_path, start, color_rows
    run_ranks("tests.train.test_trajectory", *cases, json.dumps(single), ranks=1, seconds=400)
    double = {f"two-zero{n}": _stage(n, *more) for n in range(4)}
    run_ranks("tests.train.test_trajectory", *cases, json.dumps(double), ranks=2, seconds=400)
    tolerance, rel = (BF16_TOLERANCE, 3e-2) if more == BF16 else (TOLERANCE, 1e-3)
    distances = {}
    for name in [*single, *double]:
        files = tmp_path / "zero0.pt", tmp_path / f"{name}.pt"
        distances[name] = _distance(start, *files)
    print({name: f"{distance:.1e}" for name, distance in distances.items()})
    for name in distances:
        _check_metrics(tmp_path / "zero0.pt", tmp_path / f"{name}.pt", rel=rel)
    assert max(distances.values()) < tolerance, distances


def run_cases(out: str, model: str, rows: str, cases: str) -> None:
    for name, overrides in json.loads(cases).items():
        run_case(Path(out), name, overrides, model, rows)
    leave_process_group()


if __name__ == "__main__":
    run_cases(*sys.argv[1:])
