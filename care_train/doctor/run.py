"""Run every check and report."""

import json
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch
from jinja2 import TemplateError
from rich.console import Console

from care_train.config import Config
from care_train.data import Sample, load_samples
from care_train.doctor import (
    Finding,
    Subject,
    UnavailableError,
    data,
    error,
    machine,
    model,
)
from care_train.models.load import LoadedModel, load_model
from care_train.models.tiny import model_folder

Check = Callable[[Subject], Finding]
Value = TypeVar("Value")

CHECKS: dict[str, Check] = {
    "versions": machine.check_versions,
    "devices": machine.check_devices,
    "open files": machine.check_open_files,
    "shared memory": machine.check_shared_memory,
    "run folder": machine.check_run_folder,
    "batches": data.check_batches,
    "training rows": data.check_rows,
    "evaluation rows": data.check_evaluation_rows,
    "prompt": data.check_prompt,
    "rewards": data.check_rewards,
    "tags": model.check_tags,
    "special ids": model.check_special_ids,
    "image tokens": model.check_image_tokens,
    "chat template": model.check_template,
    "generation config": model.check_generation_config,
    "disk": machine.check_disk,
    "memory": machine.check_memory,
    "log-prob parity": model.check_parity,
}
"""In the order of the report."""

BREAKS = (
    *(ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, OSError),
    *(RuntimeError, TemplateError, TypeError, ValueError),
)
"""What a broken model, processor, template, configuration or data set raises."""

_FIXES = {
    "model": "set model.path to a Hugging Face model folder",
    "data": "correct data.path or the rows named",
}
_STYLES = {"ok": "green", "warning": "yellow", "error": "bold red"}


def diagnose(config: Config, ranks: int) -> list[Finding]:
    """All findings of a run of so many ranks: of model and data first, if they cannot be read."""
    findings: list[Finding] = []

    def load(name: str, action: Callable[[], Value]) -> Value | None:
        try:
            return action()
        except BREAKS as reason:
            findings.append(_broken(name, reason))
            return None

    with tempfile.TemporaryDirectory(prefix="care-doctor-") as folder:
        samples = load("data", lambda: load_samples(config.data, config.seed)) or []
        loaded = load("model", lambda: _load(config, samples, Path(folder)))
        subject = Subject(config, ranks, loaded, samples)
        for name, check in CHECKS.items():
            finding = guarded(name, partial(check, subject))
            findings += [] if finding is None else [finding]
    return findings


def guarded(name: str, action: Callable[[], Finding]) -> Finding | None:
    """A check's finding, or an error in its place where the check itself breaks; None where it
    needs a model or rows that could not be loaded."""
    try:
        return replace(action(), name=name)
    except UnavailableError:
        return None
    except BREAKS as reason:
        return _broken(name, reason)


def _broken(name: str, reason: Exception) -> Finding:
    text = " ".join(str(reason).split()) or type(reason).__name__
    kind = "" if isinstance(reason, ValueError) else f"{type(reason).__name__}: "
    return replace(error(f"{kind}{text}"[:600], _FIXES.get(name, "see the message")), name=name)


def _load(config: Config, samples: Sequence[Sample], folder: Path) -> LoadedModel:
    """The model as a run would load it; a tiny one is made in `folder`."""
    loaded = load_model(config.model, model_folder(config, folder / "tiny", samples))
    loaded.model.to("cuda" if torch.cuda.is_available() else "cpu")
    return loaded


def doctor(config: Config, ranks: int | None, *, as_json: bool = False) -> int:
    """`care-train doctor`: print the findings; returns the exit status, 1 if any is an error."""
    start = time.perf_counter()
    if ranks is None:
        ranks = int(os.environ.get("WORLD_SIZE", 0)) or max(1, torch.cuda.device_count())
    findings = diagnose(config, ranks)
    seconds = time.perf_counter() - start
    counts = {level: sum(f.level == level for f in findings) for level in _STYLES}
    if as_json:
        values = {"findings": [asdict(f) for f in findings], "seconds": round(seconds, 1)}
        print(json.dumps(values | counts))
    else:
        _show(findings)
        print(
            f"{counts['error']} errors, {counts['warning']} warnings, {counts['ok']} ok in "
            f"{seconds:.1f} s"
        )
    return int(counts["error"] > 0)


def _show(findings: Sequence[Finding]) -> None:
    console = Console(soft_wrap=True, highlight=False)
    width = max(len(finding.name) for finding in findings)
    for finding in findings:
        label = f"[{_STYLES[finding.level]}]{finding.level:<8}[/]"
        console.print(f"{label}{finding.name:<{width}}  ", end="")
        console.print(finding.message, markup=False)
        if finding.fix:
            console.print(f"{'':<{8 + width}}  fix: {finding.fix}", markup=False)
