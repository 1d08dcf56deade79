"""CARE in verl 0.9's own training loop, on a CPU and in one process.

    python -m tests.integrations.verl_run MODEL STEPS FOLDER

verl's configuration, data set, agent loop, reward loop, `RayPPOTrainer.fit`, worker, FSDP2 engine
and optimiser are verl's. What needs GPUs is not: transformers samples in the place of its vLLM
server, with the weights that verl's engine exports to one, and the workers are called without Ray.
FOLDER holds train.parquet and reward.py, and gets accuracy.json: of each step's rollouts.
"""

# verl is installed where verl runs, not where this project is checked.
# pyright: reportMissingImports=false
import asyncio
import json
import os
import re
import shlex
import sys
from pathlib import Path
from string import Template
from types import MethodType, SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from hydra import compose, initialize_config_module
from transformers import AutoModelForImageTextToText, AutoProcessor
from verl import DataProto
from verl.experimental.agent_loop.agent_loop import AgentLoopWorker
from verl.experimental.reward_loop.reward_loop import RewardLoopWorker
from verl.trainer.ppo.ray_trainer import RayPPOTrainer, Role
from verl.workers.engine_workers import ActorRolloutRefWorker
from verl.workers.rollout.replica import TokenOutput

PAGE = Path(__file__).parents[2] / "docs" / "verl.md"


def documented() -> list[str]:
    """The settings of the command in docs/verl.md."""
    (command,) = re.findall(r"python -m verl\.trainer\.main_ppo (.*?)\n```", PAGE.read_text(), re.S)
    return shlex.split(command.replace("\\\n", ""))


def small(model: str, steps: int, folder: str) -> list[str]:
    """Laid over them: the user's files, and sizes for a CPU."""
    lines = Path(__file__).with_suffix(".txt").read_text().splitlines()
    names = {"MODEL": model, "STEPS": str(steps), "FOLDER": folder}
    settings = [line for line in lines if line and not line.startswith("#")]
    return [Template(setting).safe_substitute(names) for setting in settings]


class Sampler:
    """What verl's servers do: sample for many requests at once, with the weights they were sent."""

    def __init__(self, model: str, tokens: int) -> None:
        self.model = AutoModelForImageTextToText.from_pretrained(model).eval()
        for module in (self.model, self.model.model):  # Before verl replaces the class's.
            module.forward = MethodType(type(module).forward, module)
        self.processor = AutoProcessor.from_pretrained(model)
        self.tokens, self.expected = tokens, 0
        self.waiting: list[tuple[list[int], list[Any], asyncio.Future]] = []

    async def generate(
        self, request_id: str, *, prompt_ids: list[int], image_data: list[Any], **others: Any
    ) -> TokenOutput:
        answer = asyncio.get_running_loop().create_future()
        self.waiting.append((prompt_ids, image_data, answer))
        if len(self.waiting) == self.expected:
            for ids, (*_, waiting) in zip(self.sample(), self.waiting, strict=True):
                waiting.set_result(ids)
            self.waiting.clear()
        return TokenOutput(token_ids=await answer)

    @torch.no_grad()
    def sample(self) -> list[list[int]]:
        tokenizer, images = self.processor.tokenizer, self.processor.image_processor
        prompts = [{"input_ids": ids} for ids, *_ in self.waiting]
        inputs = tokenizer.pad(prompts, padding_side="left", return_tensors="pt")
        config = self.model.config
        is_image = inputs["input_ids"] == config.image_token_id
        drawn = [image for _, given, _ in self.waiting for image in given]
        sampled = self.model.generate(
            **inputs,
            **images(drawn, return_tensors="pt"),
            mm_token_type_ids=is_image.long(),
            do_sample=True,
            top_k=0,
            suppress_tokens=[config.image_token_id, config.video_token_id],
            max_new_tokens=self.tokens,
        )[:, is_image.shape[1] :]
        end = tokenizer.eos_token_id
        return [ids[: ids.index(end) + 1] if end in ids else ids for ids in sampled.tolist()]


def main(model: str, steps: str, folder: str) -> None:
    # What Ray tells a worker, and the engine that the CPU shares with GPUs.
    os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "0"}
    os.environ["VERL_ENGINE_DEVICE"] = "cuda"
    torch.manual_seed(0)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    with initialize_config_module("verl.trainer.config", version_base=None):
        overrides = documented() + small(model, int(steps), folder)
        config = compose("ppo_trainer", overrides=overrides)
    sampler = Sampler(model, config.data.max_response_length)
    actor = ActorRolloutRefWorker(config.actor_rollout_ref, role="actor")
    actor.init_model()
    scorer, accuracy = RewardLoopWorker(config), []
    handle = SimpleNamespace(compute_score=SimpleNamespace(remote=scorer.compute_score))
    agent = AgentLoopWorker(config, sampler, reward_loop_worker_handles=[handle])

    def generate_sequences(prompts: DataProto) -> DataProto:
        sampler.expected = len(prompts)
        output = scorer.loop.run_until_complete(agent.generate_sequences(prompts))
        accuracy.append(output.batch["rm_scores"].sum(-1).mean().item())
        output.meta_info["timing"] = {}
        return output

    def update_weights(step: int) -> None:
        sampler.model.load_state_dict(dict(actor.actor.engine.get_per_tensor_param()[0]))

    pool, roles = SimpleNamespace(get_n_gpus=lambda: 1), {Role.ActorRollout: None}
    trainer = RayPPOTrainer(config, agent.tokenizer, roles, pool, processor=agent.processor)
    trainer.actor_rollout_wg = actor
    trainer.async_rollout_manager = SimpleNamespace(generate_sequences=generate_sequences)
    trainer.checkpoint_manager = SimpleNamespace(
        update_weights=update_weights, sleep_replicas=lambda: None
    )
    trainer.fit()
    Path(folder, "accuracy.json").write_text(json.dumps(accuracy))


if __name__ == "__main__":
    main(*sys.argv[1:])
