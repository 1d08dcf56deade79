"""Our training step as `bench.step` measures it: the trainer's own parts, put together alike.

Run as a program under a launcher, told by a JSON object, each rank takes its share of the steps.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from bench.step_case import (
    Case,
    FixedLengthVerifier,
    Setup,
    StepFigures,
    case_config,
    draw_rows,
    end_never,
)
from care_train.data import Sample
from care_train.distributed import (
    initialize_process_group,
    is_main,
    own_environment,
    own_share,
)
from care_train.models.prompts import TokenText
from care_train.training.groups import RolloutScorer
from care_train.training.loop import few_collections
from care_train.training.rl import open_policy
from care_train.training.sampler import Sampler
from care_train.training.session import Session, open_session
from care_train.training.step import TrainStep


class OurTrainer:
    """A trainer that makes one step at a time."""

    def __init__(self, setup: Setup, case: Case, overrides: Sequence[str]) -> None:
        """Load the policy and build its engines.

        Args:
            setup: policy and rows.
            case: sizes.
            overrides: settings such as `algorithm=grpo` and `rollout.engine=vllm`.
        """
        device = initialize_process_group()
        config = case_config(case, overrides)
        opened = open_session(config, setup.folder, device)
        end_never(opened.loaded)
        verifier = FixedLengthVerifier(config.prompt, config.reward)
        scorer = RolloutScorer(TokenText(opened.loaded.tokenizer), verifier, config.prompt)
        session = Session(config, opened.loaded, opened.encoder, scorer)
        engine, rollout, reference = open_policy(session, device)
        sampler = Sampler(rollout, session.encoder, config)
        self._step = TrainStep(config, engine, sampler, scorer, reference)
        self._setup, self._case, self._done = setup, case, 0

    def run(self) -> StepFigures:
        """One step, timed.

        Raises:
            RuntimeError: a response is not of the length asked for.
        """
        start = time.perf_counter()
        outcome = self._step.run(self._draw, self._done)
        seconds = time.perf_counter() - start
        self._done += 1
        metrics = outcome.metrics
        tokens, sequences = int(metrics["decoded_tokens"]), int(metrics["sampled_sequences"])
        if tokens != sequences * self._case.length:
            raise RuntimeError(
                f"bench.step: got {tokens} tokens of {sequences} sequences, wanted "
                f"{self._case.length} of each"
            )
        parts = {
            key.removeprefix("seconds_"): value
            for key, value in metrics.items()
            if key.startswith("seconds_") and key != "seconds_overhead"
        }
        return StepFigures(seconds, tokens, parts, int(metrics["trained_sequences"]))

    def _draw(self) -> list[Sample]:
        first, count = self._done * self._case.prompts, self._case.prompts
        return list(own_share(self._setup.prompts(first, count)))


def measure_ranks(
    setup: Setup, case: Case, overrides: Sequence[str], ranks: int, steps: int
) -> list[StepFigures]:
    """Every step's figures with the case's prompts shared by `ranks` processes.

    Raises:
        RuntimeError: a rank failed; holds what it printed last.
    """
    task = {
        "folder": str(setup.folder),
        "num_rows": len(setup.rows),
        "case": asdict(case),
        "overrides": list(overrides),
        "steps": steps,
    }
    launch = ("-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}")
    command = [sys.executable, *launch, "-m", "bench.step_ours", json.dumps(task)]
    environment = own_environment()
    environment["OMP_NUM_THREADS"] = str(threads_of(ranks))
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, cwd=Path(__file__).parents[1]
    )
    if done.returncode:
        raise RuntimeError(f"bench.step on {ranks} ranks: {done.stderr[-2000:]}")
    steps_taken = json.loads(done.stdout.strip().splitlines()[-1])
    return [StepFigures(**figures) for figures in steps_taken]


def threads_of(ranks: int) -> int:
    """Of each rank: the cores shared evenly, and no more than this process uses."""
    return min(max(len(os.sched_getaffinity(0)) // ranks, 1), torch.get_num_threads())


def _run(task: dict) -> None:
    setup = Setup(Path(task["folder"]), draw_rows(task["num_rows"]))
    trainer = OurTrainer(setup, Case(**task["case"]), task["overrides"])
    with few_collections():
        figures = [asdict(trainer.run()) for _ in range(task["steps"])]
    if is_main():
        print(json.dumps(figures))


if __name__ == "__main__":
    _run(json.loads(sys.argv[1]))
