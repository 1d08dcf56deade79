"""Go on with a run: what must be as it was, and the logs cut back to the checkpoint."""

import hashlib
import json
import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from care_train.config import (
    Config,
    LoraSettings,
    ModelSettings,
    Role,
    config_to_dict,
    dotted,
    list_keys,
    role_of,
)
from care_train.data import Sample, sample_digests
from care_train.distributed import barrier, is_main, world_size
from care_train.reporting.archive import cut_archive
from care_train.training.archiving import EVENT_FILES
from care_train.training.checkpoint import Checkpoint

LOGS = ("metrics.jsonl", *EVENT_FILES)

_FREE_MAPPINGS = ("deepspeed.config.", "eval.sources.")
"""Starts of keys that a configuration may lack."""

logger = logging.getLogger(__name__)


def settings_of(config: Config) -> dict[str, Any]:
    """The resolved configuration, flat, in JSON's types: what a checkpoint remembers."""
    return dotted(json.loads(json.dumps(config_to_dict(config))))


def saved_lora(settings: Mapping[str, Any]) -> LoraSettings | None:
    """The adapters of a checkpoint's `settings_of`."""
    prefix = "model.lora."
    values = {k.removeprefix(prefix): v for k, v in settings.items() if k.startswith(prefix)}
    lora, train_vision = LoraSettings(**values), settings["model.train_vision"]
    return ModelSettings(lora=lora, train_vision=train_vision).adapters


def check_settings(
    saved: Mapping[str, Any], config: Config, *, where: Path, free: Sequence[str] = ()
) -> None:
    """Refuse settings that would make a resumed run another run than the one it goes on with.

    Args:
        saved: `settings_of` the run so far. A key it lacks is newer than it: at its default.
        config: the settings now; `allow_changes` names keys and sections that may differ.
        where: what holds `saved`, for the message.
        free: more keys and sections that may differ.

    Raises:
        ValueError: a setting differs, or is one that only an earlier version had; the message names
            key, saved and new value.
    """
    now, defaults = settings_of(config), settings_of(Config())
    for allowed in config.allow_changes:
        if not any(_within(key, [allowed]) for key in now):
            raise ValueError(f"allow_changes: got {allowed!r}, which is no setting")
    if config.train.schedule == "constant":
        # Nothing else asks how many steps there will be.
        free = (*free, "train.steps")
    lines = []
    gone = {key: None for key in saved if key not in now}
    if old := [key for key in gone if not key.startswith(_FREE_MAPPINGS)]:
        raise ValueError(
            f"resume: {where} was made by an earlier version, which had {', '.join(old)}: go on "
            "with that version, or begin a new run"
        )
    for key, value in (gone | now).items():
        before = saved.get(key, defaults.get(key))
        role = role_of(key)
        if before == value or role is Role.FREE or _within(key, free):
            continue
        if role is Role.FIXED or not _within(key, config.allow_changes):
            lines.append(f"{key}: saved {before!r}, got {value!r}")
    if lines:
        fixed = [key.name for key in list_keys() if key.role is Role.FIXED]
        raise ValueError(
            f"resume: {where} was made with other settings, under which the run would have gone "
            f"another way:\n  " + "\n  ".join(lines) + "\nset them back, or accept the changes "
            f"with allow_changes=[key,...] ({', '.join(fixed)} cannot change)"
        )


def check_progress(checkpoint: Checkpoint, key: str, steps: int) -> None:
    """Refuse a run whose `steps`, the value of `key`, end before its checkpoint, or on other ranks.

    Raises:
        ValueError: fewer steps than the checkpoint has done, or another number of ranks.
    """
    ranks = checkpoint.state["ranks"]
    if ranks != world_size():
        raise ValueError(
            f"resume: {checkpoint.folder} was saved by {ranks} ranks, got {world_size()}: "
            "start it with as many"
        )
    if steps < checkpoint.step:
        raise ValueError(
            f"{key}: got {steps}, wanted at least the {checkpoint.step} steps that "
            f"{checkpoint.folder} has done"
        )


def identity(config: Config, samples: Iterable[Sample], model: torch.nn.Module) -> dict[str, Any]:
    """What must not change under a run: its settings, rows, first weights and ranks."""
    return {
        "settings": settings_of(config),
        "ranks": world_size(),
        "rows": _rows_digest(samples),
        "weights": _weights_digest(model),
        "torch": torch.__version__,
    }


def check_identity(
    checkpoint: Checkpoint, now: Mapping[str, Any], data_key: str, config: Config
) -> None:
    """Refuse other rows or first weights under the same paths; warn of another torch.

    Raises:
        ValueError: the rows of `data_key` or the weights of `model.path` are not those of the
            checkpoint's `identity`.
    """
    saved = checkpoint.state
    for name, key in (("rows", data_key), ("weights", "model.path")):
        if saved[name] != now[name] and not _within(key, config.allow_changes):
            raise ValueError(
                f"{key}: its {name} are not those that {checkpoint.folder} began with (checksum "
                f"saved {saved[name]}, got {now[name]}): restore them, or accept the change with "
                f"allow_changes=[{key}]"
            )
    if saved["torch"] != now["torch"] and is_main():
        logger.warning(
            "warning: %s was saved under torch %s, this is %s: results may differ in the last bits",
            *(checkpoint.folder, saved["torch"], now["torch"]),
        )


def log_sizes(run_dir: Path) -> dict[str, int]:
    """Bytes of each log by now, on the disk: what comes later is lost with a checkpoint."""
    sizes = {}
    for name in LOGS:
        path = run_dir / name
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
                sizes[name] = os.fstat(file.fileno()).st_size
    return sizes


def cut_logs(run_dir: Path, sizes: Mapping[str, int], step: int) -> None:
    """Drop what a killed run wrote after its checkpoint; the resumed one writes it again.

    Args:
        run_dir: the run's folder.
        sizes: `log_sizes` at the checkpoint.
        step: how many of reinforcement learning it has done; -1: it has not begun.
    """
    if is_main():
        cut_archive(run_dir, step)
        for name in LOGS:
            path, size = run_dir / name, sizes.get(name, 0)
            if not path.is_file():
                continue
            if path.stat().st_size < size:
                logger.warning("warning: %s: shorter than at the checkpoint; lines are lost", path)
            else:
                os.truncate(path, size)
    barrier()


def cold_start_logs(run_dir: Path, cold_start: str | None) -> dict[str, int]:
    """Bytes of the logs that a run without a checkpoint keeps: those of a finished cold start."""
    path, size = run_dir / LOGS[0], 0
    if cold_start is not None and (run_dir / cold_start).is_dir() and path.is_file():
        for line in path.read_bytes().splitlines(keepends=True):
            if not line.endswith(b"\n") or json.loads(line).get("phase") != "sft":
                break
            size += len(line)
    return {LOGS[0]: size}


def _within(key: str, names: Iterable[str]) -> bool:
    return any(key == name or key.startswith(f"{name}.") for name in names)


def _rows_digest(samples: Iterable[Sample]) -> str:
    """Over the texts and images of all rows, in order."""
    return hashlib.blake2b("".join(sample_digests(samples)).encode(), digest_size=8).hexdigest()


def _weights_digest(model: torch.nn.Module) -> str:
    """A sum of each parameter's bits: fast on any device, blind to no accidental change."""
    kinds = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    digest = hashlib.blake2b(digest_size=8)
    for name, parameter in model.named_parameters():
        bits = parameter.detach().contiguous().view(kinds[parameter.element_size()])
        digest.update(f"{name} {tuple(parameter.shape)} {bits.sum(dtype=torch.int64)}".encode())
    return digest.hexdigest()
