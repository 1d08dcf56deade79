"""Experiment trackers behind `logging.report_to`; each goes on with its run after a restart."""

import importlib
import importlib.util
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

from care_train.compat import quiet_tensorboard_thread
from care_train.config import LoggingSettings
from care_train.reporting.samples import SampleRecord


class Tracker(Protocol):
    """One place that shows a run."""

    def log(self, phase: str, step: int, values: Mapping[str, float]) -> None:
        """Show a record's numbers."""
        ...

    def samples(self, records: Sequence[SampleRecord], images: Sequence[Any]) -> None:
        """Show completions of one prompt with its images, as PIL has them."""
        ...

    def close(self) -> None:
        """End; nothing is lost."""
        ...


def open_trackers(
    run_dir: Path, settings: LoggingSettings, config: Mapping[str, Any]
) -> list[Tracker]:
    """Those that `logging.report_to` names.

    Args:
        run_dir: the run's folder, which keeps the ids that a restarted run is found by.
        settings: which.
        config: the run's settings, shown beside it.

    Raises:
        ValueError: one is not installed.
    """
    for name in settings.report_to:
        if importlib.util.find_spec(name) is None:
            raise ValueError(
                f"logging.report_to: got {name}, but it is not installed: `pip install {name}`, or "
                "take it off the list"
            )
    return [_KINDS[name](run_dir, settings.project, dict(config)) for name in settings.report_to]


class _TensorBoard:
    """One event folder per phase, so that train and eval share a chart of the same name."""

    def __init__(self, run_dir: Path, project: str, config: dict[str, Any]) -> None:
        self._module = importlib.import_module("torch.utils.tensorboard")
        quiet_tensorboard_thread()
        self._folder = run_dir / "tensorboard"
        self._writers: dict[str, Any] = {}

    def log(self, phase: str, step: int, values: Mapping[str, float]) -> None:
        for key, value in values.items():
            self._writer(phase, step).add_scalar(key, value, step)

    def samples(self, records: Sequence[SampleRecord], images: Sequence[Any]) -> None:
        step = records[0].step
        # Indented by four, Markdown shows it to the letter.
        text = "".join(f"    {line}\n" for line in _text(records).split("\n"))
        self._writer("train", step).add_text("samples", text, step)

    def close(self) -> None:
        for writer in self._writers.values():
            writer.close()

    def _writer(self, phase: str, step: int) -> Any:
        if phase not in self._writers:
            # A run that restarts at an earlier step hides what it is about to write again.
            folder = str(self._folder / phase)
            self._writers[phase] = self._module.SummaryWriter(folder, purge_step=step)
        return self._writers[phase]


class _Wandb:
    """wandb's own step may not go back, and each phase counts from its own start: an axis each."""

    def __init__(self, run_dir: Path, project: str, config: dict[str, Any]) -> None:
        self._module = importlib.import_module("wandb")
        self._run = self._module.init(
            project=project,
            name=run_dir.name,
            dir=str(run_dir),
            id=_kept_id(run_dir / "wandb_id"),
            resume="allow",
            config=config,
        )
        self._phases: set[str] = set()

    def log(self, phase: str, step: int, values: Mapping[str, float]) -> None:
        if phase not in self._phases:
            self._run.define_metric(f"{phase}/*", step_metric=f"{phase}/step")
            self._phases.add(phase)
        self._run.log({f"{phase}/step": step} | _prefixed(phase, values))

    def samples(self, records: Sequence[SampleRecord], images: Sequence[Any]) -> None:
        table = _table(self._module, records, images)
        self._run.log({"train/step": records[0].step, "samples": table})

    def close(self) -> None:
        self._run.finish()


class _Trackio:
    """Found again by the run's name."""

    def __init__(self, run_dir: Path, project: str, config: dict[str, Any]) -> None:
        self._module = importlib.import_module("trackio")
        self._module.init(project=project, name=run_dir.name, config=config, resume="allow")

    def log(self, phase: str, step: int, values: Mapping[str, float]) -> None:
        self._module.log(_prefixed(phase, values), step=step)

    def samples(self, records: Sequence[SampleRecord], images: Sequence[Any]) -> None:
        self._module.log({"samples": _table(self._module, records, images)}, step=records[0].step)

    def close(self) -> None:
        self._module.finish()


class _Mlflow:
    """MLFLOW_TRACKING_URI says where to."""

    def __init__(self, run_dir: Path, project: str, config: dict[str, Any]) -> None:
        self._module = importlib.import_module("mlflow")
        id_file = run_dir / "mlflow_id"
        self._module.set_experiment(project)
        known = id_file.read_text() if id_file.exists() else None
        run = self._module.start_run(run_id=known, run_name=run_dir.name)
        id_file.write_text(run.info.run_id)
        if known is None:
            self._module.log_dict(config, "config.yaml")

    def log(self, phase: str, step: int, values: Mapping[str, float]) -> None:
        self._module.log_metrics(_prefixed(phase, values), step=step)

    def samples(self, records: Sequence[SampleRecord], images: Sequence[Any]) -> None:
        shown = {f"image_{n}": self._module.Image(image) for n, image in enumerate(images, 1)}
        rows = [asdict(record) | shown for record in records]
        table = {name: [row[name] for row in rows] for name in rows[0]}
        self._module.log_table(table, "samples.json")

    def close(self) -> None:
        self._module.end_run()


class _Swanlab:
    """Found again by an id kept in the run's folder."""

    def __init__(self, run_dir: Path, project: str, config: dict[str, Any]) -> None:
        self._module = importlib.import_module("swanlab")
        self._module.init(
            project=project,
            experiment_name=run_dir.name,
            logdir=str(run_dir / "swanlab"),
            id=_kept_id(run_dir / "swanlab_id")[:21],
            resume="allow",
            config=config,
        )

    def log(self, phase: str, step: int, values: Mapping[str, float]) -> None:
        self._module.log(_prefixed(phase, values), step=step)

    def samples(self, records: Sequence[SampleRecord], images: Sequence[Any]) -> None:
        shown = {"images": [self._module.Image(image) for image in images]} if images else {}
        text = self._module.Text(_text(records))
        self._module.log({"samples": text, **shown}, step=records[0].step)

    def close(self) -> None:
        self._module.finish()


_KINDS: Mapping[str, Callable[[Path, str, dict[str, Any]], Tracker]] = {
    "tensorboard": _TensorBoard,
    "wandb": _Wandb,
    "trackio": _Trackio,
    "mlflow": _Mlflow,
    "swanlab": _Swanlab,
}


def _kept_id(file: Path) -> str:
    """The id in `file`, made where there is none yet."""
    if not file.exists():
        file.write_text(uuid.uuid4().hex)
    return file.read_text()


def _table(module: Any, records: Sequence[SampleRecord], images: Sequence[Any]) -> Any:
    """A row each, as wandb's and trackio's tables have it."""
    shown = {"images": [module.Image(image) for image in images]}
    rows = [asdict(record) | shown for record in records]
    return module.Table(columns=list(rows[0]), data=[list(row.values()) for row in rows])


def _text(records: Sequence[SampleRecord]) -> str:
    """The completions one below the other."""
    lines = ("\n".join(f"{k}: {v}" for k, v in asdict(record).items()) for record in records)
    return "\n\n".join(lines)


def _prefixed(phase: str, values: Mapping[str, float]) -> dict[str, float]:
    return {f"{phase}/{key}": value for key, value in values.items()}
