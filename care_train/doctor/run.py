"""Run every check and report."""

import json
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch
from jinja2 import TemplateError
from rich.console import Console

from care_train.config import Config
from care_train.data import Sample, load_samples
from care_train.doctor import machine, model, parity, rows, settings
from care_train.doctor.finding import Finding, Subject
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
    "batches": settings.check_batches,
    "training rows": rows.check_rows,
    "evaluation rows": rows.check_evaluation_rows,
    "prompt": settings.check_prompt,
    "rewards": rows.check_rewards,
    "tags": model.check_tags,
    "special ids": model.check_special_ids,
    "image tokens": model.check_image_tokens,
    "chat template": model.check_template,
    "generation config": model.check_generation_config,
    "disk": machine.check_disk,
    "memory": settings.check_memory,
    "log-prob parity": parity.check_parity,
}
"""In the order of the report."""

BREAKS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    OSError,
    RuntimeError,
    TemplateError,
    TypeError,
    ValueError,
)
"""What a broken model, processor, template, configuration or data set raises."""

_FIXES = {
    "model": "set model.path to a Hugging Face model folder",
    "data": "correct data.path, data.split or the rows named",
}
_STYLES = {"ok": "green", "warning": "yellow", "error": "bold red"}


def diagnose(config: Config, ranks: int) -> list[Finding]:
    """All findings, in order: the model and the data first, if they cannot be read.

    Args:
        config: the run.
        ranks: processes that will train.
    """
    findings: list[Finding] = []

    def load(name: str, action: Callable[[], Value]) -> Value | None:
        try:
            return action()
        except BREAKS as error:
            findings.append(_broken(name, error))
            return None

    with tempfile.TemporaryDirectory(prefix="care-doctor-") as folder:
        samples = load("data", lambda: load_samples(config.data, config.seed)) or []
        loaded = load("model", lambda: _load(config, samples, Path(folder)))
        subject = Subject(config, ranks, loaded, samples)
        findings += [guarded(name, partial(check, subject)) for name, check in CHECKS.items()]
    return [finding for finding in findings if not _follows(finding, findings)]


def guarded(name: str, action: Callable[[], Finding]) -> Finding:
    """A check's finding, or an error in its place where the check itself breaks."""
    try:
        return action()
    except BREAKS as error:
        return _broken(name, error)


def report(findings: Sequence[Finding], seconds: float, *, as_json: bool = False) -> int:
    """Print the findings; the exit status is 1 if any is an error."""
    counts = {level: sum(f.level == level for f in findings) for level in _STYLES}
    if as_json:
        values = {"findings": [asdict(f) for f in findings], "seconds": round(seconds, 1)}
        print(json.dumps(values | counts))
        return int(counts["error"] > 0)
    console = Console(soft_wrap=True, highlight=False)
    width = max(len(finding.name) for finding in findings)
    for finding in findings:
        label = f"[{_STYLES[finding.level]}]{finding.level:<8}[/]"
        console.print(f"{label}{finding.name:<{width}}  ", end="")
        console.print(finding.message, markup=False)
        if finding.fix:
            console.print(f"{'':<{8 + width}}  fix: {finding.fix}", markup=False)
    console.print(
        f"{counts['error']} errors, {counts['warning']} warnings, {counts['ok']} ok in "
        f"{seconds:.1f} s"
    )
    return int(counts["error"] > 0)


def doctor(config: Config, ranks: int | None, *, as_json: bool = False) -> int:
    """`care-train doctor`: returns the exit status."""
    start = time.perf_counter()
    if ranks is None:
        ranks = int(os.environ.get("WORLD_SIZE", 0)) or max(1, torch.cuda.device_count())
    findings = diagnose(config, ranks)
    return report(findings, time.perf_counter() - start, as_json=as_json)


def _load(config: Config, samples: Sequence[Sample], folder: Path) -> LoadedModel:
    """The model as a run would load it; a tiny one is made in `folder`."""
    loaded = load_model(config.model, model_folder(config, folder / "tiny", samples))
    loaded.model.to("cuda" if torch.cuda.is_available() else "cpu")
    return loaded


def _broken(name: str, error: Exception) -> Finding:
    text = " ".join(str(error).split()) or type(error).__name__
    kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
    return Finding("error", name, f"{kind}{text}"[:600], _FIXES.get(name, "see the message"))


def _follows(finding: Finding, findings: Sequence[Finding]) -> bool:
    """Whether it only repeats that the model or the rows could not be read."""
    failed = {f.name for f in findings if f.level == "error"}
    return ("model" in failed and finding.message == "the model could not be loaded") or (
        "data" in failed and finding.message == "the training rows could not be read"
    )
