"""Our step on several ranks, in processes of their own.

Run as a program under a launcher, told by a JSON object, each rank takes its share of the steps.
"""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from bench.step_case import Case, Setup, StepFigures, draw_rows
from bench.step_ours import OurTrainer
from care_train.distributed import is_main, own_environment


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
    command = [sys.executable, *launch, "-m", "bench.step_ranks", json.dumps(task)]
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
    figures = [asdict(trainer.run()) for _ in range(task["steps"])]
    if is_main():
        print(json.dumps(figures))


if __name__ == "__main__":
    _run(json.loads(sys.argv[1]))
