"""The launch scripts: their commands, and real ranks started through them on this machine."""

import os
import shutil
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from care_train.distributed import own_environment
from tests.train.runs import COLD_START, ROOT, SMALL, data_arguments, timeless

LAUNCH = ROOT / "launch"
SCRIPTS = sorted([*LAUNCH.glob("*.sh"), *LAUNCH.glob("*.sbatch")])
RUN = ("sft", *SMALL, *COLD_START, "sft.steps=3", "sft.save_every=1")


def _environment(**more: str) -> dict[str, str]:
    # SLURM's are this machine's own, where the tests are a job.
    kept = {k: v for k, v in own_environment().items() if "SLURM" not in k}
    return kept | {"PYTHON": sys.executable} | more


def _start(script: str, *arguments: str, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [str(LAUNCH / script), *arguments],
        cwd=ROOT,
        env=_environment(**environment),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def _output(script: str, *arguments: str, **environment: str) -> tuple[int, str]:
    process = _start(script, *arguments, **environment)
    out, errors = process.communicate(timeout=300)
    return process.returncode, out + errors


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_valid_and_explain_themselves(script):
    """`bash -n`, shellcheck where there is one, executable or a job, usage without arguments."""
    assert subprocess.run(["bash", "-n", script]).returncode == 0
    if shutil.which("shellcheck"):
        checked = subprocess.run(["shellcheck", script], capture_output=True, text=True)
        assert checked.returncode == 0, checked.stdout
    assert script.suffix == ".sbatch" or script.stat().st_mode & stat.S_IXUSR
    done = subprocess.run(["bash", script], capture_output=True, text=True, env=_environment())
    assert done.returncode == 2 and "train --config configs/care.yaml" in done.stderr


@pytest.mark.slow
def test_accelerate_launches_ranks(color_rows, tmp_path):
    """`accelerate launch -m care_train` starts ranks that train as one run."""
    accelerate = ("-m", "accelerate.commands.accelerate_cli", "launch", "--multi_gpu")
    options = ("--num_processes=2", "--num_machines=1", "--mixed_precision=no", "-m", "care_train")
    arguments = (*RUN, *data_arguments(color_rows), f"output_dir={tmp_path}", "name=run")
    done = subprocess.run(
        [sys.executable, *accelerate, "--dynamo_backend=no", *options, *arguments],
        cwd=ROOT,
        env=_environment(),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "final" / "model.safetensors").is_file()
    assert [record["step"] for record in timeless(tmp_path / "run")] == [1, 2, 3]


def test_commands_name_nodes_and_ranks():
    """What is handed to the launchers, several nodes included."""
    config = ("train", "--config", "configs/care.yaml")
    status, text = _output(
        "deepspeed.sh", *config, DRY_RUN="1", HOSTFILE="hosts", NODE_RANK="1", MASTER_ADDR="n0"
    )
    assert status == 0
    wanted = "--master_port 29500 --hostfile hosts --master_addr n0 --no_ssh --node_rank 1"
    assert f"{wanted} --module care_train train --config configs/care.yaml" in text
    status, text = _output(
        *("torchrun.sh", *config),
        DRY_RUN="1",
        NNODES="2",
        NODE_RANK="1",
        MASTER_ADDR="n0",
        GPUS_PER_NODE="8",
    )
    assert status == 0
    assert "--nnodes 2 --node_rank 1 --master_addr n0 --master_port 29500 -m care_train" in text
    for script, more in (("torchrun.sh", {"NNODES": "2"}), ("deepspeed.sh", {"NODE_RANK": "1"})):
        status, text = _output(script, *config, DRY_RUN="1", GPUS_PER_NODE="8", **more)
        assert status != 0 and "wanted with N" in text


@pytest.mark.slow
@pytest.mark.parametrize("script", ["deepspeed.sh", "torchrun.sh"])
def test_two_ranks_run_through_the_launcher(script, color_rows, tmp_path):
    """The real launcher on this machine: two ranks under ZeRO-3 train and leave a model."""
    hosts = tmp_path / "hostfile"
    hosts.write_text("localhost slots=2\n")
    places = {
        "deepspeed.sh": {"HOSTFILE": str(hosts), "NODE_RANK": "0", "MASTER_ADDR": "127.0.0.1"},
        "torchrun.sh": {"GPUS_PER_NODE": "2"},
    }
    more = (*data_arguments(color_rows), f"output_dir={tmp_path}", "name=run", "deepspeed=zero3")
    port = str(20000 + os.getpid() % 20000)
    status, text = _output(script, *RUN, *more, MASTER_PORT=port, **places[script])
    assert status == 0, text
    assert [r["step"] for r in timeless(tmp_path / "run")] == [1, 2, 3]
    assert (tmp_path / "run" / "final" / "model.safetensors").is_file()


FAKES = {
    # Two tasks on one node, signalled as SLURM does: every process of the step.
    "srun": """#!/usr/bin/env bash
set -m
while [[ "$1" == --* ]]; do shift; done
export SLURM_NTASKS=2
for place in 0 1; do
  SLURM_PROCID=$place SLURM_LOCALID=$place "$@" & pids+=($!)
done
trap 'for pid in "${pids[@]}"; do kill -TERM -- -"$pid"; done' USR1
worst=0
for pid in "${pids[@]}"; do
  while :; do
    status=0; wait "$pid" || status=$?
    kill -0 "$pid" 2>/dev/null || break
  done
  [ "$status" -gt "$worst" ] && worst=$status
done
exit "$worst"
""",
    "scontrol": """#!/usr/bin/env bash
if [ "$1" = show ]; then echo 127.0.0.1; else echo "$@" >> "$REQUEUED"; fi
""",
}


@pytest.mark.slow
def test_a_slurm_job_saves_requeues_and_goes_on(color_rows, tmp_path):
    """SIGTERM to the ranks: a checkpoint, `scontrol requeue`; the second turn ends the run."""
    for name, text in FAKES.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    requeued, run = tmp_path / "requeued", tmp_path / "run"
    more = (*data_arguments(color_rows), f"output_dir={tmp_path}", "name=run", "sft.steps=12")
    environment = {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "REQUEUED": str(requeued),
        "SLURM_JOB_ID": str(os.getpid()),
        "SLURM_JOB_NODELIST": "here",
    }
    job = _start("slurm.sbatch", *RUN, *more, **environment)
    log = run / "metrics.jsonl"
    while job.poll() is None and not (log.is_file() and log.read_text().count("\n") >= 2):
        time.sleep(0.05)
    children = subprocess.run(
        ["pgrep", "-P", str(job.pid)], capture_output=True, text=True, check=True
    )
    for pid in children.stdout.split():
        os.kill(int(pid), signal.SIGUSR1)
    out, errors = job.communicate(timeout=200)
    assert job.returncode == 0 and "stopped after step" in errors, out + errors
    assert requeued.read_text() == f"requeue {os.getpid()}\n"
    assert len(timeless(run)) < 12
    status, text = _output("slurm.sbatch", *RUN, *more, **environment)
    assert status == 0 and "resuming" in text, text
    assert [r["step"] for r in timeless(run)] == list(range(1, 13))
    assert requeued.read_text().count("\n") == 1
    assert not list(Path(ROOT).glob("slurm-*"))
