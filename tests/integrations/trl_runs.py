"""Tiny GRPO trainers, with and without the integration, and what they compute."""

import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from PIL import Image
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor
from trl import GRPOConfig, GRPOTrainer

from care_kernels.integrations.trl import use_care_kernels

_TIMINGS = ("step_time", "runtime", "per_second")


def tie_often(completion_ids: list[list[int]], **_: Any) -> list[float]:
    """Whole groups get the same reward, so that some advantages are zero."""
    return [float(sum(token % 3 == 0 for token in ids) > 1) for ids in completion_ids]


def tie_rarely(completion_ids: list[list[int]], **_: Any) -> list[float]:
    """A reward of 17 levels."""
    return [float(sum(ids) % 17) for ids in completion_ids]


def build_trainer(
    folder: Path,
    output_dir: Path,
    *,
    trainer_class: Callable[..., GRPOTrainer] = GRPOTrainer,
    model: Any = None,
    reward: Any = tie_rarely,
    own: Mapping[str, Any] | None = None,
    **settings: Any,
) -> GRPOTrainer:
    """A trainer of the tiny model in `folder`, or of `model`.

    `settings` go to GRPOConfig; `own` are more arguments of `trainer_class`.
    """
    vision = "vl" in folder.name
    auto_class = AutoModelForImageTextToText if vision else AutoModelForCausalLM
    arguments = {
        "model": model or auto_class.from_pretrained(folder),
        "reward_funcs": reward,
        "args": grpo_config(output_dir, **settings),
        "train_dataset": prompts(vision),
        "processing_class": AutoProcessor.from_pretrained(folder, padding_side="left"),
    }
    return trainer_class(**(arguments | dict(own or {})))


def grpo_config(output_dir: Path, **settings: Any) -> GRPOConfig:
    """Two short quiet steps on the CPU in float32."""
    defaults = {
        "output_dir": str(output_dir),
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "report_to": "none",
        "disable_tqdm": True,
        "save_strategy": "no",
        "logging_steps": 1,
        "max_steps": 2,
        "learning_rate": 0.1,
        "optim": "sgd",
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "num_generations": 4,
        "max_completion_length": 8,
        "epsilon": 0.05,
        "seed": 3,
    }
    return GRPOConfig(**(defaults | settings))


def prompts(vision: bool) -> Dataset:
    """Four questions, each about a drawn image if `vision`."""
    questions = ["what color is the image?", "is there a circle?", "yes", "what shape is it"]
    rows: list[dict[str, Any]] = [
        {"prompt": [{"role": "user", "content": question}]} for question in questions
    ]
    if vision:
        for row, color in zip(rows, ("red", "green", "blue", "yellow"), strict=True):
            row["image"] = Image.new("RGB", (56, 56), color)
    return Dataset.from_list(rows)


def train(
    folder: Path, output_dir: Path, path: str | None, **settings: Any
) -> tuple[list[dict[str, float]], dict[str, torch.Tensor]]:
    """The metrics of each step and the weights after; `path` None is TRL alone."""
    random.seed(0)
    torch.manual_seed(0)
    trainer = build_trainer(folder, output_dir, **settings)
    if path is not None:
        assert use_care_kernels(trainer).path == path
    trainer.train()
    history = [
        {
            name: value
            for name, value in entry.items()
            if value is not None and not any(part in name for part in _TIMINGS)
        }
        for entry in trainer.state.log_history
        if "grad_norm" in entry
    ]
    weights = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    return history, weights


def micro_batch(trainer: GRPOTrainer, **extra: torch.Tensor) -> dict[str, torch.Tensor]:
    """Four sequences as `_compute_loss` gets them: padded on both sides, old policy given."""
    generator = torch.Generator().manual_seed(7)
    vocab_size = trainer.model.config.vocab_size

    def ids(length: int) -> torch.Tensor:
        return torch.randint(10, vocab_size, (4, length), generator=generator)

    lengths = torch.tensor([6, 3, 5, 6])
    batch = {
        "prompt_ids": ids(4),
        "prompt_mask": torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1], [0, 0, 1, 1], [1, 1, 1, 1]]),
        "completion_ids": ids(6),
        "completion_mask": (torch.arange(6) < lengths[:, None]).long(),
        "advantages": torch.tensor([1.5, -0.7, 0.0, -0.8]),
        "num_items_in_batch": torch.tensor(40),
    }
    with torch.no_grad():
        input_ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
        attention = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
        now, _, _ = trainer._get_per_token_logps_and_entropies(
            trainer.model, input_ids, attention, 6
        )
    for name, width in (("old_per_token_logps", 0.3), ("ref_per_token_logps", 0.5)):
        batch[name] = now + width * torch.randn(now.shape, generator=generator)
    return batch | extra


def loss_and_gradients(
    trainer: GRPOTrainer, batch: dict[str, torch.Tensor]
) -> tuple[torch.Tensor, dict[str, torch.Tensor], dict[str, float]]:
    """What one micro-batch gives: the loss, every parameter's gradient and the metrics."""
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 2
    loss = trainer.compute_loss(trainer.model, dict(batch))
    trainer.model.zero_grad()
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in trainer.model.named_parameters()}
    metrics = {name: values[-1] for name, values in trainer._metrics["train"].items()}
    return loss.detach(), gradients, metrics
