"""`CareGRPOTrainer` on completions that a policy once said, alone or as one of several processes.

python -m tests.integrations.care_trl_ranks FOLDER OUT scripted    # also under `accelerate launch`

trains one step. `scripted` groups are the same however many processes there are; of `sampled` ones
the processes need different numbers of tokens.
"""

import os
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState, DistributedType, PartialState
from transformers import AutoTokenizer

from care_train.integrations.trl import CareGRPOTrainer
from tests.integrations.trl_runs import build_trainer

GROUP = 8
RIGHT = "<think>{} and more</think> <answer>blue</answer>"
WRONG = "<think>{} perhaps</think> <answer>red</answer>"
WORDS = ("one", "two words", "three", "a", "b c", "d", "e f g", "h")
GROUPS = {
    # In the order of the prompts. The first two reflect, so one of two processes has two
    # reflections and the other none. One response has no tags.
    "what color is the image?": [
        *map(RIGHT.format, WORDS[:2]),
        "x blue",
        *map(WRONG.format, ("the sky is low", "a rose", "clay", "sea", "no idea at all")),
    ],
    "is there a circle?": [RIGHT.format("the answer is clear"), *map(WRONG.format, WORDS[1:])],
    # Rescued.
    "yes": [*map(WRONG.format, WORDS)],
    # Skipped.
    "what shape is it": [*map(RIGHT.format, WORDS)],
}
REPAIRS = (
    "so it is the sky</think> <answer>blue</answer>",
    "so it is a rose, I think</think> <answer>red</answer>",
)


def right(completions: list[list[dict[str, str]]], **_: Any) -> list[float]:
    """1 where the answer is blue."""
    return [float("<answer>blue" in completion[0]["content"]) for completion in completions]


def small_trainer(folder: Path, out: Path, **settings: Any) -> CareGRPOTrainer:
    """Four groups of eight in one generation batch."""
    defaults = {
        "trainer_class": CareGRPOTrainer,
        "reward": [right],
        "per_device_train_batch_size": GROUP,
        "gradient_accumulation_steps": 4,
        "num_generations": GROUP,
        "max_completion_length": 40,
    }
    trainer: Any = build_trainer(folder, out, **(defaults | settings))
    return trainer


def script(trainer: Any) -> list[list[list[int]]]:
    """Replace TRL's generation by `GROUPS` and `REPAIRS`; what it will be asked for."""
    asked: list[list[list[int]]] = []

    def generate(prompt_ids: list, images: Any, fields: Any, num_generations: int) -> Any:
        asked.append([list(ids) for ids in prompt_ids])
        texts = [REPAIRS[i % 2] for i in range(len(prompt_ids))]
        if num_generations > 1:
            prompts = [trainer._tokenizer.decode(ids) for ids in prompt_ids]
            keys = [next(key for key in GROUPS if f"{key}<|im_end|>" in text) for text in prompts]
            texts = [GROUPS[key][i % GROUP] for i, key in enumerate(keys)]
        rows = trainer._tokenizer(texts)["input_ids"]
        return [[*row, trainer.eos_token_ids[0]] for row in rows], None

    trainer._generate_single_turn = generate
    return asked


def shard_on_cpus() -> None:
    """Let accelerate take its FSDP path on CPUs, which it keeps for GPUs; all below it is real."""
    plain = AcceleratorState.__init__

    def initialize(self: Any, *args: Any, fsdp_plugin: Any = None, **others: Any) -> None:
        plain(self, *args, fsdp_plugin=fsdp_plugin, **others)
        if fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin
            PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    AcceleratorState.__init__ = initialize


def by_chance(completion_ids: list[list[int]], **_: Any) -> list[float]:
    """Right or wrong by the tokens."""
    return [float(sum(ids) % 3 == 0) for ids in completion_ids]


def main(folder: Path, out: Path, groups: str) -> None:
    """Train one step; the first process saves weights and metrics."""
    shard_on_cpus()
    eos = AutoTokenizer.from_pretrained(folder).eos_token_id
    trainer: Any = small_trainer(
        folder,
        out,
        reward=[right if groups == "scripted" else by_chance],
        gradient_accumulation_steps=4 // int(os.environ.get("WORLD_SIZE", "1")),
        max_steps=1,
        shuffle_dataset=False,
        beta=0.1,
        use_bias_correction_kl=False,
        max_grad_norm=0.0,
        # Ends are likely, so that one process has sampled all of its own before the other.
        generation_kwargs=None if groups == "scripted" else {"sequence_bias": [[[eos], 5.0]]},
    )
    if groups == "scripted":
        script(trainer)
    trainer.train()
    weights = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    if trainer.accelerator.is_main_process:
        logged = {n: v for n, v in trainer.state.log_history[0].items() if "care/" in n}
        kind = type(trainer.model_wrapped).__name__
        weights = {name: weight.cpu() for name, weight in weights.items()}
        found = {"weights": weights, "metrics": logged, "kind": kind}
        torch.save(found | {"device": trainer.model.device.type}, out / "step.pt")
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.end_training()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
