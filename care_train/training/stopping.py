"""Stop on request: SIGTERM or SIGINT lets the step end and be saved; a second one kills."""

import os
import signal
import threading
import time
from pathlib import Path
from types import FrameType
from typing import Any, Self

import torch

from care_train.distributed import all_max, is_main

STOPPED_STATUS = 75
"""Exit status of a run that was asked to stop, saved a checkpoint and can go on (EX_TEMPFAIL)."""

_SAME_REQUEST = 1.0
"""Seconds within which signals count as one: a launcher may pass on what the terminal also sent."""


class Stopped(Exception):  # noqa: N818
    """The run saved a checkpoint and ends before its last step, as it was asked to."""

    def __init__(self, signal_number: int, step: int, last: int, run_dir: Path, saved: Path):
        name = signal.Signals(signal_number).name
        super().__init__(f"{name}: stopped after step {step} of {last}, saved {saved}")
        self.run_dir = run_dir


class StopSignals:
    """Notes SIGTERM and SIGINT while the `with` block runs; ranks ask together."""

    def __init__(self) -> None:
        self._first = 0
        self._time = 0.0
        self._before: dict[int, Any] = {}

    def requested(self, device: torch.device) -> int:
        """The signal that any rank received, or 0; every rank must ask at the same point."""
        return all_max(self._first, device)

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, _: FrameType | None) -> None:
        now = time.monotonic()
        if self._first and now - self._time > _SAME_REQUEST:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        elif not self._first:
            self._first, self._time = number, now
            if is_main():
                name = signal.Signals(number).name
                text = f"\n{name}: stopping after this step; once more ends the run at once\n"
                os.write(2, text.encode())
