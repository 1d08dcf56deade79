"""Write models and checkpoints whole: into a temporary folder, synced, then renamed."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from care_train.training.distributed import barrier, is_main
from care_train.training.engine import PolicyEngine

STATE_FILE = "trainer_state.json"


def save_model(engine: PolicyEngine, folder: Path) -> None:
    """The policy as a plain Hugging Face folder, from any ZeRO stage."""
    with engine.gathered(), _whole_folder(folder) as partial:
        if is_main():
            engine.loaded.save(partial)


def save_checkpoint(
    engine: PolicyEngine, checkpoints: Path, state: dict[str, Any], keep: int
) -> Path:
    """Weights, optimiser, schedule and trainer state of step `state["step"]`; keeps the newest."""
    folder = checkpoints / f"step_{state['step']:06d}"
    with _whole_folder(folder) as partial:
        engine.save_state(partial, {})
        if is_main():
            (partial / STATE_FILE).write_text(json.dumps(state))
    if is_main():
        for old in list_checkpoints(checkpoints)[:-keep]:
            shutil.rmtree(old)
    barrier()
    return folder


def list_checkpoints(checkpoints: Path) -> list[Path]:
    """Whole checkpoints, oldest first; folders a kill left unfinished are not among them."""
    found = (path for path in checkpoints.glob("step_*") if (path / STATE_FILE).is_file())
    return sorted(path for path in found if not path.name.endswith(".partial"))


def load_checkpoint(engine: PolicyEngine, checkpoints: Path) -> dict[str, Any]:
    """Restore the newest checkpoint; returns its trainer state.

    Raises:
        ValueError: no whole checkpoint there.
    """
    found = list_checkpoints(checkpoints)
    if not found:
        raise ValueError(f"resume: {checkpoints}: no whole checkpoint there to go on from")
    engine.load_state(found[-1])
    return json.loads((found[-1] / STATE_FILE).read_text())


@contextmanager
def _whole_folder(folder: Path) -> Iterator[Path]:
    """A temporary sibling every rank may write to, which becomes `folder` when all are done."""
    partial = folder.with_name(folder.name + ".partial")
    if is_main():
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    barrier()
    yield partial
    barrier()
    if is_main():
        for path in sorted(partial.rglob("*")):
            if path.is_file():
                _sync(path)
        _sync(partial)
        # Deleted only now: the old folder stays whole until the new one is.
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
        _sync(folder.parent)
    barrier()


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
