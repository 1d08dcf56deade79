"""The launch scripts: their commands, and real ranks started through them on this machine."""

import inspect
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path

import psutil
import pytest
import torch
import torch.distributed as dist

from care_train.cli import quiet_libraries
from care_train.distributed import initialize_process_group, own_environment
from tests.train.runs import ROOT, records, steps_logged, text_run_arguments

LAUNCH = ROOT / "launch"
SCRIPTS = sorted([*LAUNCH.glob("*.sh"), *LAUNCH.glob("*.sbatch")])


def _environment(**more: str) -> dict[str, str]:
    # SLURM's are this machine's own, where the tests are a job.
    kept = {k: v for k, v in own_environment().items() if "SLURM" not in k}
    return kept | {"PYTHON": sys.executable} | more


def _start(command: Sequence[object], **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        list(map(str, command)),
        cwd=ROOT,
        env=_environment(**environment),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def _output(*command: object, **environment: str) -> tuple[int, str]:
    process = _start(command, **environment)
    text, _ = process.communicate(timeout=300)
    return process.returncode, text


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_valid_and_explain_themselves(script):
    """`bash -n`, shellcheck where there is one, executable or a job, usage without arguments."""
    assert subprocess.run(["bash", "-n", script]).returncode == 0
    if shutil.which("shellcheck"):
        checked = subprocess.run(["shellcheck", script], capture_output=True, text=True)
        assert checked.returncode == 0, checked.stdout
    assert script.suffix == ".sbatch" or script.stat().st_mode & stat.S_IXUSR
    status, text = _output("bash", script)
    assert status == 2 and "train --config configs/care.yaml" in text


def test_commands_name_nodes_and_ranks():
    """What is handed to the launchers, several nodes included."""
    config = ("train", "--config", "configs/care.yaml")
    deepspeed, torchrun = LAUNCH / "deepspeed.sh", LAUNCH / "torchrun.sh"
    node = {"NODE_RANK": "1", "MASTER_ADDR": "n0", "DRY_RUN": "1"}
    status, text = _output(deepspeed, *config, HOSTFILE="hosts", **node)
    assert status == 0
    wanted = "--master_port 29500 --hostfile hosts --master_addr n0 --no_ssh --node_rank 1"
    assert f"{wanted} --module care_train train --config configs/care.yaml" in text
    status, text = _output(torchrun, *config, NNODES="2", GPUS_PER_NODE="8", **node)
    assert status == 0
    assert "--nnodes 2 --node_rank 1 --master_addr n0 --master_port 29500 -m care_train" in text
    for script, more in ((torchrun, {"NNODES": "2"}), (deepspeed, {"NODE_RANK": "1"})):
        status, text = _output(script, *config, DRY_RUN="1", GPUS_PER_NODE="8", **more)
        assert status != 0 and "wanted with N" in text


def test_a_rank_without_a_gpu_of_its_own(monkeypatch):
    """More ranks than GPUs, or a launcher that shows each rank one."""
    for name, value in {"RANK": "3", "LOCAL_RANK": "3", "WORLD_SIZE": "4"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ValueError, match="LOCAL_RANK: got 3, wanted less than 2, the GPUs"):
        initialize_process_group()


def test_a_barrier_on_gpus_warns_of_nothing():
    """torch asks for a device although the rank has set it."""
    (text,) = re.findall(r'"(barrier\(\): using [^"]*)"', inspect.getsource(dist.barrier))
    with warnings.catch_warnings(record=True) as found:
        quiet_libraries()
        warnings.warn(text, stacklevel=1)
    assert not found


def _wait_for_two_steps(job: subprocess.Popen[str], run: Path) -> None:
    while steps_logged(run) < 2:
        assert job.poll() is None, job.communicate()[0]
        time.sleep(0.01)


ACCELERATE = (
    *(sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--multi_gpu"),
    *("--num_processes=2", "--num_machines=1", "--mixed_precision=no", "--dynamo_backend=no"),
    *("-m", "care_train"),
)


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["deepspeed.sh", "torchrun.sh", "accelerate"])
def test_a_launchers_ranks_end_together_and_go_on(launcher, tmp_path):
    """Two ranks under ZeRO-3, started by the real launcher: SIGKILL to one ends all processes with
    the cause in the log, and the same command with --resume trains to the end."""
    hosts, run = tmp_path / "hostfile", tmp_path / "run"
    hosts.write_text("localhost slots=2\n")
    places = {
        "deepspeed.sh": {"HOSTFILE": str(hosts), "NODE_RANK": "0", "MASTER_ADDR": "127.0.0.1"},
        "torchrun.sh": {"GPUS_PER_NODE": "2"},
    }
    environment = {"MASTER_PORT": str(20000 + os.getpid() % 20000)} | places.get(launcher, {})
    program = ACCELERATE if launcher == "accelerate" else [LAUNCH / launcher]
    more = ("deepspeed=zero3", "train.steps=20", "train.save_every=1")
    command = [*program, *text_run_arguments(tmp_path), *more]
    job = _start(command, **environment)
    _wait_for_two_steps(job, run)
    ranks = [
        child
        for child in psutil.Process(job.pid).children(recursive=True)
        if child.environ().get("RANK") == "1" and child.cmdline()[-1] == more[-1]
    ]
    ranks[-1].kill()
    text, _ = job.communicate(timeout=60)
    assert job.returncode != 0, text
    assert "rank 1: its process" in text and f"resume={run}" in text, text
    status, text = _output(*command, "--resume", **environment)
    assert status == 0, text
    assert [record["step"] for record in records(run)] == list(range(1, 21))
    assert (run / "final" / "model.safetensors").is_file()


@pytest.mark.slow
def test_a_slurm_job_saves_requeues_and_goes_on(tmp_path):
    """SIGTERM to the ranks: a checkpoint, `scontrol requeue`; the second turn ends the run."""
    requeued, run = tmp_path / "requeued", tmp_path / "run"
    command = [LAUNCH / "slurm.sbatch", *text_run_arguments(tmp_path), "train.steps=40"]
    environment = {
        "PATH": f"{Path(__file__).parent / 'fake_slurm'}:{os.environ['PATH']}",
        "REQUEUED": str(requeued),
        "SLURM_JOB_ID": str(os.getpid()),
        "SLURM_JOB_NODELIST": "here",
    }
    job = _start(command, **environment)
    _wait_for_two_steps(job, run)
    for child in psutil.Process(job.pid).children():
        child.send_signal(signal.SIGUSR1)
    text, _ = job.communicate(timeout=200)
    assert job.returncode == 0 and "stopped after step" in text, text
    assert requeued.read_text() == f"requeue {os.getpid()}\n"
    assert len(records(run)) < 40
    status, text = _output(*command, **environment)
    assert status == 0 and "resuming" in text, text
    assert [record["step"] for record in records(run)] == list(range(1, 41))
    assert requeued.read_text().count("\n") == 1
    assert not list(ROOT.glob("slurm-*"))
