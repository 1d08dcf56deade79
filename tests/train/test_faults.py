"""Break real runs in every way that runs break; each ends with a message, none hangs."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from care_train.training.distributed import own_environment
from care_train.training.failures import (
    HUNG_STATUS,
    NOT_FINITE_STATUS,
    OUT_OF_MEMORY_STATUS,
    RANK_LOST_STATUS,
)
from tests.train.runs import ROOT, SMALL, FastRun, data_arguments, timeless

IN_REWARD = """
import os, time
from care_train.verifier import Verifier
real, calls = Verifier.score_batch, []
def score_batch(self, responses):
    calls.append(1)
    # The first is of the evaluation before training.
    if len(calls) > 2 and os.environ.get("RANK", "0") == "{rank}":
        {fault}
    return real(self, responses)
Verifier.score_batch = score_batch
"""


@pytest.fixture
def arguments(tmp_path) -> list[str]:
    rows = tmp_path / "rows.jsonl"
    lines = [{"prompt": f"what is {i} and one?", "answer": f"{i + 1}"} for i in range(8)]
    rows.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return [
        *("train", *SMALL, *data_arguments(rows), f"output_dir={tmp_path}", "name=run"),
        *("model.path=tiny-qwen2", "rollout.max_new_tokens=8", "train.steps=40"),
    ]


def _steps(folder: Path) -> int:
    path = folder / "metrics.jsonl"
    return path.read_text().count('"train"') if path.is_file() else 0


@pytest.mark.parametrize("killed", [0, 1])
def test_a_killed_rank_ends_the_others_within_seconds(killed, arguments, tmp_path):
    """Bare ranks, no launcher: the survivor names the dead one, its step, and how to go on."""
    run = FastRun(*arguments, "train.save_every=1", ranks=2)
    assert run.wait_for(lambda: _steps(tmp_path / "run") >= 2), run.end()
    run.kill(killed)
    start = time.monotonic()
    outputs = run.end(seconds=30)
    assert time.monotonic() - start < 20
    status, errors = outputs[1 - killed]
    assert outputs[killed][0] == -signal.SIGKILL and status == RANK_LOST_STATUS, errors
    assert f"rank {killed}: its process" in errors and "died in" in errors
    assert f"resume={tmp_path / 'run'}" in errors and "Traceback" not in errors
    assert f"the newest checkpoint is {tmp_path / 'run' / 'checkpoints' / 'step_'}" in errors


def test_an_error_of_one_rank_ends_all_with_its_message(arguments, tmp_path):
    """A verifier that fails on rank 1: rank 0 stops too, with the same message and status."""
    fault = "raise ValueError('rows.jsonl: row 3: no verdict')"
    before = IN_REWARD.format(rank=1, fault=fault)
    outputs = FastRun(*arguments, ranks=2, before=before).end(seconds=60)
    for status, errors in outputs:
        assert status == 2 and "Traceback" not in errors, errors
        assert "rows.jsonl: row 3: no verdict" in errors
    assert "rank 1: " in outputs[0][1]


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_hung_verifier_is_ended_and_located(ranks, arguments, tmp_path):
    """Over limits.reward: phase, step, stacks of all threads, status 70; on every rank."""
    before = IN_REWARD.format(rank=ranks - 1, fault="time.sleep(600)")
    run = FastRun(*arguments, "limits.reward=2", "limits.forward=1", ranks=ranks, before=before)
    outputs = run.end(seconds=90)
    assert [status for status, _ in outputs] == [HUNG_STATUS] * ranks, outputs
    errors = outputs[0][1]
    assert f"rank {ranks - 1} has been in reward of step" in errors, errors
    assert "limits.reward = 2" in errors and f"resume={tmp_path / 'run'}" in errors
    stacks = tmp_path / "run" / "stacks" / f"rank_{ranks - 1:05d}.txt"
    assert "in score_batch" in stacks.read_text()


def test_code_that_never_yields_is_ended_too(arguments):
    """A regular expression that backtracks for ever holds the interpreter: stacks, then the end."""
    fault = "__import__('re').match('(a+)+$', 'a' * 60 + 'b')"
    before = IN_REWARD.format(rank=0, fault=fault)
    [(status, errors)] = FastRun(*arguments, "limits.rank=2", before=before).end()
    assert status == 1 and "Timeout (0:00:02)" in errors and "in score_batch" in errors


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["deepspeed", "torchrun"])
def test_launchers_end_with_the_cause(launcher, arguments, tmp_path):
    """SIGKILL to one rank under a launcher: all processes end, and the cause is in the log."""
    binary = [Path(sys.executable).parent / launcher]
    options = ["--num_gpus=2", "--module"]
    if launcher == "torchrun":
        binary, options = [sys.executable, "-m", "torch.distributed.run"], ["--nproc-per-node=2"]
        options += ["--standalone", "--module"]
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(
            [*binary, *options, "care_train", *arguments],
            stdout=log,
            stderr=log,
            cwd=ROOT,
            env=own_environment() | {"OMP_NUM_THREADS": "1"},
        )
    end = time.monotonic() + 120
    while _steps(tmp_path / "run") < 2 and time.monotonic() < end:
        assert process.poll() is None, (tmp_path / "log").read_text()
        time.sleep(0.01)
    ranks = [
        child
        for child in psutil.Process(process.pid).children(recursive=True)
        if child.environ().get("RANK") == "1" and child.cmdline()[-1] == arguments[-1]
    ]
    ranks[-1].kill()
    assert process.wait(60) != 0
    log_text = (tmp_path / "log").read_text()
    assert "rank 1: its process" in log_text and f"resume={tmp_path / 'run'}" in log_text


LIMITED = """
import resource
from {module} import {owner}
real = {owner}.{name}
def limited(self, *arguments, **more):
    size = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + ({spare} << 20), resource.RLIM_INFINITY))
    try:
        return real(self, *arguments, **more)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY,) * 2)
{owner}.{name} = limited
"""
GENERATE = {
    "module": "care_train.rollout.transformers_engine",
    "owner": "TransformersEngine",
    "name": "generate",
}
STEP = {"module": "care_train.training.engine", "owner": "PolicyEngine", "name": "step"}
LARGE = (
    *("algorithm=grpo", "train.steps=1", "rollout.max_new_tokens=3", "rollout.group_size=128"),
    *("train.prompts_per_step=8", "rollout.batch_size=1024", "train.micro_batch_size=1024"),
)


def test_generation_that_runs_out_of_memory_is_halved_once(arguments, tmp_path):
    """The operating system refuses memory: half as many sequences at once, the same tokens."""
    errors = ""
    for spare in (16, 22, 31, 43, 60, 84, 118):  # half of it must fit, all of it not
        before = LIMITED.format(**GENERATE, spare=spare)
        run = FastRun(*arguments, *LARGE, "overwrite=true", before=before)
        [(status, errors)] = run.end()
        if status == 0:
            break
        assert status == OUT_OF_MEMORY_STATUS, errors
    assert "out of memory while 1024 responses were generated" in errors
    assert "going on with 512 at once; set rollout.batch_size" in errors
    [(status, calm)] = FastRun(*arguments, *LARGE, "name=calm").end()
    assert status == 0 and "memory" not in calm, calm
    assert timeless(tmp_path / "run") == timeless(tmp_path / "calm")


@pytest.mark.parametrize(
    ("what", "advice"), [(GENERATE, "rollout.batch_size"), (STEP, "train.micro_batch_size")]
)
def test_a_run_that_has_no_memory_says_what_to_lower(what, advice, arguments, tmp_path):
    """Not enough for half of it, or none to train: step, phase, settings to lower, status 71."""
    before = LIMITED.format(**what, spare=0)
    [(status, errors)] = FastRun(*arguments, *LARGE, before=before).end()
    assert status == OUT_OF_MEMORY_STATUS and "Traceback" not in errors, errors
    phase = "update" if what is STEP else "generate"
    assert f"step 1 of 1: out of memory in {phase} (" in errors and f"lower {advice}" in errors
    assert "care-train plan" in errors or phase == "generate"
    assert f"resume={tmp_path / 'run'}" in errors


NOT_FINITE = """
import os
from care_train.training import update
real, calls = update.loss_rows, []
def loss_rows(*arguments):
    rows = real(*arguments)
    calls.append(1)
    if os.environ["RANK"] == "1" and len(calls) == 9:
        rows.kl_weights[2] = float("nan")
    return rows
update.loss_rows = loss_rows
"""


@pytest.mark.parametrize("allowed", [0, 1])
def test_a_loss_that_is_not_finite_ends_all_ranks_or_is_left_out(allowed, arguments, tmp_path):
    """NaN on rank 1 in step 2: the row, the token and the quantity are named on both ranks; where
    it may be left out, the run goes on, counts it, and its metrics stay finite."""
    more = ("algorithm=grpo", "train.steps=3", f"train.max_skipped_updates={allowed}")
    outputs = FastRun(*arguments, *more, ranks=2, before=NOT_FINITE).end()
    cause = "first: kl_weights is nan at response token 2 of "
    if allowed:
        assert [status for status, _ in outputs] == [0, 0], outputs
        assert cause in outputs[0][1] and "1 of 1 allowed" in outputs[0][1]
        records = [r for r in timeless(tmp_path / "run") if r["phase"] == "train"]
        assert [r["skipped_updates"] for r in records] == [0, 1, 0]
        assert all(r["loss"] is not None for r in records)
        return
    for status, errors in outputs:
        assert status == NOT_FINITE_STATUS and "Traceback" not in errors, errors
        assert "step 2 of 3: loss nan" in errors and cause in errors and "on rank 1" in errors
        assert "rows.jsonl: row " in errors
