"""TRL's GRPOTrainer as `bench.step` measures it, on its fastest settings for this step."""

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, Features, Image, List, Value
from transformers import AutoProcessor, PrinterCallback, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from bench.step_ours import Case, FixedLengthVerifier, Setup, StepFigures, case_config, end_never
from care_train.config import Config
from care_train.data import Sample
from care_train.distributed import own_environment
from care_train.integrations.trl import CareGRPOTrainer
from care_train.models.load import load_model

Turn = Callable[[StepFigures], None]
"""Called after each of TRL's steps with its figures."""


def run_trl(setup: Setup, case: Case, steps: int, output_dir: str, turn: Turn) -> None:
    """Train with GRPOTrainer; the time `turn` takes is not TRL's.

    Args:
        setup: policy and rows.
        case: sizes.
        steps: how many.
        output_dir: for TRL, which writes nothing there.
        turn: called after every step.
    """
    config = case_config(case)
    loaded = load_model(config.model, setup.folder)
    # No EOS and no image token can be sampled: the first for equal lengths; of the second TRL's
    # next forward would not survive one.
    arguments = grpo_arguments(config, end_never(loaded)) | {
        "output_dir": output_dir,
        "logging_strategy": "no",
        "max_steps": steps,
    }
    rewards = _Rewards(setup, case)
    driver = _Driver(rewards, turn)
    rows = setup.prompts(0, case.prompts * steps)
    with _no_group():
        trainer = grpo_trainer(
            setup.folder,
            rows,
            model=loaded.model,
            reward_funcs=rewards,
            callbacks=[driver],
            args=GRPOConfig(**arguments),
        )
    driver.watch(trainer)
    trainer.train()


def grpo_trainer(folder: Path, rows: Sequence[Sample], **more: Any) -> GRPOTrainer:
    """TRL's trainer on our rows and the processor of a model's folder; CARE's with `care` in it."""
    kind: type[GRPOTrainer] = CareGRPOTrainer if "care" in more else GRPOTrainer
    processor = AutoProcessor.from_pretrained(folder, padding_side="left")
    trainer = kind(train_dataset=rows_for_trl(rows), processing_class=processor, **more)
    trainer.remove_callback(PrinterCallback)
    return trainer


def grpo_arguments(config: Config, banned: list[int]) -> dict[str, Any]:
    """Our configuration in TRL's words, on a step's fastest settings; it logs and saves nothing."""
    train, rollout = config.train, config.rollout
    sequences = train.prompts_per_step * rollout.group_size
    size = min(train.micro_batch_size, sequences)
    return {
        "use_cpu": not torch.cuda.is_available(),
        "bf16": False,
        "gradient_checkpointing": False,
        "report_to": "none",
        "disable_tqdm": True,
        "save_strategy": "no",
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
        "loss_type": "grpo",
        "shuffle_dataset": False,
        "seed": config.seed,
        "generation_kwargs": {"suppress_tokens": banned},
    }


def rows_for_trl(rows: Sequence[Sample]) -> Dataset:
    """The rows with their images as files, opened when a batch is made, as our trainer does."""
    content = Features({"role": Value("string"), "content": Value("string")})
    features = Features({"prompt": List(content), "images": List(Image()), "row": Value("int64")})
    columns = {
        "prompt": [[{"role": "user", "content": row.prompt}] for row in rows],
        "images": [[str(image) for image in row.images] for row in rows],
        "row": list(range(len(rows))),
    }
    return Dataset.from_dict(columns, features=features)


@contextmanager
def _no_group() -> Iterator[None]:
    """Hide this process's group of one, around which TRL would wrap DistributedDataParallel."""
    hidden = {key: os.environ.pop(key) for key in os.environ.keys() - own_environment().keys()}
    try:
        yield
    finally:
        os.environ |= hidden


class _Rewards:
    """Our verifier as a reward function; counts what was sampled."""

    __name__ = "verifier"

    def __init__(self, setup: Setup, case: Case) -> None:
        config = case_config(case)
        self._setup, self._length = setup, case.length
        self._verifier = FixedLengthVerifier(config.prompt, config.reward)
        self.tokens = self.sequences = 0

    def __call__(
        self,
        completions: list[list[dict[str, str]]],
        completion_ids: list[list[int]],
        row: list[int],
        **_: Any,
    ) -> list[float | None]:
        lengths = {len(ids) for ids in completion_ids}
        if lengths != {self._length}:
            raise RuntimeError(f"bench.step: TRL sampled {lengths} tokens, wanted {self._length}")
        self.tokens = sum(len(ids) for ids in completion_ids)
        self.sequences = len(completion_ids)
        samples = [self._setup.prompts(i, 1)[0] for i in row]
        return [
            self._verifier.score(completion[0]["content"], sample).reward
            for completion, sample in zip(completions, samples, strict=True)
        ]


class _Driver(TrainerCallback):
    """Times TRL's steps from the end of one to the end of the next, less the turns between."""

    def __init__(self, rewards: _Rewards, turn: Turn) -> None:
        self._rewards, self._turn = rewards, turn
        self._start = 0.0
        self._spent: dict[str, float] = {}

    def watch(self, trainer: GRPOTrainer) -> None:
        """Take the time of the trainer's parts."""
        for part, name in (
            ("generate", "_generate_single_turn"),
            ("score", "_calculate_rewards"),
            ("rollouts", "_generate_and_score_completions"),
            ("forward", "_get_per_token_logps_and_entropies"),
            ("step", "training_step"),
        ):
            setattr(trainer, name, self._timed(part, getattr(trainer, name)))

    def _timed(self, part: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*arguments: Any, **named: Any) -> Any:
            start = time.perf_counter()
            try:
                return call(*arguments, **named)
            finally:
                # The loss's own forward is part of forward and backward.
                if part != "forward" or not torch.is_grad_enabled():
                    spent = self._spent.get(part, 0.0)
                    self._spent[part] = spent + time.perf_counter() - start

        return timed

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self._start = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        seconds = time.perf_counter() - self._start
        figures = StepFigures(
            seconds, self._rewards.tokens, self._parts(seconds), self._rewards.sequences
        )
        self._spent = {}
        self._turn(figures)
        self._start = time.perf_counter()

    def _parts(self, seconds: float) -> dict[str, float]:
        spent = self._spent
        known = {part: spent.get(part, 0.0) for part in ("generate", "score")}
        reference = spent.get("forward", 0.0)
        rollouts = spent["rollouts"]
        return known | {
            "reference": reference,
            "prepare": rollouts - sum(known.values()) - reference,
            "update": spent["step"] - rollouts,
            # The data loader, the optimiser and the loop.
            "other": seconds - spent["step"],
        }
