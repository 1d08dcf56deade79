"""Where metrics go besides metrics.jsonl: TensorBoard, Weights & Biases, trackio."""

import importlib
import importlib.util
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from care_train.config import LoggingSettings


class Tracker(Protocol):
    """Takes the numbers of one step of one phase."""

    def log(self, phase: str, step: int, values: Mapping[str, float]) -> None:
        """Record `values`."""
        ...

    def close(self) -> None:
        """Write what is left and let go."""
        ...


def open_trackers(
    run_dir: Path, settings: LoggingSettings, config: Mapping[str, Any]
) -> list[Tracker]:
    """The trackers that `settings` asks for.

    Args:
        run_dir: the run's folder; its name is the run's name.
        settings: which trackers, and the project's name.
        config: the run's settings, shown beside its curves.

    Raises:
        ValueError: one of them is not installed.
    """
    modules = {
        key: _load(key, module)
        for key, module in (
            ("tensorboard", "torch.utils.tensorboard"),
            ("wandb", "wandb"),
            ("trackio", "trackio"),
        )
        if getattr(settings, key)
    }
    trackers: list[Tracker] = []
    if "tensorboard" in modules:
        trackers.append(_TensorBoard(modules["tensorboard"], run_dir / "tensorboard"))
    if "wandb" in modules:
        trackers.append(_Wandb(modules["wandb"], run_dir, settings.project, config))
    if "trackio" in modules:
        trackers.append(_Trackio(modules["trackio"], run_dir.name, settings.project, config))
    return trackers


def _load(package: str, module: str) -> Any:
    """Import `module` of `package` only now: a run that does not ask for it need not have it."""
    if importlib.util.find_spec(package) is None:
        raise ValueError(
            f"logging.{package}: got True, but {package} is not installed. "
            f"Install it with `pip install {package}`, or set logging.{package}=false"
        )
    return importlib.import_module(module)


class _TensorBoard:
    """One event folder per phase, so that train and eval share a chart of the same name."""

    def __init__(self, module: Any, folder: Path) -> None:
        self._module = module
        self._folder = folder
        self._writers: dict[str, Any] = {}

    def log(self, phase: str, step: int, values: Mapping[str, float]) -> None:
        if phase not in self._writers:
            # A run that restarts at an earlier step hides what it is about to write again.
            self._writers[phase] = self._module.SummaryWriter(
                str(self._folder / phase), purge_step=step
            )
        for key, value in values.items():
            self._writers[phase].add_scalar(key, value, step)

    def close(self) -> None:
        for writer in self._writers.values():
            writer.close()


class _Wandb:
    """One run, found again after a restart by the id kept in the run's folder."""

    def __init__(self, module: Any, run_dir: Path, project: str, config: Mapping[str, Any]) -> None:
        id_file = run_dir / "wandb_id"
        if not id_file.exists():
            id_file.write_text(uuid.uuid4().hex)
        self._run = module.init(
            project=project,
            name=run_dir.name,
            dir=str(run_dir),
            id=id_file.read_text(),
            resume="allow",
            config=dict(config),
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

    def __init__(self, module: Any, name: str, project: str, config: Mapping[str, Any]) -> None:
        self._module = module
        module.init(project=project, name=name, config=dict(config), resume="allow")

    def log(self, phase: str, step: int, values: Mapping[str, float]) -> None:
        self._module.log(_prefixed(phase, values), step=step)

    def close(self) -> None:
        self._module.finish()


def _prefixed(phase: str, values: Mapping[str, float]) -> dict[str, float]:
    return {f"{phase}/{key}": value for key, value in values.items()}
