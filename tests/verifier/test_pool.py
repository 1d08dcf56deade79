"""Worker processes: limited, replaced, and gone when they should be."""

import os
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
ENDLESS = Item("(x+y+z+2)^{700}", "x^2+1")


@pytest.fixture
def pool() -> Iterator[WorkerPool]:
    pool = WorkerPool(workers=2, timeout=1.0)
    yield pool
    pool.close()


def is_alive(pid: int) -> bool:
    # A zombie's command line is empty.
    path = Path(f"/proc/{pid}/cmdline")
    return path.is_file() and bool(path.read_bytes())


def wait_until(condition: Callable[[], bool], seconds: float = 20.0) -> bool:
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
    reason = "unverified: got nothing in 1 s of processor time"
    assert [verdicts[place].reason for place in (1, 4)] == [reason] * 2
    # The two are equal: one comparison, tried twice.
    assert pool.timeouts == 2
    killed = before - set(pool.pids)
    assert killed and not any(map(is_alive, killed))
    assert [v.accuracy for v in pool.run(EASY)] == EASY_VERDICTS


def test_a_crashed_worker_costs_no_verdict(pool: WorkerPool):
    """A process that is killed from outside over an item is replaced, and the item tried again."""
    pool.run(EASY)

    def kill() -> None:
        time.sleep(0.3)
        for pid in pool.pids:
            os.kill(pid, signal.SIGKILL)

    thread = threading.Thread(target=kill)
    thread.start()
    verdict = pool.run([ENDLESS])[0]
    thread.join()
    assert verdict.reason == "unverified: got nothing in 1 s of processor time"
    assert pool.crashes == 1 and pool.timeouts == 1
    assert [v.accuracy for v in pool.run(EASY)] == EASY_VERDICTS


def test_a_worker_lost_between_batches_costs_nothing(pool: WorkerPool):
    """One that died idle is replaced before its item is given up."""
    pool.run(EASY)
    for pid in pool.pids:
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda pid=pid: not is_alive(pid))
    assert [v.accuracy for v in pool.run(EASY)] == EASY_VERDICTS


def test_close_leaves_no_process(pool: WorkerPool):
    """All workers are gone when `close` returns."""
    pool.run(EASY)
    pids = pool.pids
    assert pids and all(map(is_alive, pids))
    pool.close()
    assert not pool.pids and not any(map(is_alive, pids))


@pytest.mark.parametrize("item", ["EASY[0]", "ENDLESS"], ids=["idle", "hung"])
def test_workers_die_with_the_parent(item: str):
    """Killed outright, the parent cleans nothing up; its workers end by themselves."""
    code = (
        "import threading, time\n"
        "from care_train.verifier import WorkerPool\n"
        "from tests.verifier.test_pool import EASY, ENDLESS\n"
        "pool = WorkerPool(workers=1, timeout=20.0)\n"
        "pool.run(EASY[:1])\n"
        f"threading.Thread(target=pool.run, args=([{item}],), daemon=True).start()\n"
        "time.sleep(0.3)\n"
        "print(*pool.pids, flush=True)\n"
        "time.sleep(60)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE)
    assert parent.stdout is not None
    pids = [int(pid) for pid in parent.stdout.readline().split()]
    assert pids and all(map(is_alive, pids))
    parent.kill()
    parent.wait()
    parent.stdout.close()
    assert wait_until(lambda: not any(map(is_alive, pids)))


def test_an_unstartable_worker_is_an_error(pool: WorkerPool, monkeypatch: pytest.MonkeyPatch):
    """Where workers end at once nothing is silently wrong."""
    monkeypatch.setattr("sys.executable", "/bin/false")
    with pytest.raises(ValueError, match=r"^reward: symbolic comparison: got the end of"):
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
    worker = "import sys, care_train.verifier.verify; sys.exit('torch' in sys.modules)"
    for code in (trainer, worker):
        assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_numbers_and_words_start_no_worker(pool: WorkerPool):
    """Simple types are decided in process."""
    items = [Item("5.0", "5"), Item("B. red", "B"), Item("Blue", "blue"), Item("No.", "no")]
    assert all(v.accuracy == 1.0 for v in verify_batch(items, pool))
    assert pool.pids == []
