"""Functions in processes that can be killed."""

import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from care_train.killable import Limits, Lost, Pool, Worker, ordered_map
from tests.verifier.test_pool import is_alive, wait_until


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


def test_state_is_kept_until_a_call_is_lost():
    """The process lives from call to call; one that hangs or ends is replaced by a new one."""
    worker = _worker(seconds=1.0)
    assert [worker("count"), worker("count")] == [11, 12]
    assert worker("sleep 60") == Lost("got nothing in 1 s", is_timeout=True)
    assert worker("count") == 11
    assert worker("exit") == Lost("got the end of its process")
    assert worker("count") == 11
    worker.close()
    assert worker.pid is None


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
    pool.close()
    assert not pool.pids


def test_an_abandoned_batch_leaves_no_process():
    """Whoever stops taking results ends the processes that are at work."""
    pool = Pool("a pool", _make, 2)
    results = pool.map(["count", "sleep 60", "sleep 60", "count"])
    next(results)
    pids = pool.pids
    start = time.monotonic()
    results.close()
    assert not pool.pids and wait_until(lambda: not any(map(is_alive, pids)))
    assert time.monotonic() - start < 10


@pytest.mark.parametrize("workers", [1, 2])
def test_ordered_map(workers: int, tmp_path: Path):
    """Items and results in order; an exception is the caller's."""
    paths = [str(tmp_path / str(n)) for n in range(5)]
    assert list(ordered_map(os.path.basename, paths, workers)) == [(p, Path(p).name) for p in paths]
    with pytest.raises(FileNotFoundError):
        list(ordered_map(os.listdir, [str(tmp_path), *paths], workers))
