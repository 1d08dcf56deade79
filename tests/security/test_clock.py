"""A step of the machine's clock ends no healthy run."""

import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch.distributed as dist

from care_train.training.ranks import RankBoard

ROOT = Path(__file__).parents[2]

RANK_1 = """
import sys, time
import torch.distributed as dist
from care_train.training.ranks import RankBoard
RankBoard(dist.FileStore(sys.argv[1], 2), 1, 2)
print("here", flush=True)
time.sleep(120)
"""


def test_a_clock_step_is_no_death(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
