"""Ranks of one trajectory test: the same few RL steps under several ZeRO stages.

The first run samples; all others train on its responses, so that a rounding difference in a
log-prob cannot change a sampled token and with it everything after.

`python -m tests.train.trajectory OUT MODEL ROWS CASES`, CASES being JSON: name -> overrides.
"""

import json
import pickle
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

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
from tests.train.runs import data_arguments

STEPS = 3
SETTINGS = (
    "prompt.system=null",
    "rollout.group_size=6",
    "rollout.max_new_tokens=24",
    "train.prompts_per_step=4",
    "train.micro_batch_size=8",
    "train.learning_rate=1e-3",
    "train.warmup_steps=0",
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


def main(out: str, model: str, rows: str, cases: str) -> None:
    for name, overrides in json.loads(cases).items():
        run_case(Path(out), name, overrides, model, rows)
    leave_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
