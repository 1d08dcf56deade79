"""Checkpoints: whole or absent, verified, rotated; the state they hold."""

import json
import os
import random
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path
from types import SimpleNamespace

import numpy
import pytest
import torch

from care_train.config import DeepSpeedSettings
from care_train.distributed import initialize_process_group
from care_train.models.batch import TokenSequence
from care_train.training import folders
from care_train.training.checkpoint import Checkpoints, restore_rng_state, rng_state
from care_train.training.engine import MicroBatch, PolicyEngine, read_weights
from care_train.training.folders import SaveError, remove_folder, write_folder
from care_train.training.optimizer import OptimizerSettings
from tests.train.builders import image_sample, load, make_session, text_sample


@pytest.fixture(autouse=True)
def own_environment():
    """A process group's variables must not reach the processes that later tests start."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


class FakeEngine:
    """Writes one file for the weights; the rest of an engine plays no part here."""

    def __init__(self, problem: str | None = None) -> None:
        self.problem = problem
        self.loaded = SimpleNamespace(save_skeleton=lambda folder: folder.mkdir())

    def checkpoint_bytes(self) -> int:
        return 1000

    def save_state(self, folder: Path) -> None:
        (folder / "state").mkdir()
        (folder / "state" / "weights").write_bytes(b"weights " * 100)
        if self.problem:
            raise OSError(self.problem)


def _save(checkpoints: Checkpoints, *steps: int, engine=None, scores=None) -> None:
    for step in steps:
        checkpoints.save(engine or FakeEngine(), {"step": step}, scores)  # pyright: ignore


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def _no_file(folder: Path) -> None:
    (folder / "state" / "weights").unlink()


def _cut_file(folder: Path) -> None:
    (folder / "state" / "weights").write_bytes(b"weights")


def _flip_bit(folder: Path) -> None:
    path = folder / "state" / "weights"
    content = bytearray(path.read_bytes())
    content[400] ^= 1
    path.write_bytes(content)


def _no_manifest(folder: Path) -> None:
    (folder / "manifest.json").unlink()


def _cut_manifest(folder: Path) -> None:
    path = folder / "manifest.json"
    path.write_text(path.read_text()[:50])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_no_file, "state/weights is missing"),
        (_cut_file, "state/weights has 7 bytes, wanted 800"),
        (_flip_bit, "state/weights does not match its checksum"),
        (_no_manifest, "no manifest.json: it is incomplete"),
        (_cut_manifest, "manifest.json is damaged"),
    ],
)
def test_damage_of_every_kind_is_named_and_the_checkpoint_before_used(
    damage, message, tmp_path, caplog
):
    """The newest is set aside with a warning; with none left, an error names each and why."""
    checkpoints = Checkpoints(tmp_path, keep=3)
    _save(checkpoints, 1, 2, 3)
    damage(tmp_path / "step_000003")
    newest = checkpoints.newest()
    assert newest is not None and newest.step == 2
    assert f"step_000003: {message}; using step_000002" in caplog.text
    assert _names(tmp_path) == ["step_000001", "step_000002", "step_000003.damaged"]
    _save(checkpoints, 3)  # written anew: nothing to look into any more
    assert _names(tmp_path) == ["step_000001", "step_000002", "step_000003"]
    for step in (1, 2, 3):
        damage(tmp_path / f"step_{step:06d}")
    with pytest.raises(ValueError, match="no usable checkpoint") as error:
        checkpoints.newest()
    assert all(f"step_{step:06d}: {message}" in str(error.value) for step in (1, 2, 3))
    assert len(_names(tmp_path)) == 3


def test_the_last_ones_and_the_best_are_kept(tmp_path):
    """keep=2: the two newest, and the best of the evaluations, also over a restart."""
    checkpoints = Checkpoints(tmp_path, keep=2, metric="accuracy")
    for step, accuracy in ((1, 0.5), (2, 0.9), (3, 0.9), (4, 0.1), (5, None)):
        scores = None if accuracy is None else {"accuracy": accuracy, "format": 1.0}
        _save(checkpoints, step, scores=scores)
    assert _names(tmp_path) == ["best.json", "step_000002", "step_000004", "step_000005"]
    best = json.loads((tmp_path / "best.json").read_text())
    assert best == {"checkpoint": "step_000002", "metric": "accuracy", "value": 0.9}
    # A kill between writing a checkpoint and marking it: its own scores still say so.
    (tmp_path / "best.json").unlink()
    again = Checkpoints(tmp_path, keep=2, metric="accuracy")
    assert not again.is_best({"accuracy": 0.9}) and again.is_best({"accuracy": 0.91})
    assert again.find("best").step == 2 and again.find("last").step == 5
    _save(again, 6, 7)
    assert "step_000002" in _names(tmp_path)
    again.mark_best(7, {"accuracy": 0.95})
    _save(again, 8)
    assert _names(tmp_path) == ["best.json", "step_000007", "step_000008"]
    with pytest.raises(
        ValueError, match=r"got step_3, .* has step_000007, step_000008, last, best"
    ):
        again.find("step_3")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        '{"checkpoint": "step_000001"}',
        '{"checkpoint": "../x", "metric": "m", "value": 1}',
    ],
)
def test_a_damaged_mark_of_the_best_is_named(text, tmp_path):
    """Not a traceback: the file, what it holds and that it can be deleted."""
    _save(Checkpoints(tmp_path), 1)
    (tmp_path / "best.json").write_text(text)
    with pytest.raises(ValueError, match=r"best\.json: got .*: delete the file"):
        Checkpoints(tmp_path, metric="accuracy")


def test_leftovers_of_kills_are_cleaned_up(tmp_path):
    """Unfinished writes and deletions are no checkpoints, and go at the next start."""
    checkpoints = Checkpoints(tmp_path, keep=2)
    _save(checkpoints, 1)
    shutil.copytree(tmp_path / "step_000001", tmp_path / "step_000002.partial")
    shutil.copytree(tmp_path / "step_000001", tmp_path / "step_000001.replaced")
    shutil.copytree(tmp_path / "step_000001", tmp_path / "step_000003.deleted")
    (tmp_path / "best.json.partial").write_text("{")
    assert [path.name for path in checkpoints.list()] == ["step_000001"]
    checkpoints.clean_up()
    assert _names(tmp_path) == ["step_000001"]


def test_a_full_disk_leaves_the_checkpoints_as_they_were(tmp_path, monkeypatch):
    """Found out before writing or while writing: nothing half-written, and what to do is said."""
    checkpoints = Checkpoints(tmp_path, keep=1)
    _save(checkpoints, 1)
    with pytest.raises(SaveError, match="No space left") as error:
        _save(checkpoints, 2, engine=FakeEngine("state/weights: No space left on device"))
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(folders.shutil, "disk_usage", lambda _: usage(1000, 1, 999))
    with pytest.raises(SaveError, match="disk is full") as early:
        _save(checkpoints, 2)
    for text in (str(error.value), str(early.value)):
        assert str(tmp_path / "step_000002") in text and "1,000 bytes" in text
        assert "older ones are untouched" in text
    assert "999 bytes are free" in str(early.value)
    assert _names(tmp_path) == ["step_000001"]
    newest = checkpoints.newest()
    assert newest is not None and newest.step == 1


def test_replacing_a_folder_keeps_the_old_one_until_the_new_one_is_whole(tmp_path):
    """An error while writing leaves the old content; success replaces it."""
    folder = tmp_path / "final"
    write_folder(folder, lambda partial: (partial / "a").write_text("old") and None)
    with pytest.raises(KeyboardInterrupt):
        write_folder(folder, _interrupt)
    assert (folder / "a").read_text() == "old" and _names(tmp_path) == ["final"]
    write_folder(folder, lambda partial: (partial / "b").write_text("new") and None)
    assert _names(folder) == ["b"] and _names(tmp_path) == ["final"]
    remove_folder(folder)
    assert _names(tmp_path) == []


def _interrupt(_: Path) -> None:
    raise KeyboardInterrupt


def test_random_number_generators_go_on_where_they_were():
    """python, numpy and torch."""
    state = rng_state()
    drawn = [(random.random(), numpy.random.rand(), torch.rand(1)) for _ in range(2)]
    restore_rng_state(state)
    assert [(random.random(), numpy.random.rand(), torch.rand(1)) for _ in range(2)] == drawn


def _engine(folder: Path, zero_stage: int, dtype: str) -> PolicyEngine:
    loaded = make_session(folder, {"model": {"dtype": dtype}}).loaded
    optimizer = OptimizerSettings(
        learning_rate=1e-2, total_steps=8, warmup_steps=2, schedule="cosine", weight_decay=0.1
    )
    settings = DeepSpeedSettings(zero_stage=zero_stage)
    device = initialize_process_group()
    return PolicyEngine(loaded, optimizer, settings, device, bf16=dtype == "bfloat16")


def _steps(engine: PolicyEngine, session, count: int) -> None:
    samples = [image_sample("red"), text_sample(1)]
    prompts = session.encoder.encode(samples)
    batch = engine.collate([TokenSequence(p, (), (12, 13, 14)) for p in prompts])
    advantages = torch.tensor([1.0, 0.5, 1.0, -0.2, 0.3, 0.1])
    for _ in range(count):
        engine.step([MicroBatch(batch, {"advantages": advantages})], 1.0)


def _weights(engine: PolicyEngine) -> dict[str, torch.Tensor]:
    with engine.gathered():
        return {n: p.detach().clone() for n, p in engine.loaded.model.named_parameters()}


@pytest.mark.parametrize(
    ("zero_stage", "dtype"),
    [(0, "float32"), (1, "float32"), (2, "float32"), (3, "float32"), (1, "bfloat16")],
)
def test_every_zero_stage_resumes_and_exports_bit_for_bit(zero_stage, dtype, tiny_folder, tmp_path):
    """Two steps, saved, two more; the same two from the checkpoint end in the same weights."""
    session = make_session(tiny_folder())
    engine = _engine(tiny_folder(), zero_stage, dtype)
    _steps(engine, session, 2)
    saved = _weights(engine)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(engine, {"step": 2})
    size = sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file())
    assert 0.8 < engine.checkpoint_bytes() / size < 1.6
    _steps(engine, session, 2)
    whole, rate = _weights(engine), engine.learning_rate

    checkpoint = checkpoints.newest()
    assert checkpoint is not None
    exported = read_weights(checkpoint.folder)
    for name, tensor in saved.items():
        assert torch.equal(exported[name].to(tensor.dtype), tensor), name
    again = _engine(tiny_folder(), zero_stage, dtype)
    checkpoint.restore(again)
    _steps(again, session, 2)
    assert again.learning_rate == rate
    for name, tensor in _weights(again).items():
        assert torch.equal(tensor, whole[name]), name


def test_changed_settings_take_effect_after_a_resume(tiny_folder, tmp_path):
    """The optimiser's saved settings do not hide new ones that were allowed."""
    engine = _engine(tiny_folder(), 2, "float32")
    _steps(engine, make_session(tiny_folder()), 2)
    Checkpoints(tmp_path).save(engine, {"step": 2})
    settings = OptimizerSettings(
        learning_rate=1e-3, total_steps=8, weight_decay=0.3, max_grad_norm=0.5
    )
    device = initialize_process_group()
    other = PolicyEngine(load(tiny_folder()), settings, DeepSpeedSettings(zero_stage=2), device)
    other.load_state(tmp_path / "step_000002")
    group = other.optimizer.param_groups[0]
    assert (group["lr"], group["weight_decay"]) == (1e-3, 0.3)
    assert other.learning_rate == 1e-3


def test_a_second_signal_ends_the_run_at_once():
    """One SIGTERM is noted; two at once count as one; one more, later, kills."""
    code = (
        "import os, signal, time, torch\n"
        "from care_train.training.guard import StopSignals\n"
        "with StopSignals() as signals:\n"
        "    os.kill(os.getpid(), signal.SIGTERM); os.kill(os.getpid(), signal.SIGTERM)\n"
        "    print(signals.requested(torch.device('cpu')), flush=True)\n"
        "    time.sleep(1.1)\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "    time.sleep(30)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "15" and done.returncode == -2
    assert done.stderr.count("stopping after this step") == 1
