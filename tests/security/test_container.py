"""A run works where little is allowed: a container with a user of no name and no home, and a source
tree and Python installation that are read-only."""

import tempfile
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

from care_train.training.failures import INPUT_STATUS
from tests.security.containers import ROOT, USER, can_run, run_in_container
from tests.train.runs import FastRun, text_run_arguments

pytestmark = pytest.mark.skipif(not can_run(), reason="only root can become another user")


@pytest.fixture
def desk() -> Iterator[Path]:
    """The one folder that the user of the container can write to. pytest's own are closed to it."""
    with tempfile.TemporaryDirectory(dir="/tmp") as name:
        Path(name).chmod(0o755)
        yield Path(name)


def _arguments(desk: Path) -> list[str]:
    own = ("train.steps=1", "model.dtype=bfloat16", "logging.report_to=[tensorboard]")
    return [*text_run_arguments(desk), *own]


@pytest.mark.parametrize(("engine", "home"), [("transformers", "/"), ("vllm", "")])
def test_a_run_needs_no_home_no_name_and_no_writable_tree(engine, home, desk):
    """With kernels built in C++ (bfloat16 on a CPU), evaluations, plots and TensorBoard: everything
    it writes is in its output folder or among temporary files."""
    more = []
    if engine == "vllm" and find_spec("vllm"):
        more = ["rollout.engine=vllm", "rollout.vllm.kv_cache_gib=0.1"]
    environment = {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
        **({"HOME": home} if home else {}),
    }
    command = ("python", "-m", "care_train", *_arguments(desk), *more)
    done = run_in_container(desk, *command, **environment)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    assert (desk / "run" / "final" / "model.safetensors").is_file()
    assert (desk / "run" / "learning_curves.png").is_file(), done.stdout


def test_an_output_folder_of_another_user_is_status_2(desk):
    """A folder that this user may read, not write: named, with the reason, and no traceback."""
    closed = desk / "closed"
    closed.mkdir(mode=0o755)
    become = f"import os\nos.setgroups([])\nos.setgid({USER})\nos.setuid({USER})"
    run = FastRun(*_arguments(desk), f"output_dir={closed}", before=become)
    [(status, errors)] = run.end()
    assert status == INPUT_STATUS and "Traceback" not in errors, errors
    assert f"output_dir: {closed} cannot be written" in errors, errors
