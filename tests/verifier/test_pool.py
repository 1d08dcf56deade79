"""Processes that can be killed: limited, replaced, gone when they should be, and under attack."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from care_train.killable import Limits, Lost, Pool, Worker, ordered_map
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


def _make(start: int = 0) -> Callable[[str], object]:
    """A function of a small language, with a counter as its state."""
    count = start

    def run(text: str) -> object:
        nonlocal count
        count += 1
        word, _, rest = text.partition(" ")
        if word == "sleep":
            time.sleep(float(rest))
        elif word == "spin":
            end = time.process_time() + float(rest)
            while time.process_time() < end:
                pass
        elif word == "exit":
            os._exit(1)
        elif word == "raise":
            raise KeyError(rest)
        elif word == "fork":
            if (child := os.fork()) == 0:
                time.sleep(600)
            return child
        return count

    return run


def _unable() -> Callable[[str], object]:
    raise ValueError("no such function")


def _worker(**limits: float) -> Worker[str, object]:
    return Worker("a worker", partial(_make, 10), Limits(**limits))  # pyright: ignore


def test_processor_time_is_not_wall_clock_time():
    """A limit of processor time lets a process wait, and ends one that computes."""
    worker = _worker(cpu_seconds=0.3)
    assert worker("sleep 0.6") == 11
    lost = worker("spin 5")
    assert lost == Lost("got nothing in 0.3 s of processor time", is_timeout=True)
    assert worker("count") == 11
    worker.close()


def test_exceptions_are_results():
    """What the function raises comes with its traceback, and the process goes on."""
    worker = _worker()
    lost = worker("raise x")
    assert isinstance(lost, Lost) and isinstance(lost.error, KeyError) and not lost.is_timeout
    assert "raise KeyError(rest)" in lost.error.__notes__[0]
    assert worker("count") == 12
    worker.close()


def test_a_start_that_fails_raises():
    """In the caller, with what was wrong."""
    with pytest.raises(ValueError, match=r"^no such function$"):
        Worker("a worker", _unable)("count")


def test_descendants_are_killed_too():
    """What the function started ends with its process."""
    worker = _worker()
    child = worker("fork")
    assert isinstance(child, int) and is_alive(child)
    worker.close()
    assert wait_until(lambda: not is_alive(child))


def test_a_pool_keeps_order_and_reads_no_further_than_it_must():
    """Results come in order, a lost one in its place; input is read as results are taken."""
    read = []

    def items():
        for place, text in enumerate(["sleep 0.4", "count", "exit", *["count"] * 20]):
            read.append(place)
            yield text

    pool = Pool("a pool", _make, 2)
    results = pool.map(items())
    assert next(results)[1] == 1 and len(read) <= 4
    assert [isinstance(result, Lost) for _, result in results] == [False, True, *[False] * 20]
    assert 0.4 < pool.longest < 30 and len(pool.pids) == 2
    # Whoever stops taking results ends the processes that are at work.
    results = pool.map(["count", "sleep 60", "sleep 60", "count"])
    next(results)
    pids = pool.pids
    results.close()
    assert not pool.pids and wait_until(lambda: not any(map(is_alive, pids)), 10)


@pytest.mark.parametrize("workers", [1, 2])
def test_ordered_map(workers: int, tmp_path: Path):
    """Items and results in order; an exception is the caller's."""
    paths = [str(tmp_path / str(n)) for n in range(5)]
    assert list(ordered_map(os.path.basename, paths, workers)) == [(p, Path(p).name) for p in paths]
    with pytest.raises(FileNotFoundError):
        list(ordered_map(os.listdir, [str(tmp_path), *paths], workers))


def test_a_lost_worker_costs_its_verdict_alone(pool: WorkerPool):
    """A hung process is killed and replaced; the others in the batch keep their verdicts, in order.
    Equal answers to equal keys are compared once: a collapsed policy's cost what one costs. A
    process that is killed from outside costs no verdict: its item is tried again."""
    pool.run(EASY)
    before = set(pool.pids)
    verdicts = pool.run([EASY[0], ENDLESS, *EASY[1:], ENDLESS, EASY[2]])
    assert [v.accuracy for v in verdicts] == [1.0, 0.0, 0.0, 1.0, 0.0, 1.0]
    reason = "unverified: got nothing in 1 s of processor time"
    assert [verdicts[place].reason for place in (1, 4)] == [reason] * 2
    # The two are equal: one comparison, tried twice.
    assert pool.timeouts == 2 and pool.crashes == 0
    killed = before - set(pool.pids)
    assert killed and not any(map(is_alive, killed))
    assert [v.accuracy for v in pool.run(EASY)] == EASY_VERDICTS

    def kill() -> None:
        time.sleep(0.3)
        for pid in pool.pids:
            os.kill(pid, signal.SIGKILL)

    thread = threading.Thread(target=kill)
    thread.start()
    verdict = pool.run([ENDLESS])[0]
    thread.join()
    assert verdict.reason == reason and pool.crashes == 1 and pool.timeouts == 3
    assert [v.accuracy for v in pool.run(EASY)] == EASY_VERDICTS


def test_workers_die_with_the_parent():
    """Killed outright, the parent cleans nothing up; a worker at work ends by itself."""
    code = (
        "import threading, time\n"
        "from care_train.verifier import WorkerPool\n"
        "from tests.verifier.test_pool import EASY, ENDLESS\n"
        "pool = WorkerPool(workers=1, timeout=20.0)\n"
        "pool.run(EASY[:1])\n"
        "threading.Thread(target=pool.run, args=([ENDLESS],), daemon=True).start()\n"
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


SLOW = [
    "{" * 20 + "x" + "}" * 20,
    "\\{" * 16 + "x" + "\\}" * 16,
    "(" * 20 + "x+1" + ")" * 20,
    "\\sqrt{" * 12 + "x",
]
"""Each took the parser seconds, up to its whole time limit."""


def test_nested_brackets_cost_little(pool: WorkerPool):
    """They are wrong unparsed, or parsed without the braces that mean nothing."""
    verdicts = verify_batch([Item(answer, "x^2+1") for answer in SLOW], pool)
    assert [verdict.accuracy for verdict in verdicts] == [0.0] * len(SLOW)
    assert not any(verdict.reason.startswith("unverified") for verdict in verdicts)


def test_a_batch_of_slow_answers_ends(pool: WorkerPool, caplog: pytest.LogCaptureFixture):
    """Answers that each use up their time share a limit: a right one beside them is still right."""
    slow = [Item(f"(x+y+z+{n})^{{700}}", "x^2+1") for n in range(10)]
    right = Item("1+x^2", "x^2+1")
    verdicts = pool.run([*slow, right])
    assert verdicts[-1].accuracy == 1.0
    assert {verdict.accuracy for verdict in verdicts[:-1]} == {0.0}
    assert all(verdict.reason.startswith("unverified: ") for verdict in verdicts[:-1])
    assert "10 answers are unverified" in caplog.text
    # Each alone would have its time twice.
    assert pool.timeouts == len(slow)
