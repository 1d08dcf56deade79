"""Of several processes one alone writes to a run's folder, and a dead one's lock is taken over."""

import json
import multiprocessing
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from care_train.cli import main
from care_train.training.failures import IN_USE_STATUS
from care_train.training.ranks import ProcessId
from care_train.training.run_lock import FolderInUseError, Holder, RunLock
from tests.security.conftest import at_step, names, one_rank, tree
from tests.train.runs import FastRun


def test_a_second_process_leaves_a_live_run_alone(arguments, out, request, capsys):
    """--resume, overwrite=true, another command and an export into its folder end with status 73
    and say which process writes there; exporting elsewhere and reading go on. After SIGKILL,
    --resume takes the lock over: no hand work, no wait, and no lock left in the end."""
    arguments = [*arguments, "name=live", "train.keep_checkpoints=9"]
    live = FastRun(*arguments, "train.steps=4", before=at_step(2, "import time; time.sleep(600)"))
    request.addfinalizer(live.kill)
    saved = out / "live" / "checkpoints" / "step_000002"
    assert live.wait_for(saved.is_dir), live.end()
    before = tree(out / "live")
    export = ("export", f"--run={out / 'live'}", "--checkpoint=step_000001")
    attacks = (
        (*arguments, "train.steps=4", "--resume"),
        ("train", f"resume={out / 'live'}"),
        (*arguments, "overwrite=true"),
        arguments,
        ("eval", *arguments[1:], "overwrite=true"),
        (*export, f"--out={out / 'live' / 'exported'}"),
    )
    for attack in attacks:
        assert main(list(attack)) == IN_USE_STATUS
        errors, host = capsys.readouterr().err, ProcessId.own().host
        assert f"{out / 'live'}: in use by pid {live.pid(0)} on {host} since 20" in errors
        assert f"`kill -TERM {live.pid(0)}`" in errors
    assert tree(out / "live") == before
    status, errors = one_rank(*export, f"--out={out.parent / 'exported'}")
    assert status == 0, errors
    live.kill()
    assert ".live.lock" in names(out)
    status, errors = one_rank(*arguments, "train.steps=4", "--resume")
    assert status == 0 and "step_000002" in errors, errors
    assert names(out) == ["live", "other", "run"]


def _held_by(folder: Path, process: ProcessId) -> Path:
    """A lock as `process` would have left it."""
    lock = folder.with_name(f".{folder.name}.lock")
    lock.mkdir()
    (lock / "token").write_text(json.dumps(asdict(Holder(process, 0.0, "care-train train"))))
    return lock / "token"


OWN = ProcessId.own()
assert OWN.start_ticks is not None
# The pid is of a process that lives, this one, but of another start.
EARLIER = replace(OWN, start_ticks=OWN.start_ticks - 1)


def test_a_dead_process_does_not_hold_a_lock(tmp_path, monkeypatch):
    """One whose pid was given again, and one that ended and that nobody waited for yet; a live one
    does, whatever it was called with."""
    _held_by(tmp_path / "run", EARLIER)
    monkeypatch.setattr("sys.argv", ["care-train", "model.path=/m\udce4"])
    with RunLock(tmp_path / "run"):
        with pytest.raises(FolderInUseError, match=r"model\.path=/m\?"), RunLock(tmp_path / "run"):
            pass
    assert names(tmp_path) == []
    _held_by(tmp_path / "run", OWN)
    with pytest.raises(FolderInUseError, match=rf"pid {OWN.pid} on"), RunLock(tmp_path / "run"):
        pass
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    end = time.monotonic() + 10
    while (stat := Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split())[0] != "Z":
        assert time.monotonic() < end
    _held_by(tmp_path / "ended", replace(OWN, pid=pid, start_ticks=int(stat[19])))
    with RunLock(tmp_path / "ended"):
        pass
    os.waitpid(pid, 0)


ELSEWHERE = replace(OWN, host="node-7", machine="node-7/another boot/1", pid=1)


@pytest.mark.parametrize("ahead", [-7200, 7200])
def test_another_hosts_live_holder_keeps_its_lock(ahead, tmp_path, capsys):
    """Its file changes; by a clock that is hours off, which plays no part."""
    path, stop = _held_by(tmp_path / "run", ELSEWHERE), threading.Event()

    def give_signs() -> None:
        while not stop.wait(0.1):
            now = time.time() + ahead
            os.utime(path, (now, now))

    thread = threading.Thread(target=give_signs)
    thread.start()
    start = time.monotonic()
    try:
        with pytest.raises(FolderInUseError, match="in use by pid 1 on node-7 since"):
            with RunLock(tmp_path / "run", beat=0.2, patience=30):
                pass
    finally:
        stop.set()
        thread.join()
    assert time.monotonic() - start < 25
    assert "watching for up to 30 s" in capsys.readouterr().err


@pytest.mark.parametrize("ahead", [-7200, 7200])
def test_another_hosts_dead_holder_loses_its_lock(ahead, tmp_path):
    """Its file stays as it is for as long as one has patience, whatever time it shows."""
    path = _held_by(tmp_path / "run", ELSEWHERE)
    os.utime(path, (time.time() + ahead, time.time() + ahead))
    start = time.monotonic()
    with RunLock(tmp_path / "run", beat=0.1, patience=0.5):
        assert time.monotonic() - start >= 0.5
        assert not path.exists()


@pytest.mark.parametrize("pid", ['"pid": "x"', '"pid": '])
def test_a_lock_that_cannot_be_read_is_watched(pid, tmp_path, capsys):
    """Its file of other types, or no JSON: of nobody that can be looked at, and no traceback."""
    path = _held_by(tmp_path / "run", OWN)
    path.write_text(path.read_text().replace(f'"pid": {OWN.pid}', pid))
    with RunLock(tmp_path / "run", beat=0.02, patience=0.08):
        assert not path.exists()
    assert "(unreadable lock)" in capsys.readouterr().err


def test_of_many_that_find_a_dead_lock_one_gets_it(tmp_path):
    """Eight at once, twenty times: never none, never two."""
    for round_ in range(20):
        folder = tmp_path / str(round_)
        _held_by(folder, EARLIER)
        barrier = threading.Barrier(8)

        def attempt(_, folder=folder, barrier=barrier) -> RunLock | None:
            barrier.wait()
            try:
                return RunLock(folder).__enter__()
            except FolderInUseError:
                return None

        with ThreadPoolExecutor(8) as pool:
            [won] = filter(None, pool.map(attempt, range(8)))
        won.__exit__(None, None, None)
    assert names(tmp_path) == []


def _hold(folder: Path) -> None:
    with RunLock(folder, beat=0.1):
        time.sleep(60)


def test_a_process_that_lost_its_lock_ends(tmp_path):
    """Taken over while it was suspended: it must not write among the other's files."""
    process = multiprocessing.get_context("forkserver").Process(
        target=_hold, args=(tmp_path / "run",)
    )
    process.start()
    end = time.monotonic() + 60
    while not (held := list(tmp_path.glob(".run.lock/*"))):
        assert time.monotonic() < end
        time.sleep(0.05)
    held[0].unlink()
    process.join(20)
    assert process.exitcode == IN_USE_STATUS


def test_a_fork_of_the_holder_releases_nothing(tmp_path):
    """Workers are forked from a run; the end of one is not the end of it."""
    with RunLock(tmp_path / "run") as lock:
        pid = os.fork()
        if pid == 0:
            lock.__exit__(None, None, None)
            os._exit(0)
        os.waitpid(pid, 0)
        assert len(names(tmp_path / ".run.lock")) == 1
