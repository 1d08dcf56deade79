"""The numbers of a run: metrics.jsonl, and TensorBoard, Weights & Biases or trackio on request."""

import importlib
import importlib.util
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, Self

from care_train.config import LoggingSettings
from care_train.reporting.files import JsonlWriter, read_jsonl

METRICS_FILE = "metrics.jsonl"
_RESERVED = ("phase", "step", "time")


class MetricsLogger:
    """Writes each step's numbers to every place that wants them."""

    def __init__(
        self,
        run_dir: Path,
        settings: LoggingSettings,
        config: Mapping[str, Any],
        enabled: bool = True,
    ) -> None:
        """Open metrics.jsonl for appending, and the trackers.

        Args:
            run_dir: the run's folder; created.
            settings: which trackers.
            config: the run's settings, for the trackers that show them.
            enabled: False writes nothing (every rank but the first).

        Raises:
            ValueError: a tracker that the settings ask for is not installed.
        """
        self._file: JsonlWriter | None = None
        self._trackers: list[_Tracker] = []
        if enabled:
            run_dir.mkdir(parents=True, exist_ok=True)
            self._trackers = _open_trackers(run_dir, settings, config)
            self._file = JsonlWriter(run_dir / METRICS_FILE)

    def log(self, step: int, values: Mapping[str, float], phase: str = "train") -> None:
        """Record one step.

        Args:
            step: the step just done, counted within its phase.
            values: numbers by name; NaN and infinities become null in metrics.jsonl.
            phase: train | eval | sft.

        Raises:
            ValueError: a name is one that every record has already.
        """
        if taken := [key for key in _RESERVED if key in values]:
            raise ValueError(f"values: got the reserved name {taken[0]!r}")
        if self._file is None:
            return
        numbers = {
            key: value if isinstance(value, int) else float(value) for key, value in values.items()
        }
        self._file.write({"phase": phase, "step": step, "time": time.time(), **numbers})
        for tracker in self._trackers:
            tracker.log(phase, step, numbers)

    def close(self) -> None:
        """Close every place; closing twice is fine."""
        if self._file is not None:
            self._file.close()
            self._file = None
            for tracker in self._trackers:
                tracker.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a metrics.jsonl, the last one of each phase and step.

    A run that restarts at an earlier step logs some steps again: the later record counts and
    takes the earlier one's place in the order.

    Args:
        path: the file.

    Raises:
        ValueError: a line other than a cut last one is bad; the message names file and line.
    """
    records: dict[tuple[str, int], dict[str, Any]] = {}
    for number, record in enumerate(read_jsonl(path), start=1):
        if missing := [key for key in ("phase", "step") if key not in record]:
            raise ValueError(f"{path}:{number}: no {missing[0]!r}")
        records[record["phase"], record["step"]] = record
    return list(records.values())


class _Tracker(Protocol):
    def log(self, phase: str, step: int, values: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


def _open_trackers(
    run_dir: Path, settings: LoggingSettings, config: Mapping[str, Any]
) -> list[_Tracker]:
    kinds = {"tensorboard": _TensorBoard, "wandb": _Wandb, "trackio": _Trackio}
    for name in settings.report_to:
        if importlib.util.find_spec(name) is None:
            raise ValueError(
                f"logging.report_to: got {name}, but it is not installed: `pip install {name}`, or "
                "take it off the list"
            )
    return [kinds[name](run_dir, settings.project, dict(config)) for name in settings.report_to]


class _TensorBoard:
    """One event folder per phase, so that train and eval share a chart of the same name."""

    def __init__(self, run_dir: Path, project: str, config: dict[str, Any]) -> None:
        self._module = importlib.import_module("torch.utils.tensorboard")
        self._folder = run_dir / "tensorboard"
        self._writers: dict[str, Any] = {}

    def log(self, phase: str, step: int, values: Mapping[str, float]) -> None:
        if phase not in self._writers:
            # A run that restarts at an earlier step hides what it is about to write again.
            folder = str(self._folder / phase)
            self._writers[phase] = self._module.SummaryWriter(folder, purge_step=step)
        for key, value in values.items():
            self._writers[phase].add_scalar(key, value, step)

    def close(self) -> None:
        for writer in self._writers.values():
            writer.close()


class _Wandb:
    """One run, found again after a restart by the id kept in the run's folder."""

    def __init__(self, run_dir: Path, project: str, config: dict[str, Any]) -> None:
        id_file = run_dir / "wandb_id"
        if not id_file.exists():
            id_file.write_text(uuid.uuid4().hex)
        self._run = importlib.import_module("wandb").init(
            project=project,
            name=run_dir.name,
            dir=str(run_dir),
            id=id_file.read_text(),
            resume="allow",
            config=config,
        )
        self._phases: set[str] = set()

    def log(self, phase: str, step: int, values: Mapping[str, float]) -> None:
        if phase not in self._phases:
            # wandb's own step may not go back, and each phase counts from its own start.
            self._run.define_metric(f"{phase}/*", step_metric=f"{phase}/step")
            self._phases.add(phase)
        self._run.log({f"{phase}/step": step} | _prefixed(phase, values))

    def close(self) -> None:
        self._run.finish()


class _Trackio:
    """One run, found again after a restart by its name."""

    def __init__(self, run_dir: Path, project: str, config: dict[str, Any]) -> None:
        self._module = importlib.import_module("trackio")
        self._module.init(project=project, name=run_dir.name, config=config, resume="allow")

    def log(self, phase: str, step: int, values: Mapping[str, float]) -> None:
        self._module.log(_prefixed(phase, values), step=step)

    def close(self) -> None:
        self._module.finish()


def _prefixed(phase: str, values: Mapping[str, float]) -> dict[str, float]:
    return {f"{phase}/{key}": value for key, value in values.items()}
