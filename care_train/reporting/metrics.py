"""The numbers of a run: metrics.jsonl, and on request experiment trackers."""

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from care_train.config import LoggingSettings
from care_train.reporting.files import JsonlWriter, read_jsonl
from care_train.reporting.samples import SampleRecord
from care_train.reporting.trackers import Tracker, open_trackers

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
        self.observers: list[Callable[[str, int, Mapping[str, float]], None]] = []
        """Called on every rank with phase, step and values of each record."""
        self._file: JsonlWriter | None = None
        self._trackers: list[Tracker] = []
        if enabled:
            run_dir.mkdir(parents=True, exist_ok=True)
            self._trackers = open_trackers(run_dir, settings, config)
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
        """Show completions of one prompt in the trackers.

        Args:
            records: the completions.
            images: makes the prompt's images; called where there are trackers.
        """
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
