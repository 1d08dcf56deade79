"""Runs of the trainer, each in a process and a folder of its own that the configuration names."""

import hashlib
import json
import math
import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.paper.experiments import Experiment
from care_train.config import Config, load_config
from care_train.config.loader import config_to_dict

BASE = Path(__file__).with_name("base.yaml")

QUICK = (
    "sft={steps: 2, batch_size: 8}",
    "sft.data.max_samples=64",
    "data.max_samples=64",
    "eval.max_samples=8",
    "train={prompts_per_step: 4, save_every: 0}",
    "limits.empty_steps=null",
)
"""Laid over every run by `--quick`, beside two training steps: all runs, nothing is learnt."""

_COLD_SEED = 0
_COLD_START = ("train.warmup_steps=10", "train.save_every=0")
"""Laid over the cold start, which shares them with training."""


def steps_to_sample(sequences: float, config: Config) -> int:
    """Steps after which an algorithm without reflection has sampled as many sequences."""
    return math.ceil(sequences / (config.train.prompts_per_step * config.rollout.group_size))


@dataclass(frozen=True)
class Run:
    """One training, to be made or found."""

    variant: str
    seed: int
    overrides: tuple[str, ...]


@dataclass(frozen=True)
class Done:
    """What a finished training left."""

    run: Run
    folder: Path
    command: str
    summary: dict[str, Any]


class Runner:
    """Makes runs below a folder, or finds them there: finished ones are never made again."""

    def __init__(self, folder: Path, *, quick: bool, shared: Sequence[str] = ()) -> None:
        """Make runs in `folder`, with the overrides `shared` over every one."""
        self._folder = folder
        self._shared = (*(QUICK if quick else ()), *shared)
        self._last = ("train.steps=2",) if quick else ()

    def make(self, experiment: Experiment, run: Run) -> Done:
        """A run with its variant's budget, from the cold start that all runs share.

        Seeds differ in what follows: the order of the prompts and the samples.
        """
        cold = self._finish("sft", self._settings(_COLD_SEED, _COLD_START), "cold start")
        settings = [*self._settings(run.seed, run.overrides), f"model.path={cold / 'final'}"]
        settings += self._budget(experiment, run, cold)
        folder = self._finish("train", settings, run.variant)
        summary = json.loads((folder / "summary.json").read_text())
        return Done(run, folder, _command("train", folder, settings), summary)

    def _settings(self, seed: int, overrides: Sequence[str]) -> list[str]:
        return [f"seed={seed}", *self._shared, *overrides, *self._last]

    def _budget(self, experiment: Experiment, run: Run, cold: Path) -> list[str]:
        """As many steps as sample what the experiment's first variant has sampled, reflections
        included."""
        first, overrides = next(iter(experiment.variants.items()))
        if run.variant == first:
            return []
        reference = [*self._settings(run.seed, overrides), f"model.path={cold / 'final'}"]
        summary = self._place("train", reference) / "summary.json"
        sampled = json.loads(summary.read_text())["sampled_sequences"]
        config = load_config(BASE, self._settings(run.seed, run.overrides))
        if config.algorithm != "care" or not config.care.reflection.enabled:
            return [f"train.steps={steps_to_sample(sampled, config)}"]
        return []

    def _place(self, command: str, settings: Sequence[str]) -> Path:
        found = configuration_hash(load_config(BASE, settings), command)
        return self._folder / f"{command}-{found}"

    def _finish(self, command: str, settings: Sequence[str], what: str) -> Path:
        """The folder of a finished run, which is made, or gone on with, where it is not there.

        Raises:
            RuntimeError: it ended with an error.
        """
        folder = self._place(command, settings)
        if (folder / "summary.json").is_file():
            return folder
        words = [sys.executable, "-m", *shlex.split(_command(command, folder, settings))]
        if (folder / "config.yaml").is_file():
            words.append("resume=true")
        folder.parent.mkdir(parents=True, exist_ok=True)
        environment = {"OMP_NUM_THREADS": "1"} | os.environ
        with (self._folder / f"{folder.name}.log").open("a") as log:
            code = subprocess.run(words, stdout=log, stderr=log, env=environment).returncode
        if code:
            raise RuntimeError(f"{what}: status {code}, see {log.name}")
        return folder


def configuration_hash(config: Config, command: str = "train") -> str:
    """Twelve hexadecimal digits of the settings that decide the numbers of `train` or `sft`.

    Those that have their default are left out, so that a run is found again by a version that has
    more settings.
    """
    training = ("algorithm", "data", "rollout", "reward", "care", "loss", "train", "eval")
    kept = ("seed", "model", "prompt", *(training if command == "train" else ("sft",)))
    values, defaults = config_to_dict(config), config_to_dict(Config())
    if command == "sft":
        for settings in (values, defaults):
            settings["sft"]["warmup_steps"] = settings["train"]["warmup_steps"]
    # Where a cold start lies is another folder elsewhere; its own name says how it was made.
    values["model"]["path"] = "/".join(Path(config.model.path).parts[-2:])
    changed = {name: _changed(values[name], defaults[name]) for name in kept}
    changed["cue"] = config.care.reflection.cue
    text = json.dumps(changed, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _changed(values: Any, defaults: Any) -> Any:
    """What of nested settings is not the default."""
    if not isinstance(values, dict) or not isinstance(defaults, dict):
        return values
    pairs = {key: (value, defaults.get(key)) for key, value in values.items()}
    return {key: _changed(v, d) for key, (v, d) in pairs.items() if v != d}


def _command(command: str, folder: Path, settings: Sequence[str]) -> str:
    base = BASE.relative_to(Path.cwd()) if BASE.is_relative_to(Path.cwd()) else BASE
    words = ["care_train", command, "--config", str(base), *settings]
    return shlex.join([*words, f"output_dir={folder.parent}", f"name={folder.name}"])
