"""Worker processes: limited, replaced, and gone when they should be."""

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from care_train.verifier import Item, WorkerPool, verify_batch

ROOT = Path(__file__).parents[2]

EASY = [
    Item("\\frac{1}{\\sqrt{2}}", "\\frac{\\sqrt{2}}{2}"),
    Item("\\sqrt{2}", "\\frac{\\sqrt{2}}{2}"),
    Item("1+x^2+x", "x^2+x+1"),
]
EASY_VERDICTS = [1.0, 0.0, 1.0]
ENDLESS = Item("\\prod_{n=1}^{999} (x+n)", "x^2+1")


@pytest.fixture
def pool() -> Iterator[WorkerPool]:
    pool = WorkerPool(workers=2, timeout=4.0)
    yield pool
    pool.close()


def _alive(pid: int) -> bool:
    # A zombie's command line is empty.
    path = Path(f"/proc/{pid}/cmdline")
    return path.is_file() and bool(path.read_bytes())


def _wait_until(condition: Callable[[], bool], seconds: float = 20.0) -> bool:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.05)
    return condition()


def test_a_hung_worker_costs_its_verdict_alone(pool: WorkerPool):
    """The others in the batch keep theirs, in order; the hung process is gone and replaced."""
    pool.run(EASY)
    before = set(pool.pids)
    verdicts = pool.run([EASY[0], ENDLESS, *EASY[1:], ENDLESS, EASY[2]])
    assert [v.accuracy for v in verdicts] == [1.0, 0.0, 0.0, 1.0, 0.0, 1.0]
    assert [verdicts[place].reason for place in (1, 4)] == ["timeout: over 4 s"] * 2
    assert pool.timeouts == 2 and pool.longest < 5.0
    killed = before - set(pool.pids)
    assert killed and not any(map(_alive, killed))
    assert [v.accuracy for v in pool.run(EASY)] == EASY_VERDICTS


def test_a_crashed_worker_costs_its_verdict_alone(pool: WorkerPool):
    """A process that dies over an item is a wrong verdict with that reason, and replaced."""
    pool.run(EASY)

    def kill() -> None:
        time.sleep(0.3)
        for pid in pool.pids:
            os.kill(pid, signal.SIGKILL)

    thread = threading.Thread(target=kill)
    thread.start()
    verdict = pool.run([ENDLESS])[0]
    thread.join()
    assert verdict.accuracy == 0.0 and verdict.reason.startswith("crashed")
    assert pool.crashes == 1
    assert [v.accuracy for v in pool.run(EASY)] == EASY_VERDICTS


def test_a_worker_lost_between_batches_costs_nothing(pool: WorkerPool):
    """One that died idle is replaced before its item is given up."""
    pool.run(EASY)
    for pid in pool.pids:
        os.kill(pid, signal.SIGKILL)
        _wait_until(lambda pid=pid: not _alive(pid))
    assert [v.accuracy for v in pool.run(EASY)] == EASY_VERDICTS
    assert pool.crashes == 0


def test_close_leaves_no_process(pool: WorkerPool):
    """All workers are gone when `close` returns."""
    pool.run(EASY)
    pids = pool.pids
    assert pids and all(map(_alive, pids))
    pool.close()
    assert not pool.pids and not any(map(_alive, pids))


@pytest.mark.parametrize("item", ["EASY[0]", "ENDLESS"], ids=["idle", "hung"])
def test_workers_die_with_the_parent(item: str):
    """Killed outright, the parent cleans nothing up; its workers end by themselves."""
    code = (
        "import threading, time\n"
        "from care_train.verifier import WorkerPool\n"
        "from tests.verifier.test_pool import EASY, ENDLESS\n"
        "pool = WorkerPool(workers=1, timeout=20.0)\n"
        "pool.run(EASY[:1])\n"
        "pool._timeout = 4.0\n"
        f"threading.Thread(target=pool.run, args=([{item}],), daemon=True).start()\n"
        "time.sleep(0.3)\n"
        "print(*pool.pids, flush=True)\n"
        "time.sleep(60)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE)
    assert parent.stdout is not None
    pids = [int(pid) for pid in parent.stdout.readline().split()]
    assert pids and all(map(_alive, pids))
    parent.kill()
    parent.wait()
    parent.stdout.close()
    assert _wait_until(lambda: not any(map(_alive, pids)))


def test_an_unstartable_worker_is_an_error(pool: WorkerPool, monkeypatch: pytest.MonkeyPatch):
    """Without math-verify nothing is silently wrong: the error names the command to try."""
    # What a worker that cannot import its libraries does, also where this package is installed.
    monkeypatch.setattr("sys.executable", shutil.which("false"))
    with pytest.raises(ValueError, match=r"^reward: no worker process .* -m care_train\.verifier"):
        pool.run(EASY)


def test_the_trainer_never_loads_the_parser():
    """Symbolic answers are verified without sympy or math-verify in this process; workers load no
    torch."""
    trainer = (
        "import sys\n"
        "from care_train.verifier import verify\n"
        "assert verify('1/\\\\sqrt{2}', '\\\\frac{\\\\sqrt{2}}{2}').accuracy == 1.0\n"
        "sys.exit('sympy' in sys.modules or 'math_verify' in sys.modules)"
    )
    worker = "import sys, care_train.verifier.worker; sys.exit('torch' in sys.modules)"
    for code in (trainer, worker):
        assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_numbers_and_words_start_no_worker(pool: WorkerPool):
    """Simple types are decided in process."""
    items = [Item("5.0", "5"), Item("B. red", "B"), Item("Blue", "blue"), Item("No.", "no")]
    assert all(v.accuracy == 1.0 for v in verify_batch(items, pool))
    assert pool.pids == []
