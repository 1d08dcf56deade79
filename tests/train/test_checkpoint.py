"""Checkpoints: whole or absent, verified, rotated; the state they hold."""

import json
import random
import shutil
import signal
from collections import namedtuple
from pathlib import Path
from types import SimpleNamespace

import numpy
import pytest
import torch

from care_train.config import LoraSettings
from care_train.training import folders
from care_train.training.checkpoint import Checkpoints, restore_rng_state, rng_state
from care_train.training.engine import PolicyEngine, read_weights
from care_train.training.folders import SaveError
from tests.train.builders import (
    assert_same_weights,
    load,
    make_engine,
    micro_batch,
    whole_weights,
)
from tests.train.runs import errors_of


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


DAMAGES = [
    ("state/weights", None, "state/weights is missing"),
    ("state/weights", lambda content: content[:7], "state/weights has 7 bytes, wanted 800"),
    ("state/weights", lambda content: b"W" + content[1:], "weights does not match its checksum"),
    ("manifest.json", None, "no manifest.json: it is incomplete"),
]


@pytest.mark.parametrize(("name", "change", "message"), DAMAGES)
def test_damage_of_every_kind_is_named_and_the_checkpoint_before_used(
    name, change, message, tmp_path, caplog
):
    """The newest is set aside with a warning; with none left, an error names each and why."""

    def damage(folder: Path) -> None:
        path = folder / name
        content = path.read_bytes()
        path.unlink() if change is None else path.write_bytes(change(content))

    checkpoints = Checkpoints(tmp_path, keep=3)
    _save(checkpoints, 1, 2, 3)
    damage(tmp_path / "step_000003")
    newest = checkpoints.newest()
    assert newest is not None and newest.step == 2
    assert f"{message}; using step_000002" in caplog.text
    assert _names(tmp_path) == ["step_000001", "step_000002", "step_000003.damaged"]
    _save(checkpoints, 3)  # written anew: nothing to look into any more
    assert _names(tmp_path) == ["step_000001", "step_000002", "step_000003"]
    for step in (1, 2, 3):
        damage(tmp_path / f"step_{step:06d}")
    with pytest.raises(ValueError, match="no usable checkpoint") as error:
        checkpoints.newest()
    assert str(error.value).count(message) == 3
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
    ["", '{"checkpoint": "step_000001"}', '{"checkpoint": "../x", "metric": "m", "value": 1}'],
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
    usage = namedtuple("usage", "total used free")
    for problem, message in (("No space left on device", "No space left"), (None, "disk is full")):
        with pytest.raises(SaveError, match=message) as error:
            _save(checkpoints, 2, engine=FakeEngine(problem))
        text = str(error.value)
        assert str(tmp_path / "step_000002") in text and "1,000 bytes" in text
        assert "older ones are untouched" in text
        monkeypatch.setattr(folders.shutil, "disk_usage", lambda _: usage(1000, 1, 999))
    assert "999 bytes are free" in text
    assert _names(tmp_path) == ["step_000001"] and checkpoints.newest() is not None


def test_random_number_generators_go_on_where_they_were():
    """python, numpy and torch."""
    state = rng_state()
    drawn = [(random.random(), numpy.random.rand(), torch.rand(1)) for _ in range(2)]
    restore_rng_state(state)
    assert [(random.random(), numpy.random.rand(), torch.rand(1)) for _ in range(2)] == drawn


def test_a_ranks_gpu_goes_on_among_another_number_of_gpus(monkeypatch):
    """The one it trains on, however many it sees now."""
    restored: list[torch.Tensor] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device="cuda": torch.ones(1))
    monkeypatch.setattr(
        torch.cuda, "set_rng_state", lambda new, device="cuda": restored.append(new)
    )
    state = rng_state()
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    restore_rng_state(state)
    assert restored == [torch.ones(1)]


def _steps(engine: PolicyEngine, count: int) -> None:
    for _ in range(count):
        engine.step([micro_batch(engine)], 1.0)


@pytest.mark.parametrize(
    ("zero_stage", "kind"),
    [(0, "fp32"), (2, "fp32"), (3, "fp32"), (1, "bf16"), (0, "lora"), (3, "lora")],
)
def test_every_zero_stage_resumes_and_exports_bit_for_bit(zero_stage, kind, tiny_folder, tmp_path):
    """Two steps, saved, two more; the same two from the checkpoint end in the same weights."""
    settings = {"warmup_steps": 2, "schedule": "cosine", "weight_decay": 0.1}
    settings |= {"zero_stage": zero_stage, "bf16": kind == "bf16"}
    settings |= {"lora": LoraSettings(rank=4)} if kind == "lora" else {}

    def fresh() -> PolicyEngine:
        loaded = load(tiny_folder(), dtype="bfloat16" if kind == "bf16" else "float32")
        return make_engine(loaded, **settings)

    engine = fresh()
    _steps(engine, 2)
    saved = whole_weights(engine)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(engine, {"step": 2})
    size = sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file())
    assert 0.8 < engine.checkpoint_bytes() / size < 1.6
    _steps(engine, 2)
    checkpoint = checkpoints.newest()
    assert checkpoint is not None
    exported = read_weights(checkpoint.folder)
    for name, tensor in saved.items():
        assert torch.equal(exported[name].to(tensor.dtype), tensor), name
    again = fresh()
    checkpoint.restore(again)
    _steps(again, 2)
    assert again.learning_rate == engine.learning_rate
    assert_same_weights(whole_weights(again), whole_weights(engine))


def test_changed_settings_take_effect_after_a_resume(tiny_folder, tmp_path):
    """The optimiser's saved settings do not hide new ones that were allowed."""
    engine = make_engine(load(tiny_folder()), zero_stage=2, schedule="cosine", weight_decay=0.1)
    _steps(engine, 2)
    Checkpoints(tmp_path).save(engine, {"step": 2})
    settings = {"learning_rate": 1e-3, "weight_decay": 0.3, "max_grad_norm": 0.5}
    other = make_engine(load(tiny_folder()), zero_stage=2, **settings)
    other.load_state(tmp_path / "step_000002")
    group = other.optimizer.param_groups[0]
    assert (group["lr"], group["weight_decay"]) == (1e-3, 0.3)
    assert other.learning_rate == 1e-3


TWO_SIGNALS = """
import os, signal, time, torch
from care_train.training.guard import StopSignals
with StopSignals() as signals:
    for _ in range(2):
        os.kill(os.getpid(), signal.SIGTERM)
    assert signals.requested(torch.device("cpu")) == signal.SIGTERM
    time.sleep(1.1)
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(30)
"""


def test_a_second_signal_ends_the_run_at_once():
    """One SIGTERM is noted; two at once count as one; one more, later, kills."""
    [errors] = errors_of(before=TWO_SIGNALS, status=-signal.SIGINT)
    assert errors.count("stopping after this step") == 1
