"""What the page reads of a run's folder, and which runs are seeds of one configuration."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from care_train.config import Role, dotted, role_of
from care_train.config.yaml_file import read_yaml
from care_train.reporting.archive import ARCHIVE
from care_train.reporting.files import read_json
from care_train.reporting.metrics import METRICS_FILE, read_metrics

_OF_A_SEED = ("seed", "name")


@dataclass(frozen=True)
class Run:
    """A run's folder, as far as the page shows it."""

    folder: Path
    settings: Mapping[str, Any]
    """Its configuration, by dotted key; empty where it has none."""
    config_yaml: str
    summary: Mapping[str, Any]
    """Facts and scores; empty before the run has ended."""
    records: Sequence[Mapping[str, Any]]

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def tags(self) -> tuple[str, str]:
        """Names of the rationale's and the answer's tags."""
        think, answer = self.settings.get("prompt.tags") or ("think", "answer")
        return think, "answer" if answer == "boxed" else answer


def read_run(folder: Path) -> Run:
    """What is there of a run, which may still be going on; a lone evaluation has no metrics.

    Raises:
        ValueError: `folder` holds no run's metrics or archive, or a file of it is damaged.
    """
    metrics = folder / METRICS_FILE
    if not (metrics.is_file() or (folder / ARCHIVE).is_dir()):
        raise ValueError(f"{folder}: got no {METRICS_FILE}, wanted the folder of a run")
    config, summary = folder / "config.yaml", folder / "summary.json"
    settings = read_yaml(config, lambda name: False) if config.is_file() else {}
    return Run(
        folder=folder.resolve(),
        settings=dotted(settings),
        config_yaml=config.read_text(encoding="utf-8") if settings else "",
        summary=read_json(summary) if summary.is_file() else {},
        records=read_metrics(metrics) if metrics.is_file() else [],
    )


def conditions(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """`runs` that differ in their seed alone, each one curve with a band, by the curve's label."""
    found: dict[str, list[Run]] = {}
    for run in runs:
        found.setdefault(repr(_deciding(run)), []).append(run)
    labels = [_label(group) for group in found.values()]
    # Two labels alike would be one curve to a reader.
    return {
        label if labels.count(label) == 1 else f"{label} [{group[0].name}]": group
        for label, group in zip(labels, found.values(), strict=True)
    }


def differences(runs: Sequence[Run]) -> dict[str, list[Any]]:
    """The settings that are not the same in all `runs`: a value per run, None where unset."""
    keys = {key: None for run in runs for key in run.settings}
    values = {key: [run.settings.get(key) for run in runs] for key in keys}
    return {key: each for key, each in values.items() if any(one != each[0] for one in each)}


def _label(runs: Sequence[Run]) -> str:
    if len(runs) == 1:
        return runs[0].name
    name = re.sub(r"[-_. ]*(seed)?[-_. ]*\d+$", "", runs[0].name)
    steps = {max((one["step"] for one in run.records), default=0) for run in runs}
    # Their curve ends where the first of them does.
    end = f" to step {min(steps)}" if len(steps) > 1 else ""
    return f"{name or runs[0].settings.get('algorithm', 'runs')}, {len(runs)} seeds{end}"


def _deciding(run: Run) -> list[tuple[str, Any]]:
    """The settings that decide what the run computes, without those of a seed."""
    if not run.settings:
        return [("folder", str(run.folder))]
    return [
        (key, value)
        for key, value in sorted(run.settings.items())
        if key not in _OF_A_SEED and _decides(key)
    ]


def _decides(key: str) -> bool:
    try:
        return role_of(key) is not Role.FREE
    except ValueError:  # A setting of another version, or an entry of one that is a mapping.
        return True
