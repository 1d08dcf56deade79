"""Attacks on runs' folders: overwrite, crashes and lost files destroy nothing."""

import json
import shutil
import signal
from pathlib import Path

import pytest
from PIL import Image

from care_train.cli import main
from care_train.config import Config
from care_train.training import folders
from care_train.training.folders import clean_up, remove_folder, write_folder
from care_train.training.run_folder import MARKER, RunFolder, recover
from tests.security.conftest import at_step, names, one_rank, tree
from tests.train.runs import FastRun

WANTED = "wanted a folder's name below output_dir"
READ = " lies in {run}, which overwrite=true would delete"

# What is added to a run's command with overwrite=true, and what it must be refused with.
ATTACKS: dict[str, tuple[str, str]] = {
    **{f"name {name!r}": (f"name='{name}'", WANTED) for name in ("", ".", "a/../..", ".run")},
    "another run's path": ("name={out}/other", WANTED),
    "link elsewhere": ("name=link", "name: got 'link', which leads to {above}/elsewhere"),
    "link to all runs": ("name=all", "name: got 'all', which leads to {out}"),
    "source tree": ("name=source", f"overwrite: {{out}}/source has no {MARKER}"),
    "another program's marker": ("name=foreign", f"overwrite: {{out}}/foreign has no {MARKER}"),
    "run without a marker": ("name=unmarked", "remove it yourself"),
    "another run inside": ("name=outer", "holds another run, {out}/outer/evals/inner"),
    "reward": (
        "reward.functions=[{{function: '{run}/reward.py:score'}}]",
        f"reward.functions.function: {{run}}/reward.py{READ}",
    ),
    "rows": ("sft.eval_data={run}/rows.jsonl", f"sft.eval_data: {{run}}/rows.jsonl{READ}"),
    "linked model": ("model.path={above}/model", f"model.path: {{above}}/model{READ}"),
    "configuration": ("--config={run}/config.yaml", f"{{run}}/config.yaml{READ}"),
    "what it extends": ("--config={above}/top.yaml", f"{{run}}/config.yaml{READ}"),
    "rows with images": (
        "model.path=tiny-qwen2.5-vl data.path={above}/pictures.jsonl",
        "data: pictures.jsonl: row 1: {run}/red.png lies in",
    ),
    "no such rows": ("data.path=nowhere.jsonl", "nowhere.jsonl"),
    "a new run without rows": ("name=new data.path=nowhere.jsonl", "nowhere.jsonl"),
    "a bad row": ("eval.data={above}/bad.jsonl", "bad.jsonl"),
    "no such model": ("model.path=nowhere", "no config.json there"),
    "a long prompt": ("prompt.max_prompt_tokens=1", "wanted at most 1"),
    "contradicting settings": (
        "train.keep_best=greedy_accuracy train.eval_every=1",
        "wanted greedy in eval.also",
    ),
}


@pytest.fixture
def targets(out) -> dict[str, Path]:
    """What the attacks name, beside and inside the run `run`."""
    run, above = out / "run", out.parent
    shutil.copytree(run, above / "elsewhere")
    (out / "link").symlink_to(above / "elsewhere")
    (out / "all").symlink_to(out)
    for name in ("source", "foreign"):
        (out / name / "package").mkdir(parents=True)
        (out / name / "config.yaml").write_text("seed: 1\n")
        (out / name / "package" / "code.py").write_text("x = 1\n")
    (out / "foreign" / MARKER).write_text("[]")
    shutil.copytree(run, out / "unmarked")
    (out / "unmarked" / MARKER).unlink()
    shutil.copytree(run, out / "outer")
    shutil.copytree(run, out / "outer" / "evals" / "inner")
    (run / "reward.py").write_text("def score(solution_str, ground_truth):\n    return 1.0\n")
    (run / "rows.jsonl").write_text('{"prompt": "what?", "answer": "1", "rationale": "so"}\n')
    (above / "model").symlink_to(run / "final")
    (above / "top.yaml").write_text(f"extends: {run / 'config.yaml'}\n")
    Image.new("RGB", (64, 64), "red").save(run / "red.png")
    row = {"prompt": "what color?", "answer": "red", "images": ["runs/run/red.png"]}
    (above / "pictures.jsonl").write_text(json.dumps(row) + "\n")
    (above / "bad.jsonl").write_text('{"prompt": "no answer"}\n')
    return {"run": run, "out": out, "above": above}


@pytest.mark.parametrize("attack", ATTACKS)
def test_overwrite_destroys_nothing_where_it_is_refused(attack, arguments, targets, capsys):
    """Names and links that leave output_dir, folders that care-train did not make, those that the
    new run reads or that hold another, and a new run that cannot begin: what is wrong is named,
    nothing is deleted, and nothing is left behind."""
    more, message = (text.format(**targets) for text in ATTACKS[attack])
    out, above = targets["out"], targets["above"]
    before = tree(above), names(out)
    more = [more] if "functions" in more else more.split()
    assert main([*arguments, *more, "overwrite=true"]) == 2
    errors = capsys.readouterr().err
    assert message in errors and "Traceback" not in errors
    assert (tree(above), names(out)) == before


def test_a_folder_with_a_users_files_never_becomes_care_trains(arguments, out):
    """A run may write beside them, but no later overwrite deletes them."""
    notes = out / "mine" / "notes.txt"
    notes.parent.mkdir()
    notes.write_text("mine")
    status, errors = one_rank(*arguments, "name=mine")
    assert status == 0, errors
    status, errors = one_rank(*arguments, "name=mine", "overwrite=true")
    assert status == 2 and "remove it yourself" in errors
    assert notes.read_text() == "mine" and (out / "mine" / "final").is_dir()
    assert names(out) == ["mine", "other", "run"]


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


def test_a_new_run_that_fails_before_its_first_step_gives_the_old_one_back(arguments, out):
    """An error in the evaluation before training, on the last rank."""
    before = tree(out)
    fault = IN_EVALUATION.format(rank=1, out=out, fault="raise ValueError('no verdict')")
    outputs = FastRun(*arguments, "overwrite=true", ranks=2, before=fault).end()
    assert [status for status, _ in outputs] == [2, 2], outputs
    assert "ended before its first step; this one is kept" in outputs[0][1]
    assert tree(out) == before and names(out) == ["other", "run"]


def test_a_new_run_killed_before_its_first_step_gives_the_old_one_back(arguments, out):
    """SIGKILL in the evaluation before training: the next command finds the old run."""
    before = tree(out)
    fault = "os.kill(os.getpid(), signal.SIGKILL)"
    status, _ = one_rank(
        *arguments, "overwrite=true", before=IN_EVALUATION.format(rank=0, out=out, fault=fault)
    )
    assert status == -signal.SIGKILL and ".run.old" in names(out)
    status, errors = one_rank(*arguments)
    assert status == 2 and "already holds a run" in errors
    assert tree(out) == before and names(out) == ["other", "run"]


def test_the_old_run_goes_when_the_new_one_takes_its_first_step(arguments, out):
    """Then the new one has its name, and nothing of the old one is left in it."""
    (out / "run" / "old.txt").write_text("old")
    marker = (out / "run" / MARKER).read_text()
    wanted = [".run.lock", "other", "run"]
    before = at_step(0, f"import os; assert sorted(os.listdir('{out}')) == {wanted}")
    status, errors = one_rank(*arguments, "overwrite=true", before=before)
    assert status == 0, errors
    assert not (out / "run" / "old.txt").exists() and names(out) == ["other", "run"]
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


@pytest.mark.parametrize("renames", range(4))
def test_a_kill_between_the_renames_of_an_overwrite_loses_no_run(renames, out, monkeypatch):
    """Before the old run is set aside, before the new one has the name, before its first step, and
    while the old one is deleted; then the same in what puts it back."""
    folder, old = out / "run", tree(out / "run")
    run = RunFolder(Config(output_dir=str(out), name="run"), folder, is_resumed=False)
    real = shutil.rmtree

    def rmtree(path: Path, ignore_errors: bool = False) -> None:
        if (path / "final").is_dir() and renames == 3:
            (path / "config.yaml").unlink()
            raise Killed
        real(path, ignore_errors)

    _kill_after(monkeypatch, renames)
    monkeypatch.setattr(shutil, "rmtree", rmtree)
    with pytest.raises(Killed):
        run.begin({})
        new = tree(folder)
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
    assert tree(folder) == (new if renames == 3 else old) and names(out) == ["other", "run"]


@pytest.mark.parametrize("how", ["--resume", "resume={folder}", ""])
def test_a_lost_config_is_an_error(how, arguments, out):
    """Checkpoints without a config.yaml: no start at step 0, nothing is deleted, and with the file
    back the run goes on."""
    folder = out / "run"
    config = (folder / "config.yaml").read_text()
    (folder / "config.yaml").unlink()
    before = tree(out)
    how = how.format(folder=folder)
    more = ["train.steps=3", "train.keep_checkpoints=1", *([how] if how else [])]
    status, errors = one_rank(*arguments, *more)
    assert status == 2 and "Traceback" not in errors, errors
    assert "config.yaml" in errors if how else "already holds a run" in errors
    assert tree(out) == before
    if how == "--resume":
        (folder / "config.yaml").write_text(config)
        status, errors = one_rank(*arguments, *more)
        assert status == 0 and "resuming" in errors and "step_000001" in errors, errors


def _write(text: str):
    return lambda partial: (partial / "weights").write_text(text) and None


def _fail(_: Path) -> None:
    raise Killed


@pytest.mark.parametrize("renames", range(2))
def test_a_kill_between_two_renames_leaves_a_whole_copy(renames, tmp_path, monkeypatch):
    """A folder that is replaced, cut off before and after each rename: whole, old or new. Written
    again without a clean-up between, the old copy first gets its name back."""
    folder = tmp_path / "final"
    write_folder(folder, _write("old"))
    for cleaned in (True, False):
        _kill_after(monkeypatch, renames)
        # What runs after an exception does not run after a kill.
        monkeypatch.setattr(folders, "_put_back", lambda folder: None, raising=False)
        monkeypatch.setattr(shutil, "rmtree", lambda *_, **__: None)
        with pytest.raises(Killed):
            write_folder(folder, _write("new"))
        monkeypatch.undo()
        if cleaned:
            clean_up(tmp_path)
        else:
            with pytest.raises(Killed):
                write_folder(folder, _write("new"), _fail)
        assert names(tmp_path) == ["final"] and (folder / "weights").read_text() == "old"
    write_folder(folder, _write("new"))
    assert names(tmp_path) == ["final"] and (folder / "weights").read_text() == "new"


def test_a_deletion_that_was_cut_off_is_completed(tmp_path, monkeypatch):
    """Half a checkpoint does not come back."""
    (tmp_path / "step_000001").mkdir()
    monkeypatch.setattr(shutil, "rmtree", lambda path, **_: None)
    remove_folder(tmp_path / "step_000001")
    monkeypatch.undo()
    clean_up(tmp_path)
    assert names(tmp_path) == []
