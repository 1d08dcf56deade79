"""What a Python program hands to a run in place of files: rows, reward functions, callbacks."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import TrainerControl, TrainerState

from care_train.config import Config
from care_train.data import Rows
from care_train.distributed import all_max, is_main


class Callbacks:
    """transformers' `TrainerCallback` objects, told on every rank what a run does."""

    def __init__(self, callbacks: Sequence[Any] = ()) -> None:
        self._callbacks = [one() if isinstance(one, type) else one for one in callbacks]
        self._arguments: dict[str, Any] = {}
        self.state, self.control = TrainerState(), TrainerControl()

    def begin(self, config: Config, num_steps: int, first_step: int, model: Any) -> None:
        """Training begins: `on_train_begin`.

        Args:
            config: the run's settings, which callbacks get as `args`.
            num_steps: of the whole run.
            first_step: steps done before, where the run goes on.
            model: the one that is trained.
        """
        self._arguments = {"args": config, "model": model}
        self.state = TrainerState(
            global_step=first_step,
            max_steps=num_steps,
            is_local_process_zero=is_main(),
            is_world_process_zero=is_main(),
        )
        self.control = TrainerControl()
        self._tell("on_train_begin")

    def observe(self, phase: str, step: int, values: Mapping[str, float]) -> None:
        """A step or an evaluation has been logged: `on_step_end` and `on_log`, or `on_evaluate`."""
        if not self._arguments:  # a cold start's
            return
        self.state.global_step = step
        self.state.log_history.append({**values, "step": step})
        if phase == "eval":
            self._tell("on_evaluate", metrics=dict(values))
        else:
            self._tell("on_step_end")
            self._tell("on_log", logs=dict(values))

    def want_stop(self, device: torch.device) -> bool:
        """Whether any rank's `control.should_training_stop` is set; a collective of all ranks."""
        asked = bool(self._callbacks) and self.control.should_training_stop
        return bool(self._callbacks) and bool(all_max(int(asked), device))

    def saved(self) -> None:
        """A checkpoint has been written: `on_save`."""
        self._tell("on_save")

    def end(self) -> None:
        """The run is over: `on_train_end`."""
        self._tell("on_train_end")
        self.release()

    def release(self) -> None:
        """Hold the model no longer."""
        self._arguments = {}

    def _tell(self, event: str, **values: Any) -> None:
        for one in self._callbacks:
            known = {**self._arguments, "state": self.state, "control": self.control, **values}
            control = getattr(one, event)(**known)
            self.control = self.control if control is None else control


@dataclass(frozen=True)
class Given:
    """What a Python program hands to a run; the command line, nothing."""

    rows: Mapping[str, Rows] = field(default_factory=dict)
    """By the path that stands for them in the settings."""
    rewards: Mapping[str, Callable[..., Any]] = field(default_factory=dict)
    """By the function that stands for them in `reward.functions`."""
    callbacks: Callbacks = field(default_factory=Callbacks)
    in_program: bool = False
    """The run is a part of a program, a notebook's say, which must survive its errors."""
