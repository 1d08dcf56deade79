"""The Python door: a run on a program's own rows, reward functions and callbacks."""

import gc
import json
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch

from care_train.commands import load_held_out, run_command
from care_train.config import (
    FROM_PYTHON,
    Config,
    DataSettings,
    HubSettings,
    RewardFunctionSettings,
    merge_config,
)
from care_train.data import Rows
from care_train.distributed import initialize_process_group, is_main
from care_train.evaluation.evaluate import evaluate_both
from care_train.models.tiny import model_folder
from care_train.publishing import Summary, claim, publish
from care_train.training.checkpoint import seed_all
from care_train.training.folders import write_folder
from care_train.training.run_folder import on_main, run_dir_of
from care_train.training.session import Callbacks, Given, open_session, usable_rows

Reward = Callable[..., Any] | str


class CareConfig(Config):
    """The settings of a run, under the names of the command line (`care-train train --help-all`).

    What is left out is the file's, or the algorithm's and the preset's:
    `CareConfig(algorithm="grpo", train={"steps": 100}, rollout={"group_size": 8})`.
    """

    def __init__(self, file: str | Path | None = None, /, **settings: Any) -> None:
        """Read and check.

        Args:
            file: a YAML file, or the name of a shipped one, such as `care`.
            settings: laid over the file's; a section is a mapping.

        Raises:
            ValueError: an unknown key or a wrong value: key, got and wanted.
        """
        config = merge_config(file, settings)
        for one in fields(Config):
            object.__setattr__(self, one.name, getattr(config, one.name))


class CareTrainer:
    """Trains a model on rows with rewards; in a notebook, a script, or a script under a launcher.

    Errors are exceptions (`ValueError` for what a user can correct, `RunError` where a run cannot
    go on), after which the process and other trainers in it go on. SIGINT and SIGTERM end the
    current step, save a checkpoint and raise `Stopped`; `train(resume=True)` goes on from it.
    """

    def __init__(
        self,
        model: str | None = None,
        reward_funcs: Reward | Sequence[Reward] = (),
        config: Config | Mapping[str, Any] | str | Path | None = None,
        train_dataset: Rows | None = None,
        eval_dataset: Rows | None = None,
        callbacks: Sequence[Any] = (),
    ) -> None:
        """Check the settings; nothing is loaded or written yet.

        Args:
            model: a folder, a model of the Hub or a tiny model's name; None: `config.model.path`.
            reward_funcs: callables in the form of TRL, EasyR1 or verl, called in this process, or
                `file.py:function`, called in one of its own. Their results, in [0, 1], are the
                accuracy; `reward.functions` in the settings gives one that has its name, such as
                `python:accuracy`, another weight or target. None: the verifier alone.
            config: the settings, as `CareConfig`, a mapping of them, or a YAML file.
            train_dataset: rows, as docs/data.md says; None: those of `config.data`.
            eval_dataset: held-out rows; None: those of `config.eval.data`, or of shipped data.
            callbacks: transformers' `TrainerCallback` objects or classes. `args` is the
                `CareConfig`; of `control`, `should_training_stop` is heeded.

        Raises:
            ValueError: a wrong setting, or rewards that cannot be told apart.
        """
        if not isinstance(config, Config):
            is_mapping = isinstance(config, Mapping)
            config = CareConfig(**config) if is_mapping else CareConfig(config)
        changes: dict[str, Any] = {}
        if model is not None:
            changes["model"] = replace(config.model, path=str(model))
        rows: dict[str, Rows] = {}
        if train_dataset is not None:
            path = f"{FROM_PYTHON}train_dataset"
            rows[path] = train_dataset
            changes["data"] = replace(config.data, path=path)
        if eval_dataset is not None:
            path = f"{FROM_PYTHON}eval_dataset"
            rows[path] = eval_dataset
            changes["eval"] = replace(config.eval, data=path)
        if callable(reward_funcs) or isinstance(reward_funcs, str):
            reward_funcs = [reward_funcs]
        rewards = _named(reward_funcs)
        changes["reward"] = _with_functions(config, rewards)
        # At once: what holds of some of them alone need not hold of all.
        self.config = replace(config, **changes)
        """The resolved settings."""
        given = {name: one for name, one in rewards.items() if callable(one)}
        self._given = Given(rows, given, Callbacks(callbacks), in_program=True)

    @property
    def run_dir(self) -> Path:
        """Where the run writes; docs/python.md lists what."""
        return run_dir_of(self.config)

    def cold_start(self, dataset: Rows | None = None) -> Summary:
        """Teach the tags and the way of reasoning first (Sec. 4.1); `train` then begins there.

        It is a run of its own, `NAME-cold-start`, under the settings of `sft`.

        Args:
            dataset: rows with a `rationale`; None: those of `sft.data`.

        Raises:
            ValueError: as `train`; or no row has a rationale.
        """
        config, rows = replace(self.config, name=f"{self.config.name}-cold-start"), {}
        if dataset is not None:
            rows = {f"{FROM_PYTHON}cold_start": dataset}
            data = DataSettings(path=f"{FROM_PYTHON}cold_start")
            config = replace(config, sft=replace(config.sft, data=data))
        summary = self._run("sft", config, replace(self._given, rows=rows))
        learnt = str(run_dir_of(config) / "final")
        self.config = replace(self.config, model=replace(self.config.model, path=learnt))
        return summary

    def train(self, *, resume: bool = False) -> Summary:
        """Train, evaluated before and after where there are held-out rows; returns summary.json.

        Args:
            resume: go on from the newest checkpoint of the run of this name, if there is one.

        Raises:
            Stopped: a signal asked for it; a checkpoint is saved.
            ValueError: settings, rows or a model that cannot be used; the run's name is taken.
            RunError: the run cannot go on.
        """
        return self._run("train", replace(self.config, resume=resume), self._given)

    def evaluate(self) -> dict[str, float]:
        """Score the trained model, or before training `model`, on the held-out rows.

        Returns:
            `accuracy` and `format` at the training temperature, `greedy_accuracy` and
            `greedy_format`, and `num_questions`.

        Raises:
            ValueError: no held-out rows, or some that cannot be used.
        """
        if self.config.held_out is None:
            raise ValueError("eval.data: got none, wanted held-out rows: give eval_dataset")
        config, given, final = self.config, self._given, self.run_dir / "final"
        device = initialize_process_group()
        seed_all(config.seed)
        held_out = load_held_out(config, given)
        with tempfile.TemporaryDirectory(prefix="care-eval-") as temporary:
            base = Path(temporary) / "base"
            folder = final if final.is_dir() else model_folder(config, base, held_out)
            session = open_session(config, folder, device, given)
        usable_rows(session, held_out, "eval.data")
        engine = session.rollout_engine()
        return evaluate_both(session, engine, held_out, device)

    def save_model(self, folder: str | Path) -> None:
        """Copy the trained model, a plain Hugging Face folder, with LoRA's adapters merged.

        Raises:
            ValueError: nothing is trained yet, or `folder` exists.
        """
        final, folder = self._final(), Path(folder)
        if folder.exists():
            raise ValueError(f"save_model: {folder} exists; choose another folder")

        def copy(partial: Path) -> None:
            if is_main():
                shutil.copytree(final, partial, dirs_exist_ok=True)

        write_folder(folder, copy)

    def push_to_hub(self, repo: str, *, private: bool = True) -> str:
        """Upload the trained model with a card that is written from the run; the commit's address.

        Args:
            repo: `ORG/NAME`.
            private: whether a new repository is.

        Raises:
            ValueError: nothing is trained yet, no token that may write there, or no network.
        """
        config = replace(self.config, hub=HubSettings(push_to=repo))
        summary = json.loads((self._final().parent / "summary.json").read_text())

        def upload() -> str:
            claim(config, private=private)
            return publish(self.run_dir, config, summary)

        return on_main(upload)

    def _final(self) -> Path:
        final = self.run_dir / "final"
        if not final.is_dir():
            raise ValueError(f"{final}: got no such folder, wanted a trained model: train first")
        return final

    def _run(self, command: str, config: Config, given: Given) -> Summary:
        try:
            return run_command(command, config, {}, given)
        finally:
            given.callbacks.release()
            # DeepSpeed's engine is a cycle: until it is collected its memory is not free.
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()


def _named(rewards: Sequence[Reward]) -> dict[str, Reward]:
    """Each reward by what stands for it in `reward.functions`."""
    named: dict[str, Reward] = {}
    for number, one in enumerate(rewards, start=1):
        if not callable(one) and not isinstance(one, str):
            raise ValueError(
                f"reward_funcs: got a {type(one).__name__}, wanted a callable or 'file.py:function'"
            )
        name = one if isinstance(one, str) else getattr(one, "__name__", type(one).__name__)
        if callable(one):
            name = f"{FROM_PYTHON}{name if name.isidentifier() else f'reward_{number}'}"
        if name in named:
            raise ValueError(f"reward_funcs: got two called {name}, wanted different names")
        named[name] = one
    return named


def _with_functions(config: Config, rewards: Mapping[str, Reward]) -> Any:
    """`config.reward` with an entry for each reward, its own where there is one."""
    own = config.reward.functions
    known = {one.function for one in own}
    new = [RewardFunctionSettings(function=name) for name in rewards if name not in known]
    return replace(config.reward, functions=[*own, *new])
