"""CareGRPOTrainer beside our trainer, and TRL's GRPO, DAPO and GSPO beside ours.

    python -m bench.trl_curves
    python -m bench.trl_curves --contenders dapo dapo_trl gspo gspo_trl
    python -m bench.trl_curves --steps 200 --seeds 0 1 2 --picture docs/trl_curves.png

One tiny VLM, one cold start, the same rows in the same order, the same reward, learning rate and
number of rollouts a step; CARE's reflections come on top, and are counted. Before and after, each
policy answers the same held-out questions once at the training temperature, by our evaluation.
Every run is a process of its own; finished ones in the output folder are reused.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import TrainerCallback
from trl import GRPOConfig

from bench.step_ours import QUICKSTART, prepare
from bench.step_trl import grpo_arguments, grpo_trainer
from care_train import CareTrainer
from care_train.config import Config, load_config
from care_train.data import PromptOrder, Sample, load_samples
from care_train.distributed import own_environment
from care_train.models.load import load_model
from care_train.reporting import mean_interval, read_metrics
from care_train.reporting.files import finite, write_json
from care_train.reporting.plots import plot_comparison
from care_train.rollout.engine import banned_token_ids
from care_train.verifier import Verifier

CONTENDERS = {
    "care": "CARE, our trainer",
    "care_trl": "CARE, CareGRPOTrainer",
    "grpo": "GRPO, our trainer",
    "grpo_trl": "GRPO, TRL",
    "dapo": "DAPO's loss, our trainer",
    "dapo_trl": "DAPO's loss, TRL",
    "gspo": "GSPO, our trainer",
    "gspo_trl": "GSPO, TRL",
}
"""By name: an algorithm, and `_trl` behind it for the one in TRL's trainer."""

Run = dict[str, Any]
"""`accuracy_before` and `accuracy_after` on held-out questions, and `records`, one per step."""


def main() -> int:
    options = _options()
    if options.run is not None:
        _run(options, *options.run)
        return 0
    folder = prepare(options.output / "cold_start", options.cold_steps).folder
    # Seed by seed, so that a run that is cut has whole comparisons.
    runs: dict[str, list[Run]] = {name: [] for name in options.contenders}
    for seed, name in product(options.seeds, options.contenders):
        runs[name].append(_finished(options, folder, name, seed))
    facts = {name: _figures(found) for name, found in runs.items()}
    for peer in CONTENDERS:
        ours = peer.removesuffix("_trl")
        if peer != ours and {ours, peer} <= facts.keys():
            facts[f"{peer}_to_{ours}"] = _comparison(facts[ours], facts[peer])
    _print(facts, options)
    if options.picture is not None:
        curves = {CONTENDERS[name]: [run["records"] for run in runs[name]] for name in runs}
        plot_comparison(curves, options.picture)
    print(json.dumps(finite({"steps": options.steps, "seeds": options.seeds} | facts)))
    return 0


def _finished(options: argparse.Namespace, folder: Path, name: str, seed: int) -> Run:
    path, case = options.output / f"{name}-{seed}.json", _case(options, folder)
    if path.is_file() and (found := json.loads(path.read_text()))["case"] == case:
        return found
    command = [sys.executable, "-m", "bench.trl_curves", *sys.argv[1:], "--run", name, str(seed)]
    # Without this process's group of one, around which TRL would wrap DistributedDataParallel.
    subprocess.run(command, check=True, env=own_environment())
    return json.loads(path.read_text())


def _case(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """What a finished run must share to be used again."""
    sizes = {"steps": options.steps, "prompts": options.prompts, "questions": options.questions}
    return sizes | {"model": str(folder)}


def _run(options: argparse.Namespace, name: str, seed: str) -> None:
    folder = prepare(options.output / "cold_start", options.cold_steps).folder
    overrides = (
        *(f"seed={seed}", f"train.steps={options.steps}", f"model.path={folder}"),
        *(f"train.prompts_per_step={options.prompts}", f"algorithm={name.removesuffix('_trl')}"),
        *(f"eval.max_samples={options.questions}", "eval.also=[]", "logging.report_to=[]"),
        *(f"name={name}-{seed}", f"output_dir={options.output / 'runs'}"),
    )
    config = load_config(QUICKSTART, overrides)
    run = _trl(config, folder) if name.endswith("_trl") else _ours(config)
    found = {"case": _case(options, folder)} | run
    write_json(options.output / f"{name}-{seed}.json", found)


def _ours(config: Config) -> Run:
    clock = _Clock()
    trainer = CareTrainer(config=config, callbacks=[clock])
    summary = trainer.train()
    records = read_metrics(trainer.run_dir / "metrics.jsonl")
    kept = ("phase", "step", "accuracy", "decoded_tokens", "sampled_sequences")
    steps = [{key: r[key] for key in kept} for r in records if r["phase"] == "train"]
    return {
        "accuracy_before": summary["accuracy_before"],
        "accuracy_after": summary["accuracy_after"],
        "records": [r | {"seconds": s} for r, s in zip(steps, clock.seconds, strict=True)],
    }


def _trl(config: Config, folder: Path) -> Run:
    train = config.train
    samples = load_samples(config.data, config.seed)
    order = PromptOrder(len(samples), config.seed).take(0, train.steps * train.prompts_per_step)
    rows = [samples[i] for i in order]
    loaded, rewards = load_model(config.model, folder), _Rewards(config, rows)
    recorder, clock = _Recorder(rewards), _Clock()
    output = Path(config.output_dir) / config.name
    arguments = _arguments(config, banned_token_ids(loaded))
    trainer = grpo_trainer(
        folder,
        rows,
        model=loaded.model,
        reward_funcs=[rewards.accuracy, rewards.form],
        args=GRPOConfig(output_dir=str(output), **arguments),
        callbacks=[recorder, clock],
        **({"care": config.care} if config.algorithm == "care" else {}),
    )
    trainer.train()
    trained = output / "trained"
    trainer.save_model(str(trained))
    return {
        "accuracy_before": _accuracy(config, folder),
        "accuracy_after": _accuracy(config, trained),
        "records": [
            r | {"seconds": s} for r, s in zip(recorder.records, clock.seconds, strict=True)
        ],
    }


def _accuracy(config: Config, folder: Path) -> float:
    return CareTrainer(str(folder), config=config).evaluate()["accuracy"]


def _arguments(config: Config, banned: list[int]) -> dict[str, Any]:
    weight = config.reward.format_weight
    return grpo_arguments(config, banned) | {
        "logging_steps": 1,
        "max_steps": config.train.steps,
        "loss_type": "dapo" if config.loss.aggregation == "token" else "grpo",
        "importance_sampling_level": config.loss.ratio_level,
        "use_bias_correction_kl": False,
        "epsilon": config.loss.clip_eps_low,
        "epsilon_high": config.loss.clip_eps_high,
        "reward_weights": [1 - weight, weight],
    }


class _Rewards:
    """Our verifier as two reward functions in TRL's form: acc and fmt of Eq. 1."""

    def __init__(self, config: Config, rows: Sequence[Sample]) -> None:
        self._verifier, self._rows = Verifier(config.prompt, config.reward), rows
        self.sequences = self.tokens = 0

    def accuracy(
        self, completions: list, completion_ids: list, row: list[int], **_: Any
    ) -> list[float]:
        """Counts what was sampled, too: TRL asks for every completion, CARE for reflections."""
        self.sequences += len(completion_ids)
        self.tokens += sum(map(len, completion_ids))
        return [score.accuracy for score in self._scores(completions, row)]

    def form(self, completions: list, row: list[int], **_: Any) -> list[float]:
        return [score.format_score for score in self._scores(completions, row)]

    def _scores(self, completions: list, row: list[int]) -> list[Any]:
        texts = [completion[0]["content"] for completion in completions]
        return [self._verifier.score(t, self._rows[i]) for t, i in zip(texts, row, strict=True)]


class _Clock(TrainerCallback):
    """Seconds from the end of each step to the end of the next.

    Without a GPU those that the process computed, whatever else the machine does meanwhile.
    """

    def __init__(self) -> None:
        self._now = time.perf_counter if torch.cuda.is_available() else time.process_time
        self._last = self._now()
        self.seconds: list[float] = []

    def on_step_end(self, *_: Any, **__: Any) -> None:
        now = self._now()
        self.seconds.append(now - self._last)
        self._last = now


class _Recorder(TrainerCallback):
    """Each step's accuracy, and sampled sequences and tokens."""

    def __init__(self, rewards: _Rewards) -> None:
        self._rewards = rewards
        self.records: list[dict[str, Any]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if logs is None or "rewards/accuracy/mean" not in logs:
            return
        rewards = self._rewards
        self.records.append(
            {
                "phase": "train",
                "step": state.global_step,
                "accuracy": logs["rewards/accuracy/mean"],
                "decoded_tokens": rewards.tokens,
                "sampled_sequences": rewards.sequences,
            }
        )
        rewards.sequences = rewards.tokens = 0


def _figures(runs: Sequence[Run]) -> dict[str, Any]:
    """Over seeds: accuracy before and after, and what a step takes; first steps warm up."""
    found: dict[str, Any] = {}
    for key in ("accuracy_before", "accuracy_after"):
        by_seed = [run[key] for run in runs]
        mean, half_width = mean_interval(by_seed)
        found[key] = {"mean": round(mean, 4), "interval": round(half_width, 4), "by_seed": by_seed}
    records = [record for run in runs for record in run["records"][1:] or run["records"]]
    found["seconds_per_step"] = round(median(r["seconds"] for r in records), 3)
    found["sampled_per_step"] = round(fmean(r["sampled_sequences"] for r in records))
    tokens = sum(record["decoded_tokens"] for record in records)
    seconds = sum(record["seconds"] for record in records)
    found["ms_per_token"] = round(1000 * seconds / tokens, 4)
    return found


def _comparison(ours: dict[str, Any], peer: dict[str, Any]) -> dict[str, Any]:
    """Of the same algorithm in two trainers; NaN intervals of one seed hold nothing."""
    own, other = (one["accuracy_after"] for one in (ours, peer))
    gap = other["mean"] - own["mean"]
    differences = [b - a for a, b in zip(own["by_seed"], other["by_seed"], strict=True)]
    mean, half_width = mean_interval(differences)
    return {
        "seconds_per_token_ratio": round(peer["ms_per_token"] / ours["ms_per_token"], 3),
        "within_our_interval": abs(gap) <= own["interval"],
        "accuracy_difference": {"mean": round(mean, 4), "interval": round(half_width, 4)},
    }


def _print(facts: dict[str, Any], options: argparse.Namespace) -> None:
    title = f"{options.steps} steps, mean and 95 % interval over {len(options.seeds)} seeds"
    columns = ("accuracy before", "after", "s per step", "sampled", "ms per token")
    table = Table("", *columns, title=title)
    for name in options.contenders:
        values = facts[name]
        scores = [values[f"accuracy_{key}"] for key in ("before", "after")]
        table.add_row(
            CONTENDERS[name],
            *[f"{100 * s['mean']:.1f} ± {100 * s['interval']:.1f}" for s in scores],
            f"{values['seconds_per_step']:.2f}",
            str(values["sampled_per_step"]),
            f"{values['ms_per_token']:.3f}",
        )
    Console(width=100).print(table)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.trl_curves", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    names = list(CONTENDERS)
    parser.add_argument("--contenders", nargs="+", default=names, choices=names)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--prompts", type=int, default=32, help="prompts per step")
    parser.add_argument("--questions", type=int, default=500, help="held-out, before and after")
    parser.add_argument("--cold-steps", type=int, default=100)
    parser.add_argument("--output", type=Path, default=Path("runs/trl_curves"))
    parser.add_argument("--picture", type=Path, help="write the learning curves here")
    parser.add_argument("--run", nargs=2, metavar=("CONTENDER", "SEED"), help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
