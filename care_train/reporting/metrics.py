"""The numbers of a run: metrics.jsonl, and on request experiment trackers."""

import importlib
import importlib.util
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Self

from care_train.compat import quiet_tensorboard_thread
from care_train.config import LoggingSettings
from care_train.reporting.files import JsonlWriter, read_jsonl
from care_train.reporting.text import SampleRecord

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
        """Open metrics.jsonl for appending, and the trackers, which show `config`.

        Without `enabled` (on every rank but the first) nothing is written.

        Raises:
            ValueError: a tracker that the settings ask for is not installed.
        """
        self.observers: list[Callable[[str, int, Mapping[str, float]], None]] = []
        """Called on every rank with phase, step and values of each record."""
        self._file: JsonlWriter | None = None
        self._trackers: list[Tracker] = []
        if enabled:
            run_dir.mkdir(parents=True, exist_ok=True)
            self._trackers = _open_trackers(run_dir, settings, dict(config))
            self._file = JsonlWriter(run_dir / METRICS_FILE)

    def log(self, step: int, values: Mapping[str, float], phase: str = "train") -> None:
        """Record the numbers of a step, counted within its phase: train | eval | sft.

        NaN and infinities become null in metrics.jsonl.

        Raises:
            ValueError: a name is one that every record has already.
        """
        if taken := [key for key in _RESERVED if key in values]:
            raise ValueError(f"values: got the reserved name {taken[0]!r}")
        numbers = {
            key: value if isinstance(value, int) else float(value) for key, value in values.items()
        }
        if self._file is not None:
            self._file.write({"phase": phase, "step": step, "time": time.time(), **numbers})
            for tracker in self._trackers:
                tracker.log(phase, step, numbers)
        for observe in self.observers:
            observe(phase, step, numbers)

    def samples(self, records: Sequence[SampleRecord], images: Callable[[], Sequence[Any]]) -> None:
        """Show completions of one prompt in the trackers; `images` makes the prompt's images."""
        shown = images() if self._trackers else ()
        for tracker in self._trackers:
            tracker.samples(records, shown)

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

    Raises:
        ValueError: a line other than a cut last one is bad; the message names file and line.
    """
    records: dict[tuple[str, int], dict[str, Any]] = {}
    for number, record in enumerate(read_jsonl(path), start=1):
        if missing := [key for key in ("phase", "step") if key not in record]:
            raise ValueError(f"{path}:{number}: no {missing[0]!r}")
        records[record["phase"], record["step"]] = record
    return list(records.values())


class Tracker:
    """One place that shows a run; it goes on with the same run after a restart."""

    def __init__(self, package: str, **init: Any) -> None:
        self._module = importlib.import_module(package)
        if init:
            self._run = self._module.init(**init, resume="allow")

    def log(self, phase: str, step: int, values: Mapping[str, float]) -> None:
        """Show a record's numbers."""
        self._module.log(_prefixed(phase, values), step=step)

    def samples(self, records: Sequence[SampleRecord], images: Sequence[Any]) -> None:
        """Show completions of one prompt with its images, as PIL has them."""
        self._module.log({"samples": self._table(records, images)}, step=records[0].step)

    def close(self) -> None:
        """End; nothing is lost."""
        self._module.finish()

    def _table(self, records: Sequence[SampleRecord], images: Sequence[Any]) -> Any:
        """A row each, as wandb's and trackio's tables have it."""
        shown = {"images": [self._module.Image(image) for image in images]}
        rows = [asdict(record) | shown for record in records]
        return self._module.Table(columns=list(rows[0]), data=[list(row.values()) for row in rows])


class _TensorBoard(Tracker):
    """One event folder per phase, so that train and eval share a chart of the same name."""

    def __init__(self, run_dir: Path, project: str, config: dict[str, Any]) -> None:
        super().__init__("torch.utils.tensorboard")
        quiet_tensorboard_thread()
        self._folder = run_dir / "tensorboard"
        self._writers: dict[str, Any] = {}

    def log(self, phase: str, step: int, values: Mapping[str, float]) -> None:
        for key, value in values.items():
            self._writer(phase, step).add_scalar(key, value, step)

    def samples(self, records: Sequence[SampleRecord], images: Sequence[Any]) -> None:
        # Indented by four, Markdown shows it to the letter.
        text = "".join(f"    {line}\n" for line in _text(records).split("\n"))
        step = records[0].step
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


class _Wandb(Tracker):
    """wandb's own step may not go back, and each phase counts from its own start: an axis each."""

    def __init__(self, run_dir: Path, project: str, config: dict[str, Any]) -> None:
        super().__init__(
            "wandb",
            project=project,
            name=run_dir.name,
            dir=str(run_dir),
            id=_kept_id(run_dir / "wandb_id"),
            config=config,
        )
        self._phases: set[str] = set()

    def log(self, phase: str, step: int, values: Mapping[str, float]) -> None:
        if phase not in self._phases:
            self._run.define_metric(f"{phase}/*", step_metric=f"{phase}/step")
            self._phases.add(phase)
        self._run.log({f"{phase}/step": step} | _prefixed(phase, values))

    def samples(self, records: Sequence[SampleRecord], images: Sequence[Any]) -> None:
        table = self._table(records, images)
        self._run.log({"train/step": records[0].step, "samples": table})


class _Trackio(Tracker):
    """Found again by the run's name."""

    def __init__(self, run_dir: Path, project: str, config: dict[str, Any]) -> None:
        super().__init__("trackio", project=project, name=run_dir.name, config=config)


class _Mlflow(Tracker):
    """MLFLOW_TRACKING_URI says where to."""

    def __init__(self, run_dir: Path, project: str, config: dict[str, Any]) -> None:
        super().__init__("mlflow")
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
        columns = {name: [row[name] for row in rows] for name in rows[0]}
        self._module.log_table(columns, "samples.json")

    def close(self) -> None:
        self._module.end_run()


class _Swanlab(Tracker):
    """Found again by an id kept in the run's folder."""

    def __init__(self, run_dir: Path, project: str, config: dict[str, Any]) -> None:
        super().__init__(
            "swanlab",
            project=project,
            experiment_name=run_dir.name,
            logdir=str(run_dir / "swanlab"),
            id=_kept_id(run_dir / "swanlab_id")[:21],
            config=config,
        )

    def samples(self, records: Sequence[SampleRecord], images: Sequence[Any]) -> None:
        shown = {"images": [self._module.Image(image) for image in images]} if images else {}
        text = self._module.Text(_text(records))
        self._module.log({"samples": text, **shown}, step=records[0].step)


_KINDS: Mapping[str, Callable[[Path, str, dict[str, Any]], Tracker]] = {
    "tensorboard": _TensorBoard,
    "wandb": _Wandb,
    "trackio": _Trackio,
    "mlflow": _Mlflow,
    "swanlab": _Swanlab,
}


def _open_trackers(
    run_dir: Path, settings: LoggingSettings, config: dict[str, Any]
) -> list[Tracker]:
    for name in settings.report_to:
        if importlib.util.find_spec(name) is None:
            raise ValueError(
                f"logging.report_to: got {name}, but it is not installed: `pip install {name}`, or "
                "take it off the list"
            )
    return [_KINDS[name](run_dir, settings.project, config) for name in settings.report_to]


def _kept_id(file: Path) -> str:
    """The id in `file`, made where there is none yet."""
    if not file.exists():
        file.write_text(uuid.uuid4().hex)
    return file.read_text()


def _text(records: Sequence[SampleRecord]) -> str:
    """The completions one below the other."""
    lines = ("\n".join(f"{k}: {v}" for k, v in asdict(record).items()) for record in records)
    return "\n\n".join(lines)


def _prefixed(phase: str, values: Mapping[str, float]) -> dict[str, float]:
    return {f"{phase}/{key}": value for key, value in values.items()}
