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
from care_train.training.failures import HUNG_STATUS, RANK_LOST_STATUS
from tests.train.runs import ROOT, SMALL, FastRun, data_arguments

IN_REWARD = """
import os, time
from care_train.training.sampling import RolloutScorer
real, calls = RolloutScorer.score, []
def score(self, *arguments, **more):
    calls.append(1)
    # The first questions are evaluated.
    if len(calls) > {after} and os.environ.get("RANK", "0") == "{rank}":
        {fault}
    return real(self, *arguments, **more)
RolloutScorer.score = score
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
    before = IN_REWARD.format(after=20, rank=1, fault=fault)
    outputs = FastRun(*arguments, ranks=2, before=before).end(seconds=60)
    for status, errors in outputs:
        assert status == 2 and "Traceback" not in errors, errors
        assert "rows.jsonl: row 3: no verdict" in errors
    assert "rank 1: " in outputs[0][1]


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_hung_verifier_is_ended_and_located(ranks, arguments, tmp_path):
    """Over limits.reward: phase, step, stacks of all threads, status 70; on every rank."""
    before = IN_REWARD.format(after=20, rank=ranks - 1, fault="time.sleep(600)")
    run = FastRun(*arguments, "limits.reward=2", "limits.forward=1", ranks=ranks, before=before)
    outputs = run.end(seconds=90)
    assert [status for status, _ in outputs] == [HUNG_STATUS] * ranks, outputs
    errors = outputs[0][1]
    assert f"rank {ranks - 1} has been in reward of step" in errors, errors
    assert "limits.reward = 2" in errors and f"resume={tmp_path / 'run'}" in errors
    stacks = tmp_path / "run" / "stacks" / f"rank_{ranks - 1:05d}.txt"
    assert "in score" in stacks.read_text()


def test_code_that_never_yields_is_ended_too(arguments):
    """A regular expression that backtracks for ever holds the interpreter: stacks, then the end."""
    fault = "__import__('re').match('(a+)+$', 'a' * 60 + 'b')"
    before = IN_REWARD.format(after=20, rank=0, fault=fault)
    [(status, errors)] = FastRun(*arguments, "limits.rank=2", before=before).end()
    assert status == 1 and "Timeout (0:00:02)" in errors and "in score" in errors


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
