"""The loop of steps, which reinforcement learning and the cold start share."""

import gc
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from care_train.data import Sample
from care_train.distributed import is_main
from care_train.reporting import MetricsLogger, TrainProgress
from care_train.training.checkpoint import Checkpoint, Checkpoints, save_model
from care_train.training.engine import PolicyEngine
from care_train.training.failures import Stopped
from care_train.training.guard import StopSignals
from care_train.training.resume import check_identity, identity, log_sizes
from care_train.training.session import Session
from care_train.training.timer import at_step


class StepLoop(ABC):
    """Steps in order, each with its log line and with what is due after it.

    A subclass sets `num_steps`, `checkpoints`, `engine` and `totals`.
    """

    phase: str
    """What log lines are marked with."""
    title: str
    """Above the progress."""
    data_key: str
    """The setting that names the rows' file."""
    num_steps: int
    checkpoints: Checkpoints
    engine: PolicyEngine
    totals: dict[str, float]
    """What the run reports at its end."""
    first_step: int = 0
    owes_evaluation: bool = False
    """Whether the evaluation after the last step is still to be made, as where a run was stopped
    before it."""

    def __init__(
        self,
        session: Session,
        samples: Sequence[Sample],
        run_dir: Path,
        metrics: MetricsLogger,
        device: torch.device,
    ) -> None:
        """Take note of what the run is made of, before the engine shards the model; `samples` are
        the stage's rows, by which a resumed run is recognised."""
        self.session, self.config = session, session.config
        self.run_dir, self.metrics, self.device = run_dir, metrics, device
        self._identity = identity(self.config, samples, session.loaded.model)

    @abstractmethod
    def restore(self, state: Mapping[str, Any], own: Mapping[str, Any]) -> None:
        """Be where `save` was called with `state`, and on this rank with `own`; engine and
        generators are already."""

    @abstractmethod
    def step(self, step: int) -> dict[str, float]:
        """Make a step, counted from 0; its metrics."""

    @abstractmethod
    def after_step(self, done: int, signals: StopSignals) -> None:
        """Evaluate and save what is due after `done` steps.

        Raises:
            Stopped: a signal asked for it; a checkpoint is saved.
            NoSignalError: the steps so far had nothing to learn from.
        """

    def train(
        self, folder: Path, checkpoint: Checkpoint | None, started: Callable[[], None]
    ) -> dict[str, float]:
        """Go on from `checkpoint`, its logs cut to it already, make the steps that are left, and
        save the model to `folder`. `started` is called before the first step.

        Returns:
            `totals`.

        Raises:
            ValueError: the rows or the first weights are not those of the checkpoint's run.
            Stopped: a signal asked for it; a checkpoint is saved.
        """
        if checkpoint is not None:
            check_identity(checkpoint, self._identity, self.data_key, self.config)
            self.first_step = checkpoint.step
            self.restore(checkpoint.state, checkpoint.restore(self.engine))
        started()
        self._run()
        with at_step(self.num_steps, self.num_steps, self.run_dir):
            save_model(self.engine, folder)
        self.engine.close()
        return self.totals

    def _run(self) -> None:
        display = TrainProgress(self.num_steps, is_main(), self.title, start_step=self.first_step)
        callbacks, in_program = self.session.given.callbacks, self.session.given.in_program
        signals = StopSignals(in_program=in_program)
        with few_collections(), signals, display as self.progress:
            if self.owes_evaluation:
                with at_step(self.first_step, self.num_steps, self.run_dir):
                    self.after_step(self.first_step, signals)
            done = self.first_step
            while done < self.num_steps:  # which a step or a callback may lower to the steps done
                with at_step(done + 1, self.num_steps, self.run_dir):
                    values = self.step(done)
                    done += 1
                    self.metrics.log(done, values, phase=self.phase)
                    self.progress.update(done, values)
                    if callbacks.want_stop(self.device):
                        self.num_steps = done
                    self.after_step(done, signals)

    def save(
        self,
        done: int,
        state: Mapping[str, Any],
        stop: int,
        scores: Mapping[str, float] | None = None,
        own: Mapping[str, Any] | None = None,
    ) -> None:
        """Write a checkpoint after `done` steps; end the run where a signal, `stop`, asked for it.

        Args are those of `Checkpoints.save`; `state` is what `restore` needs beside the engine's.

        Raises:
            Stopped: `stop` is not 0.
        """
        state = self._identity | {"step": done, "logs": log_sizes(self.run_dir)} | dict(state)
        saved = self.checkpoints.save(self.engine, state, scores, own)
        self.session.given.callbacks.saved()
        if stop:
            raise Stopped(stop, done, self.num_steps, self.run_dir, saved)


@contextmanager
def few_collections() -> Iterator[None]:
    """Take what lives now out of Python's garbage collection.

    Libraries, model and rows are some 600,000 objects, and a collection that looks at all of them
    every few steps takes as long as a part of a step; the steps' own garbage is collected still.
    """
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def is_due(step: int, every: int, last: int) -> bool:
    """Whether a step is one of every `every` before the last, which has its own turn."""
    return every > 0 and step % every == 0 and step != last
