"""Attacks on runs' folders: overwrite, a second process, crashes and lost files destroy nothing."""

import json
import multiprocessing
import os
import shutil
import signal
import threading
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from PIL import Image

from care_train.cli import main
from care_train.config import Config, load_config
from care_train.training import folders
from care_train.training.failures import IN_USE_STATUS
from care_train.training.folders import clean_up, remove_folder, write_folder
from care_train.training.ranks import ProcessId
from care_train.training.run_folder import MARKER, RunFolder, check_free, marker_text, recover
from care_train.training.run_lock import FolderInUseError, Holder, RunLock
from tests.train.runs import FastRun, text_rows, text_run_arguments

Tree = dict[str, bytes]


def _tree(folder: Path) -> Tree:
    """Every file below a folder, and what is in it."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def _one(*arguments: str, before: str = "") -> tuple[int | None, str]:
    """A run of one rank: its status and standard error."""
    [end] = FastRun(*arguments, before=before).end()
    return end


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> Path:
    return text_rows(tmp_path_factory.mktemp("rows"))


def _arguments(rows: Path, out: Path) -> list[str]:
    own = ("algorithm=grpo", "train.steps=1", "train.schedule=constant", "train.save_every=1")
    return [*text_run_arguments(out, rows), *own]


@pytest.fixture(scope="module")
def finished(rows, tmp_path_factory) -> Path:
    """A run's folder, as a run that ended left it."""
    out = tmp_path_factory.mktemp("finished")
    status, errors = _one(*_arguments(rows, out))
    assert status == 0, errors
    assert _names(out) == ["run"]
    return out / "run"


@pytest.fixture
def out(finished, tmp_path) -> Path:
    """An output_dir that holds a run of the name `run`, and another one."""
    for name in ("run", "other"):
        shutil.copytree(finished, tmp_path / "runs" / name)
    return tmp_path / "runs"


@pytest.fixture
def arguments(rows, out) -> list[str]:
    return _arguments(rows, out)


@pytest.mark.parametrize(
    "name", ["", ".", "..", "./", "a/../..", "../runs/other", "{out}/other", "{out}", ".run"]
)
def test_a_name_that_is_none_is_refused(name, arguments, out, capsys):
    """Empty, the folder of all runs, one above, or absolute: nothing is deleted."""
    before = _tree(out.parent)
    name = name.format(out=out)
    assert main([*arguments, f"name='{name}'", "overwrite=true"]) == 2
    assert f"name: got {name!r}, wanted a folder's name below output_dir" in capsys.readouterr().err
    assert _tree(out.parent) == before


@pytest.mark.parametrize("target", ["elsewhere", "runs"])
def test_a_link_that_leaves_the_output_folder_is_refused(target, arguments, out, tmp_path):
    """A link to a folder elsewhere, with care-train's own marker in it, and one to all runs."""
    shutil.copytree(out / "run", tmp_path / "elsewhere")
    (out / "link").symlink_to(tmp_path / target)
    before = _tree(tmp_path)
    status, errors = _one(*arguments, "name=link", "overwrite=true")
    assert status == 2 and f"name: got 'link', which leads to {tmp_path / target}" in errors
    assert _tree(tmp_path) == before


def _source_tree(folder: Path) -> None:
    (folder / "package").mkdir(parents=True)
    (folder / "config.yaml").write_text("seed: 1\n")
    (folder / "package" / "code.py").write_text("x = 1\n")


def _run_without_marker(folder: Path) -> None:
    shutil.copytree(folder.parent / "run", folder)
    (folder / MARKER).unlink()


def _marker_of_another_program(folder: Path) -> None:
    _source_tree(folder)
    (folder / MARKER).write_text("[]")


@pytest.mark.parametrize("make", [_source_tree, _run_without_marker, _marker_of_another_program])
def test_overwrite_deletes_only_what_care_train_made(make, arguments, out):
    """A source tree that has a config.yaml, and a run of the version before: the message names the
    folder and says what to do."""
    make(out / "mine")
    before = _tree(out)
    status, errors = _one(*arguments, "name=mine", "overwrite=true")
    assert status == 2 and f"overwrite: {out / 'mine'} has no {MARKER}" in errors
    assert "remove it yourself" in errors and "Traceback" not in errors
    assert _tree(out) == before


def test_a_folder_with_a_users_files_never_becomes_care_trains(arguments, out):
    """A run may write beside them, but no later overwrite deletes them."""
    notes = out / "mine" / "notes.txt"
    notes.parent.mkdir()
    notes.write_text("mine")
    status, errors = _one(*arguments, "name=mine")
    assert status == 0, errors
    status, errors = _one(*arguments, "name=mine", "overwrite=true")
    assert status == 2 and "remove it yourself" in errors
    assert notes.read_text() == "mine" and (out / "mine" / "final").is_dir()
    assert _names(out) == ["mine", "other", "run"]


def _reward(folder: Path) -> list[str]:
    (folder / "reward.py").write_text(
        "def score(solution_str, ground_truth, **rest):\n    return 1.0\n"
    )
    return [f"reward.functions=[{{function: '{folder / 'reward.py'}:score'}}]"]


def _rows_within(folder: Path) -> list[str]:
    (folder / "rows.jsonl").write_text('{"prompt": "what?", "answer": "1", "rationale": "so"}\n')
    return [f"sft.eval_data={folder / 'rows.jsonl'}"]


def _model_within(folder: Path) -> list[str]:
    return [f"model.path={folder / 'final'}"]


def _linked_model(folder: Path) -> list[str]:
    link = folder.parent.parent / "model"
    link.symlink_to(folder / "final")
    return [f"model.path={link}"]


def _own_config(folder: Path) -> list[str]:
    return ["--config", str(folder / "config.yaml")]


def _extended_config(folder: Path) -> list[str]:
    path = folder.parent.parent / "top.yaml"
    path.write_text(f"extends: {folder / 'config.yaml'}\n")
    return ["--config", str(path)]


def _deepspeed(folder: Path) -> list[str]:
    (folder / "zero.yaml").write_text("zero_stage: 1\n")
    return [f"deepspeed={folder / 'zero.yaml'}"]


INPUTS = {
    "reward.functions.function": _reward,
    "sft.eval_data": _rows_within,
    "model.path": _model_within,
    "model.path ": _linked_model,
    "--config": _own_config,
    "extends in": _extended_config,
    "deepspeed=": _deepspeed,
}


@pytest.mark.parametrize("key", INPUTS)
def test_a_run_never_replaces_what_it_reads(key, arguments, out):
    """Each kind of input, within the folder that overwrite=true replaces: key and path are named,
    and nothing is deleted."""
    more = INPUTS[key](out / "run")
    before = _tree(out)
    status, errors = _one(*arguments, *more, "overwrite=true")
    assert status == 2 and f"{key.strip()}" in errors, errors
    assert f" lies in {out / 'run'}, which overwrite=true would delete" in errors
    assert _tree(out) == before


def test_rows_with_images_in_the_old_run_are_refused(arguments, out, tmp_path):
    """Their file is elsewhere; the row and the image are named."""
    Image.new("RGB", (64, 64), "red").save(out / "run" / "red.png")
    row = {"prompt": "what color?", "answer": "red", "images": ["runs/run/red.png"]}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    before, more = (
        _tree(out),
        ("model.path=tiny-qwen2.5-vl", f"data.path={tmp_path / 'rows.jsonl'}"),
    )
    status, errors = _one(*arguments, *more, "overwrite=true")
    assert status == 2 and f"data: rows.jsonl: row 1: {out / 'run' / 'red.png'} lies in" in errors
    assert _tree(out) == before and _names(out) == ["other", "run"]


def test_a_run_with_another_inside_is_not_replaced(arguments, out):
    """`output_dir=runs/run/evals` puts runs into a run's folder."""
    inner = out / "run" / "evals" / "inner"
    shutil.copytree(out / "other", inner)
    before = _tree(out)
    status, errors = _one(*arguments, "overwrite=true")
    assert status == 2 and f"holds another run, {inner}" in errors
    assert _tree(out) == before


WRONG = {
    "no such rows": (["data.path=nowhere.jsonl"], "nowhere.jsonl"),
    "a bad row": (["eval.data={bad}"], "bad.jsonl"),
    "no such model": (["model.path=nowhere"], "no config.json there"),
    "a long prompt": (["prompt.max_prompt_tokens=1"], "wanted at most 1"),
    "contradicting settings": (
        ["train.keep_best=greedy_accuracy", "train.eval_every=1"],
        "needs eval.greedy=true",
    ),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_settings_and_rows_keep_the_old_run(wrong, arguments, out, tmp_path):
    """overwrite=true with what is found wrong before the first step: the old run is there, whole,
    and nothing is left beside it."""
    (tmp_path / "bad.jsonl").write_text('{"prompt": "no answer"}\n')
    before, (more, message) = _tree(out), WRONG[wrong]
    more = [argument.format(bad=tmp_path / "bad.jsonl") for argument in more]
    status, errors = _one(*arguments, *more, "overwrite=true")
    assert status == 2 and message in errors, errors
    assert _tree(out) == before and _names(out) == ["other", "run"]


def test_a_new_run_with_wrong_rows_leaves_nothing(arguments, out):
    """Corrected, the same command starts: it finds no run of its name."""
    status, _ = _one(*arguments, "name=new", "data.path=nowhere.jsonl")
    assert status == 2 and _names(out) == ["other", "run"]
    status, errors = _one(*arguments, "name=new")
    assert status == 0, errors


IN_EVALUATION = """
import os, signal
from care_train.verifier import Verifier
def score_batch(self, responses):
    if os.environ.get("RANK", "0") == "{rank}":
        assert {{".run.old", "run"}} <= set(os.listdir("{out}")), os.listdir("{out}")
        {fault}
    return real(self, responses)
real, Verifier.score_batch = Verifier.score_batch, score_batch
"""


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_new_run_that_fails_before_its_first_step_gives_the_old_one_back(ranks, arguments, out):
    """An error in the evaluation before training, on the last rank."""
    before = _tree(out)
    fault = IN_EVALUATION.format(rank=ranks - 1, out=out, fault="raise ValueError('no verdict')")
    outputs = FastRun(*arguments, "overwrite=true", ranks=ranks, before=fault).end()
    assert [status for status, _ in outputs] == [2] * ranks, outputs
    assert "ended before its first step; this one is kept" in outputs[0][1]
    assert _tree(out) == before and _names(out) == ["other", "run"]


def test_a_new_run_killed_before_its_first_step_gives_the_old_one_back(arguments, out):
    """SIGKILL in the evaluation before training: the next command finds the old run."""
    before = _tree(out)
    fault = "os.kill(os.getpid(), signal.SIGKILL)"
    status, _ = _one(
        *arguments, "overwrite=true", before=IN_EVALUATION.format(rank=0, out=out, fault=fault)
    )
    assert status == -signal.SIGKILL and ".run.old" in _names(out)
    status, errors = _one(*arguments)
    assert status == 2 and "already holds a run" in errors
    assert _tree(out) == before and _names(out) == ["other", "run"]


AT_FIRST_STEP = """
import os
from care_train.training.step import TrainStep
def run(self, *arguments):
    assert sorted(os.listdir("{out}")) == [".run.lock", "other", "run"], os.listdir("{out}")
    return real(self, *arguments)
real, TrainStep.run = TrainStep.run, run
"""


def test_the_old_run_goes_when_the_new_one_takes_its_first_step(arguments, out):
    """Then the new one has its name, and nothing of the old one is left in it."""
    (out / "run" / "old.txt").write_text("old")
    marker = (out / "run" / MARKER).read_text()
    before = AT_FIRST_STEP.format(out=out)
    status, errors = _one(*arguments, "overwrite=true", before=before)
    assert status == 0, errors
    assert not (out / "run" / "old.txt").exists() and _names(out) == ["other", "run"]
    assert (out / "run" / MARKER).read_text() != marker


class Killed(BaseException):
    """Stands for SIGKILL: nothing that would clean up runs after it."""


def _kill_after(monkeypatch, renames: int) -> None:
    """Stop after so many renames."""
    real, done = Path.rename, []

    def rename(self: Path, target: Path) -> Path:
        if len(done) == renames:
            raise Killed
        done.append(target)
        return real(self, target)

    monkeypatch.setattr(Path, "rename", rename)


@pytest.mark.parametrize("renames", range(3))
def test_a_kill_between_the_renames_of_an_overwrite_loses_no_run(renames, out, monkeypatch):
    """Before the old run is set aside, before the new one has the name, and before its first step;
    then the same in what puts it back."""
    folder, before = out / "run", _tree(out)
    run = RunFolder(Config(output_dir=str(out), name="run"), folder, is_resumed=False)
    _kill_after(monkeypatch, renames)
    with pytest.raises(Killed):
        run.begin({})
        run.started()
    for again in range(3):
        monkeypatch.undo()
        _kill_after(monkeypatch, again)
        try:
            recover(folder)
        except Killed:
            continue
    monkeypatch.undo()
    recover(folder)
    assert _tree(out) == before and _names(out) == ["other", "run"]


def test_a_kill_while_the_old_run_is_deleted_keeps_the_new_one(out, monkeypatch):
    """Half of the old run is gone by then."""
    folder = out / "run"
    run = RunFolder(Config(output_dir=str(out), name="run"), folder, is_resumed=False)
    run.begin({})
    new = _tree(folder)

    def rmtree(path: Path, ignore_errors: bool = False) -> None:
        (path / "config.yaml").unlink()
        raise Killed

    monkeypatch.setattr(shutil, "rmtree", rmtree)
    with pytest.raises(Killed):
        run.started()
    monkeypatch.undo()
    recover(folder)
    assert _tree(folder) == new and _names(out) == ["other", "run"]


SLOW = """
import time
from care_train.training.step import TrainStep
def run(self, draw, step):
    if step == 2:
        time.sleep(600)
    return real(self, draw, step)
real, TrainStep.run = TrainStep.run, run
"""


@pytest.fixture
def live(arguments, out):
    """A run, with two checkpoints, that is in its third step."""
    run = FastRun(*arguments, "name=live", "train.steps=4", "train.keep_checkpoints=9", before=SLOW)
    saved = out / "live" / "checkpoints" / "step_000002"
    assert run.wait_for(saved.is_dir), run.end()
    yield run
    run.kill(0)
    run.end()


def test_a_second_process_leaves_a_live_run_alone(live, arguments, out):
    """--resume, overwrite=true, another command and an export into its folder end with status 73
    and say which process writes there; exporting elsewhere and reading go on."""
    before = _tree(out / "live")
    export = ("export", f"--run={out / 'live'}", "--checkpoint=step_000001")
    attacks = (
        (*arguments, "name=live", "train.steps=4", "--resume"),
        ("train", f"resume={out / 'live'}"),
        (*arguments, "name=live", "overwrite=true"),
        (*arguments, "name=live"),
        ("eval", *arguments[1:], "name=live", "overwrite=true"),
        (*export, f"--out={out / 'live' / 'exported'}"),
    )
    for attack in attacks:
        status, errors = _one(*attack)
        assert status == IN_USE_STATUS and "Traceback" not in errors, errors
        own = ProcessId.own()
        assert f"{out / 'live'}: in use by pid {live.pid(0)} on {own.host} since 20" in errors
        assert f"`kill -TERM {live.pid(0)}`" in errors
    assert _tree(out / "live") == before
    status, errors = _one(*export, f"--out={out.parent / 'exported'}")
    assert status == 0, errors


def test_a_killed_holders_lock_is_taken_over(live, arguments, out):
    """SIGKILL, then --resume: no hand work, no wait, and no lock left in the end."""
    live.kill(0)
    live.end()
    assert ".live.lock" in _names(out)
    status, errors = _one(*arguments, "name=live", "train.steps=4", "--resume")
    assert status == 0 and "step_000002" in errors, errors
    assert _names(out) == ["live", "other", "run"]


def _held_by(folder: Path, process: ProcessId) -> Path:
    """A lock as `process` would have left it."""
    lock = folder.with_name(f".{folder.name}.lock")
    lock.mkdir()
    (lock / "token").write_text(json.dumps(asdict(Holder(process, 0.0, "care-train train"))))
    return lock / "token"


def test_a_reused_pid_does_not_hold_a_lock(tmp_path):
    """The pid is of a process that lives, this one, but of another start; and a live one's lock
    holds whatever the clock says."""
    own = ProcessId.own()
    assert own.start_ticks is not None
    _held_by(tmp_path / "run", replace(own, start_ticks=own.start_ticks - 1))
    with RunLock(tmp_path / "run"):
        with pytest.raises(FolderInUseError), RunLock(tmp_path / "run"):
            pass
    assert _names(tmp_path) == []
    _held_by(tmp_path / "run", own)
    with pytest.raises(FolderInUseError, match=rf"pid {own.pid} on"), RunLock(tmp_path / "run"):
        pass


def test_a_zombie_does_not_hold_a_lock(tmp_path):
    """A process that ended, and that nobody waited for yet."""
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    end = time.monotonic() + 10
    while (stat := Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split())[0] != "Z":
        assert time.monotonic() < end
    _held_by(tmp_path / "run", replace(ProcessId.own(), pid=pid, start_ticks=int(stat[19])))
    with RunLock(tmp_path / "run"):
        pass
    os.waitpid(pid, 0)


ELSEWHERE = replace(ProcessId.own(), host="node-7", machine="node-7/another boot/1", pid=1)


@pytest.mark.parametrize("ahead", [-7200, 0, 7200])
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


def test_of_many_that_find_a_dead_lock_one_gets_it(tmp_path):
    """Eight at once, twenty times: never none, never two."""
    own = ProcessId.own()
    assert own.start_ticks is not None
    for round_ in range(20):
        folder = tmp_path / str(round_)
        _held_by(folder, replace(own, start_ticks=own.start_ticks - 1))
        barrier, won, lost = threading.Barrier(8), [], []

        def attempt(folder=folder, barrier=barrier, won=won, lost=lost) -> None:
            barrier.wait()
            try:
                lock = RunLock(folder).__enter__()
            except FolderInUseError:
                lost.append(1)
            else:
                won.append(lock)

        threads = [threading.Thread(target=attempt) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert (len(won), len(lost)) == (1, 7)
        won[0].__exit__(None, None, None)
    assert _names(tmp_path) == []


def _hold(folder: Path, held: threading.Event) -> None:
    with RunLock(folder, beat=0.1):
        held.set()
        time.sleep(60)


def test_a_process_that_lost_its_lock_ends(tmp_path):
    """Taken over while it was suspended: it must not write among the other's files."""
    context = multiprocessing.get_context("forkserver")
    held = context.Event()
    process = context.Process(target=_hold, args=(tmp_path / "run", held))
    process.start()
    assert held.wait(60)
    [path] = (tmp_path / ".run.lock").iterdir()
    path.unlink()
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
        assert len(_names(tmp_path / ".run.lock")) == 1


@pytest.mark.parametrize("how", ["--resume", "resume={folder}", ""])
def test_a_lost_config_is_an_error(how, arguments, out):
    """Checkpoints without a config.yaml: no start at step 0, nothing is deleted, and with the file
    back the run goes on."""
    folder = out / "run"
    config = (folder / "config.yaml").read_text()
    (folder / "config.yaml").unlink()
    before = _tree(out)
    how = how.format(folder=folder)
    more = ["train.steps=3", "train.keep_checkpoints=1", *([how] if how else [])]
    status, errors = _one(*arguments, *more)
    assert status == 2 and "Traceback" not in errors, errors
    assert "config.yaml" in errors if how else "already holds a run" in errors
    assert _tree(out) == before
    if how == "--resume":
        (folder / "config.yaml").write_text(config)
        status, errors = _one(*arguments, *more)
        assert status == 0 and "resuming" in errors and "step_000001" in errors, errors


def _write(text: str):
    return lambda partial: (partial / "weights").write_text(text) and None


@pytest.mark.parametrize("renames", range(2))
def test_a_kill_between_two_renames_leaves_a_whole_copy(renames, tmp_path, monkeypatch):
    """A folder that is replaced, cut off before and after each rename: whole, old or new."""
    folder = tmp_path / "final"
    write_folder(folder, _write("old"))
    _kill_after(monkeypatch, renames)
    # What runs after an exception does not run after a kill.
    monkeypatch.setattr(folders, "_put_back", lambda folder: None, raising=False)
    monkeypatch.setattr(shutil, "rmtree", lambda *_, **__: None)
    with pytest.raises(Killed):
        write_folder(folder, _write("new"))
    monkeypatch.undo()
    clean_up(tmp_path)
    assert _names(tmp_path) == ["final"] and (folder / "weights").read_text() == "old"
    write_folder(folder, _write("new"))
    assert _names(tmp_path) == ["final"] and (folder / "weights").read_text() == "new"


def test_what_is_written_again_after_such_a_kill_does_not_lose_the_old_copy(tmp_path, monkeypatch):
    """Without a clean-up between: the old copy first gets its name back."""
    folder = tmp_path / "final"
    write_folder(folder, _write("old"))
    folder.rename(tmp_path / "final.replaced")
    with pytest.raises(Killed):
        write_folder(folder, _write("new"), _fail)
    assert _names(tmp_path) == ["final"] and (folder / "weights").read_text() == "old"


def _fail(_: Path) -> None:
    raise Killed


def test_a_deletion_that_was_cut_off_is_completed(tmp_path, monkeypatch):
    """Half a checkpoint does not come back."""
    (tmp_path / "step_000001").mkdir()
    monkeypatch.setattr(shutil, "rmtree", lambda path, **_: None)
    remove_folder(tmp_path / "step_000001")
    monkeypatch.undo()
    clean_up(tmp_path)
    assert _names(tmp_path) == []


def test_checking_changes_nothing(tmp_path):
    """What the doctor asks: whether overwrite=true would be taken."""
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / MARKER).write_text(marker_text("a"))
    config = load_config(None, [f"output_dir={tmp_path}", "name=run", "overwrite=true"])
    before = _tree(tmp_path)
    assert check_free(config, folder, {}) is False
    with pytest.raises(ValueError, match="already holds a run"):
        check_free(replace(config, overwrite=False), folder, {})
    assert _tree(tmp_path) == before
