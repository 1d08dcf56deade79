"""CareGRPOTrainer beside our trainer and TRL's GRPO: learning curves and seconds per step.

    python -m bench.trl_curves
    python -m bench.trl_curves --steps 200 --seeds 0 1 2 --picture docs/trl_curves.png

One tiny VLM, one cold start, the same rows in the same order, the same reward, learning rate and
number of rollouts a step; CARE's reflections come on top, and are counted. A step's accuracy is
that of its rollouts, all of rows that were never seen before. Every run is a process of its own;
finished ones in the output folder are reused.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch
from datasets import Dataset, Features, Image, List, Value
from rich.console import Console
from rich.table import Table
from transformers import AutoProcessor, PrinterCallback, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from bench.step_case import QUICKSTART, prepare
from care_train.config import Config, load_config
from care_train.data import PromptOrder, Sample, load_samples
from care_train.distributed import own_environment
from care_train.integrations.trl import CareGRPOTrainer
from care_train.models.load import load_model
from care_train.reporting import mean_interval, plot_comparison, read_metrics
from care_train.reporting.files import finite, write_json
from care_train.rollout.engine import banned_token_ids
from care_train.verifier import Verifier

CONTENDERS = {
    "care": "CARE, our trainer",
    "care_trl": "CARE, CareGRPOTrainer",
    "grpo_trl": "GRPO, TRL",
}


def main() -> int:
    options = _options()
    if options.run is not None:
        _run(options, *options.run)
        return 0
    folder = prepare(options.output / "cold_start", options.cold_steps).folder
    curves: dict[str, list[list[dict[str, Any]]]] = {}
    for name in options.contenders:
        curves[name] = [_records(options, folder, name, seed) for seed in options.seeds]
    facts = {name: _figures(runs) for name, runs in curves.items()}
    _print(facts, options)
    if options.picture is not None:
        plot_comparison({CONTENDERS[name]: runs for name, runs in curves.items()}, options.picture)
    print(json.dumps(finite({"steps": options.steps, "seeds": options.seeds} | facts)))
    return 0


def _records(
    options: argparse.Namespace, folder: Path, name: str, seed: int
) -> list[dict[str, Any]]:
    path = options.output / f"{name}-{seed}.json"
    case = {"steps": options.steps, "prompts": options.prompts, "model": str(folder)}
    if path.is_file() and (found := json.loads(path.read_text()))["case"] == case:
        return found["records"]
    command = [sys.executable, "-m", "bench.trl_curves", *sys.argv[1:], "--run", name, str(seed)]
    # Without this process's group of one, around which TRL would wrap DistributedDataParallel.
    subprocess.run(command, check=True, env=own_environment())
    write_json(path, {"case": case, "records": json.loads(_raw(path).read_text())})
    return json.loads(path.read_text())["records"]


def _raw(path: Path) -> Path:
    return path.with_suffix(".records.json")


def _run(options: argparse.Namespace, name: str, seed_text: str) -> None:
    seed = int(seed_text)
    folder = prepare(options.output / "cold_start", options.cold_steps).folder
    overrides = [f"seed={seed}", f"train.steps={options.steps}", f"model.path={folder}"]
    overrides += [f"train.prompts_per_step={options.prompts}", "train.eval_every=0"]
    config = load_config(QUICKSTART, overrides)
    if name == "care":
        records = _ours(options.output / "runs" / f"{name}-{seed}", overrides)
    else:
        records = _trl(config, folder, name, options.output / "trl")
    write_json(_raw(options.output / f"{name}-{seed}.json"), records)


def _ours(run_dir: Path, overrides: Sequence[str]) -> list[dict[str, Any]]:
    arguments = ["train", "--config", str(QUICKSTART), *overrides, f"name={run_dir.name}"]
    arguments += [f"output_dir={run_dir.parent}", "overwrite=true", "logging.progress=false"]
    # Nothing of the evaluations before and after is read.
    arguments += ["logging.report_to=[]", "eval.greedy=false", "eval.data.max_samples=8"]
    subprocess.run([sys.executable, "-m", "care_train", *arguments], check=True)
    records = read_metrics(run_dir / "metrics.jsonl")
    return [
        {key: record[key] for key in ("phase", "step", "accuracy", "seconds", "sampled_sequences")}
        for record in records
        if record["phase"] == "train"
    ]


def _trl(config: Config, folder: Path, name: str, scratch: Path) -> list[dict[str, Any]]:
    train = config.train
    samples = load_samples(config.data, config.seed)
    order = PromptOrder(len(samples), config.seed).take(0, train.steps * train.prompts_per_step)
    rows = [samples[i] for i in order]
    loaded, recorder = load_model(config.model, folder), _Recorder(config)
    arguments = _arguments(config, banned_token_ids(loaded))
    if name == "care_trl":
        arguments["epsilon_high"] = config.loss.clip_eps_high
    shared: dict[str, Any] = {
        "model": loaded.model,
        "reward_funcs": _rewards(config, rows),
        "args": GRPOConfig(output_dir=str(scratch), **arguments),
        "train_dataset": _dataset(rows),
        "processing_class": AutoProcessor.from_pretrained(folder, padding_side="left"),
        "callbacks": [recorder],
    }
    if name == "care_trl":
        trainer: GRPOTrainer = CareGRPOTrainer(care=config.care, **shared)
    else:
        trainer = GRPOTrainer(**shared)
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return recorder.records


def _arguments(config: Config, banned: list[int]) -> dict[str, Any]:
    """Our configuration in TRL's words."""
    train, rollout, weight = config.train, config.rollout, config.reward.format_weight
    sequences = train.prompts_per_step * rollout.group_size
    size = min(train.micro_batch_size, sequences)
    return {
        "use_cpu": not torch.cuda.is_available(),
        "bf16": False,
        "gradient_checkpointing": False,
        "report_to": "none",
        "disable_tqdm": True,
        "save_strategy": "no",
        "logging_steps": 1,
        "max_steps": train.steps,
        "learning_rate": train.learning_rate,
        "lr_scheduler_type": "constant_with_warmup",
        "warmup_steps": train.warmup_steps,
        "weight_decay": train.weight_decay,
        "max_grad_norm": train.max_grad_norm,
        "per_device_train_batch_size": size,
        "gradient_accumulation_steps": sequences // size,
        "num_generations": rollout.group_size,
        "max_completion_length": rollout.max_new_tokens,
        "temperature": rollout.temperature,
        "beta": config.loss.kl_coef,
        "use_bias_correction_kl": False,
        "loss_type": "grpo",
        "epsilon": 0.2,
        "reward_weights": [1 - weight, weight],
        "shuffle_dataset": False,
        "seed": config.seed,
        "generation_kwargs": {"suppress_tokens": banned},
    }


def _dataset(rows: Sequence[Sample]) -> Dataset:
    """Rows with their images as files."""
    content = Features({"role": Value("string"), "content": Value("string")})
    features = Features({"prompt": List(content), "images": List(Image()), "row": Value("int64")})
    columns = {
        "prompt": [[{"role": "user", "content": row.prompt}] for row in rows],
        "images": [[str(image) for image in row.images] for row in rows],
        "row": list(range(len(rows))),
    }
    return Dataset.from_dict(columns, features=features)


class _Recorder(TrainerCallback):
    """Each step's accuracy, seconds and sampled sequences."""

    def __init__(self, config: Config) -> None:
        self._groups, self._size = config.train.prompts_per_step, config.rollout.group_size
        self._start = self._seconds = 0.0
        self.records: list[dict[str, Any]] = []

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self._start = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self._seconds = time.perf_counter() - self._start

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if logs is None or "rewards/accuracy/mean" not in logs:
            return
        repairs = round(logs.get("care/reflected_groups", 0.0) * self._groups)
        self.records.append(
            {
                "phase": "train",
                "step": state.global_step,
                "accuracy": logs["rewards/accuracy/mean"],
                "seconds": self._seconds,
                "sampled_sequences": self._groups * self._size + repairs,
            }
        )


def _rewards(config: Config, rows: Sequence[Sample]) -> list[Any]:
    """Our verifier as two reward functions in TRL's form: acc and fmt of Eq. 1."""
    verifier = Verifier(config.prompt, config.reward)

    def scores(completions: list, row: list[int]) -> list[Any]:
        texts = [completion[0]["content"] for completion in completions]
        return [verifier.score(text, rows[i]) for text, i in zip(texts, row, strict=True)]

    def accuracy(completions: list, row: list[int], **_: Any) -> list[float]:
        return [score.accuracy for score in scores(completions, row)]

    def form(completions: list, row: list[int], **_: Any) -> list[float]:
        return [score.format_score for score in scores(completions, row)]

    return [accuracy, form]


def _figures(runs: Sequence[Sequence[dict[str, Any]]]) -> dict[str, Any]:
    """Over seeds: accuracy of the first and the last tenth of the steps, and a step's seconds."""
    tenth = max(len(runs[0]) // 10, 1)
    found: dict[str, Any] = {}
    for key, part in (("first", slice(0, tenth)), ("last", slice(-tenth, None))):
        means = [fmean(record["accuracy"] for record in run[part]) for run in runs]
        mean, half_width = mean_interval(means)
        found[f"accuracy_{key}_tenth"] = {"mean": round(mean, 4), "interval": round(half_width, 4)}
    found["seconds_per_step"] = round(median(r["seconds"] for run in runs for r in run), 3)
    found["sampled_per_step"] = round(fmean(r["sampled_sequences"] for run in runs for r in run))
    return found


def _print(facts: dict[str, Any], options: argparse.Namespace) -> None:
    title = f"{options.steps} steps, mean and 95 % interval over {len(options.seeds)} seeds"
    table = Table("", "accuracy, first tenth", "last tenth", "s per step", "sampled", title=title)
    for name, values in facts.items():
        scores = [values[f"accuracy_{key}_tenth"] for key in ("first", "last")]
        table.add_row(
            CONTENDERS[name],
            *[f"{100 * s['mean']:.1f} ± {100 * s['interval']:.1f}" for s in scores],
            f"{values['seconds_per_step']:.2f}",
            str(values["sampled_per_step"]),
        )
    Console(width=100).print(table)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.trl_curves", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    names = list(CONTENDERS)
    parser.add_argument("--contenders", nargs="+", default=names, choices=names)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--prompts", type=int, default=32, help="prompts per step")
    parser.add_argument("--cold-steps", type=int, default=100)
    parser.add_argument("--output", type=Path, default=Path("runs/trl_curves"))
    parser.add_argument("--picture", type=Path, help="write the learning curves here")
    parser.add_argument("--run", nargs=2, metavar=("CONTENDER", "SEED"), help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
