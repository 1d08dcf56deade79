"""Whole runs with a `care-train serve`: ZeRO-3 on two ranks, a killed server, one step ahead."""

from pathlib import Path

import pytest

from tests.rollout.servers import Server
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
def start(tiny_folder, color_rows, tmp_path_factory) -> list[str]:
    """Arguments of a quickstart from a folder, which the module's server serves too."""
    return [
        "quickstart",
        "--config=configs/easy_vqa.yaml",
        *SMALL,
        *COLD_START,
        *data_arguments(color_rows),
        f"model.path={tiny_folder()}",
        f"output_dir={tmp_path_factory.mktemp('runs')}",
        "rollout.engine=vllm",
        "train.steps=3",
    ]


def _folder(start, name):
    return Path(next(a for a in start if a.startswith("output_dir="))[11:]) / name


def test_two_ranks_share_a_server(start, server):
    """A ZeRO-3 quickstart: weights gathered from both shards, rollouts of both ranks, and the
    evaluations, all from one server; a wrong or missing weight would stop it."""
    url = f"rollout.vllm.server={server().url}"
    errors = run(*start, url, "deepspeed.zero_stage=3", "name=two", ranks=2)
    assert "Traceback" not in errors
    steps = records(_folder(start, "two"))
    assert [r["step"] for r in steps] == [1, 2, 3]
    assert all(r["sync_bytes"] > 1e5 and r["seconds_sync"] > 0 for r in steps)
    gaps = [r["gap_max"] for r in steps if "gap_max" in r]
    # The trainer's log-probs count the banned tokens, to which so short a cold start leaves 1 %.
    assert gaps and max(gaps) < 0.02
    assert (_folder(start, "two") / "final" / "model.safetensors").is_file()


@pytest.mark.slow
def test_a_run_whose_server_dies_says_how_it_goes_on(start, tiny_folder):
    """URL, step, checkpoint and command; and with a new server it does go on, to the end."""
    serve = [f"model.path={tiny_folder()}", "rollout.vllm.kv_cache_gib=0.25"]
    serve += ["prompt.max_prompt_tokens=300", "rollout.max_new_tokens=50"]
    arguments = [*start, "name=orphan", "train.steps=400", "train.save_every=2"]
    arguments += ["train.schedule=constant", "train.rollouts_ahead=1"]
    first, folder = Server(*serve), _folder(start, "orphan")
    orphan = FastRun(*arguments, f"rollout.vllm.server={first.url}")
    assert orphan.wait_for(lambda: (folder / "checkpoints" / "step_000004").is_dir(), seconds=200)
    first.kill()
    status, errors = orphan.end()[0]
    assert status == 72 and "Traceback" not in errors
    assert f"rollout.vllm.server {first.url}: " in errors and " of 400: " in errors
    assert f"the newest checkpoint is {folder}/checkpoints/step_" in errors
    assert f"resume={folder}" in errors
    second = Server(*serve)
    done = len(records(folder)) + 2
    run(*arguments, f"rollout.vllm.server={second.url}", f"train.steps={done}", "--resume")
    assert second.stop() == 0
    assert [r["step"] for r in records(folder)] == list(range(1, done + 1))


@pytest.mark.slow
def test_one_step_ahead_resumes_where_it_was(start, server):
    """Killed after a checkpoint and resumed: the waiting rollouts come from the checkpoint, and
    the run is the one that nothing interrupted."""
    arguments = [*start, f"rollout.vllm.server={server().url}", "train.rollouts_ahead=1"]
    arguments += ["train.steps=6", "train.save_every=2"]
    run(*arguments, "name=whole")
    whole, folder = _folder(start, "whole"), _folder(start, "killed")
    killed = FastRun(*arguments, "name=killed")
    assert killed.wait_for(lambda: (folder / "checkpoints" / "step_000002").is_dir(), seconds=200)
    killed.kill()
    run(*arguments, "name=killed", "--resume")
    assert timeless(folder) == timeless(whole)
    weights = [(path / "final" / "model.safetensors").read_bytes() for path in (whole, folder)]
    assert weights[0] == weights[1]
