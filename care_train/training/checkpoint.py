"""Checkpoints of a run: written whole, verified before use, the newest and the best kept."""

import json
import logging
import random
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import torch

from care_train.compat import plain_data_alone
from care_train.distributed import barrier, is_main, rank
from care_train.reporting.files import write_file
from care_train.training.engine import PolicyEngine
from care_train.training.failures import checkpoint_folders
from care_train.training.folders import (
    clean_up,
    find_damage,
    remove_folder,
    write_folder,
    write_manifest,
)
from care_train.training.weights import buffers

STATE_FILE = "trainer_state.json"
BEST_FILE = "best.json"
SKELETON = "model"
DAMAGED = ".damaged"
_BUCKET_BYTES = 1 << 29
"""Gathered on every rank's device at once; the whole model is in rank 0's main memory alone."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Checkpoint:
    """A whole, verified checkpoint."""

    folder: Path
    state: dict[str, Any]
    """What its `trainer_state.json` holds."""

    @property
    def step(self) -> int:
        return self.state["step"]

    def restore(self, engine: PolicyEngine) -> dict[str, Any]:
        """Load this rank's weights, optimiser, schedule and random number generators.

        Returns:
            What else of this rank was saved: `own` of `Checkpoints.save`.
        """
        engine.load_state(self.folder)
        with plain_data_alone(self.folder):
            own = torch.load(self.folder / _rank_file(), weights_only=True)
        restore_rng_state(own.pop("rng"))
        return own


class Checkpoints:
    """The checkpoints of one folder."""

    def __init__(self, folder: Path, keep: int = 1, metric: str | None = None) -> None:
        """Look at what is there; every rank makes one, and all before one of them saves.

        `keep` of the newest are kept, and the best by the evaluation's `metric`; higher is better.
        """
        self.folder = folder
        self._keep = keep
        self._metric = metric
        self._best = self._read_best()
        barrier()

    def list(self) -> list[Path]:
        """Checkpoint folders, oldest first, without unfinished and damaged ones."""
        return checkpoint_folders(self.folder)

    def is_best(self, scores: Mapping[str, float]) -> bool:
        """Whether an evaluation beats that of every checkpoint so far."""
        if self._metric is None:
            return False
        return self._best is None or scores[self._metric] > self._best["value"]

    def save(
        self,
        engine: PolicyEngine,
        state: dict[str, Any],
        scores: Mapping[str, float] | None = None,
        own: Mapping[str, Any] | None = None,
    ) -> Path:
        """Write step `state["step"]`, mark it where it is the best, drop what is not kept.

        `scores` are of the evaluation after this step, where there was one; `own` is more of this
        rank, in plain types and tensors.

        Raises:
            SaveError: it could not be written; older checkpoints are untouched.
        """
        folder = self.folder / f"step_{state['step']:06d}"
        state = state | {"scores": dict(scores) if scores else None}

        def write(partial: Path) -> None:
            engine.save_state(partial)
            _save_tensors({"rng": rng_state(), **(own or {})}, partial / _rank_file())
            if is_main():
                engine.loaded.save_skeleton(partial / SKELETON)
                (partial / STATE_FILE).write_text(json.dumps(state))

        write_folder(folder, write, write_manifest, needed=engine.checkpoint_bytes())
        if scores is not None:
            self.mark_best(state["step"], scores)
        self._rotate()
        return folder

    def mark_best(self, step: int, scores: Mapping[str, float]) -> None:
        """Let `best.json` name the checkpoint of `step` where its evaluation is the best so far."""
        if not self.is_best(scores):
            return
        assert self._metric is not None
        name, value = f"step_{step:06d}", scores[self._metric]
        self._best = {"checkpoint": name, "metric": self._metric, "value": value}
        if is_main():
            write_file(self.folder / BEST_FILE, json.dumps(self._best))
        barrier()

    def remove(self) -> None:
        """Delete all of them."""
        if is_main():
            remove_folder(self.folder)
        barrier()

    def clean_up(self) -> None:
        """Delete what killed writes and deletions left behind."""
        if is_main() and self.folder.is_dir():
            clean_up(self.folder)
        barrier()

    def newest(self) -> Checkpoint | None:
        """The newest undamaged checkpoint, or None where there is none of any kind.

        Damaged ones are named in a warning and set aside as `step_….damaged`.

        Raises:
            ValueError: all are damaged; the message names each and why.
        """
        damaged: dict[Path, str] = {}
        for folder in reversed(self.list()):
            problem = find_damage(folder)
            if problem is None:
                self._set_aside(damaged, folder)
                return _open(folder)
            damaged[folder] = problem
        if damaged:
            lines = "".join(f"\n  {folder}: {problem}" for folder, problem in damaged.items())
            raise ValueError(f"resume: no usable checkpoint in {self.folder}:{lines}")
        return None

    def find(self, name: str) -> Checkpoint:
        """The checkpoint named `step_…`, `best` or `last`, verified.

        Raises:
            ValueError: there is none of that name, or it is damaged.
        """
        known = {path.name: path for path in self.list()}
        names = dict(known)
        if known:
            names["last"] = list(known.values())[-1]
        if self._best is not None:
            names["best"] = known[self._best["checkpoint"]]
        if name not in names:
            wanted = ", ".join(names) or "none"
            raise ValueError(f"checkpoint: got {name}, {self.folder} has {wanted}")
        if problem := find_damage(names[name]):
            raise ValueError(f"checkpoint {names[name]}: {problem}")
        return _open(names[name])

    def _set_aside(self, damaged: Mapping[Path, str], used: Path) -> None:
        for folder, problem in damaged.items():
            if is_main():
                aside = folder.with_name(folder.name + DAMAGED)
                shutil.rmtree(aside, ignore_errors=True)
                folder.rename(aside)
                logger.warning("warning: %s: %s; using %s", folder, problem, used.name)
        if damaged:
            barrier()
            self._best = self._read_best()
            barrier()

    def _rotate(self) -> None:
        """Delete all but the newest and the best, and a damaged one that was written again."""
        if is_main():
            best = self._best["checkpoint"] if self._best else None
            for folder in self.list()[: -self._keep]:
                if folder.name != best:
                    remove_folder(folder)
            for folder in self.list():
                remove_folder(folder.with_name(folder.name + DAMAGED))
        barrier()

    def _read_best(self) -> dict[str, Any] | None:
        """The best of what `best.json` says and of the checkpoints' own scores: a kill may come
        between writing a checkpoint and marking it."""
        found = []
        path = self.folder / BEST_FILE
        if path.is_file():
            entry = _read_mark(path)
            if self.folder / entry["checkpoint"] in self.list():
                found.append(entry)
        metric = self._metric or (found[0]["metric"] if found else None)
        for folder in self.list() if metric else []:
            value = (_state_of(folder).get("scores") or {}).get(metric)
            if value is not None:
                found.append({"checkpoint": folder.name, "metric": metric, "value": value})
        found = [entry for entry in found if entry["metric"] == metric]
        return max(found, key=lambda entry: entry["value"], default=None)


def save_model(engine: PolicyEngine, folder: Path) -> None:
    """The policy as a plain Hugging Face folder, from any ZeRO stage, adapters merged.

    Raises:
        SaveError: it could not be written.
    """
    weights = {}
    for name, tensor in engine.weights(_BUCKET_BYTES):
        if is_main():
            weights[name] = tensor.to("cpu", copy=True)

    def write(partial: Path) -> None:
        if is_main():
            engine.loaded.save(partial, weights | buffers(engine.loaded.model))

    write_folder(folder, write)


def seed_all(seed: int) -> None:
    """Seed python, numpy and torch on every device, which libraries may draw from.

    Rollouts, reflections and the order of rows need none of them: they are seeded per request.
    """
    random.seed(seed)
    numpy.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def rng_state() -> dict[str, Any]:
    """The state of python's, numpy's and torch's generators in this process, of its own GPU's."""
    state: Any = numpy.random.get_state(legacy=True)
    kind, keys, position, has_gauss, gauss = state
    return {
        "python": random.getstate(),
        "numpy": (kind, torch.from_numpy(keys.copy()), position, has_gauss, gauss),
        "torch": torch.get_rng_state(),
        "cuda": [torch.cuda.get_rng_state()] if torch.cuda.is_available() else [],
    }


def restore_rng_state(state: dict[str, Any]) -> None:
    """Set what `rng_state` returned, a GPU's where there is one."""
    random.setstate(state["python"])
    kind, keys, *rest = state["numpy"]
    numpy.random.set_state((kind, keys.numpy(), *rest))
    torch.set_rng_state(state["torch"])
    if torch.cuda.is_available() and state["cuda"]:
        torch.cuda.set_rng_state(state["cuda"][0])


def _read_mark(path: Path) -> dict[str, Any]:
    try:
        entry = json.loads(path.read_text())
        name, metric, value = entry["checkpoint"], entry["metric"], float(entry["value"])
        if Path(name).name == name:
            return {"checkpoint": name, "metric": metric, "value": value}
    except (ValueError, TypeError, KeyError):
        pass
    raise ValueError(
        f"{path}: got {path.read_text(errors='replace')[:80]!r}, wanted the best checkpoint's "
        "name, metric and value: delete the file, the checkpoints hold their scores too"
    )


def _open(folder: Path) -> Checkpoint:
    return Checkpoint(folder, json.loads((folder / STATE_FILE).read_text()))


def _state_of(folder: Path) -> dict[str, Any]:
    """The trainer's state of a checkpoint that may be damaged."""
    try:
        return json.loads((folder / STATE_FILE).read_text())
    except (OSError, ValueError):
        return {}


def _save_tensors(value: Any, path: Path) -> None:
    try:
        torch.save(value, path)
    except RuntimeError as error:  # torch's zip writer knows no OSError
        raise OSError(f"{path}: {str(error).splitlines()[0]}") from error


def _rank_file() -> str:
    return f"rank_{rank():05d}.pt"
