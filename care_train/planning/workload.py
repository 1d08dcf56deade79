"""What a step does, in numbers: lengths, patches, sequences, from a configuration."""

import math
from dataclasses import dataclass, field, replace
from typing import Any

from care_train.config import Config
from care_train.planning.architecture import Architecture, VisionShape

_PROCESSOR_PIXELS = 28 * 28 * 1280
"""What Qwen's image processors scale to at most by default (transformers, qwen2_vl)."""


@dataclass(frozen=True)
class Scenario:
    """What the configuration does not say, and may be asked: `None` is the configuration's worst
    case for memory."""

    gpus: int = 8
    images: int = 1
    """Images per prompt."""
    image_pixels: int | None = None
    """Pixels of one image; None: the most that the image processor leaves."""
    text_tokens: int = 256
    """Tokens of a prompt's text; only times depend on it."""
    mean_response_share: float = 0.5
    """Mean response length over `rollout.max_new_tokens`; only times depend on it."""


@dataclass(frozen=True)
class Training:
    """What is trained and how it is sharded."""

    stage: int
    gpus: int
    parameter_bytes: int
    """Of one weight or activation: 4, or 2 in bfloat16."""
    has_master: bool
    """The optimiser works on fp32 copies of its own."""
    freeze_vision: bool = False
    lora_rank: int = 0
    checkpointing: bool = False
    offload_optimizer: bool = False
    offload_parameters: bool = False
    reduce_bucket: int = 500_000_000
    """Elements: DeepSpeed's `reduce_bucket_size`."""
    overlaps: bool = False
    """DeepSpeed's `overlap_comm`, which doubles ZeRO-2's bucket."""
    live_parameters: int = 1_000_000_000
    """Elements: DeepSpeed's `stage3_max_live_parameters`."""

    @property
    def shards(self) -> int:
        """Ranks that share the optimiser's states."""
        return self.gpus if self.stage >= 1 else 1


@dataclass(frozen=True)
class Workload:
    """Lengths in tokens, and counts per rank and step."""

    prompt: int
    """Longest prompt, images expanded."""
    response: int
    """Longest response."""
    context: int
    """Longest sequence: with reflection, a response follows another one's rationale."""
    patches: int
    """Vision patches per sequence."""
    mean_prompt: float
    mean_response: float
    prompts: float
    """Prompts per rank and step."""
    group_size: int
    trained_per_group: float
    """Sequences per prompt that reach the optimiser, at most."""
    micro_batch: float
    """Sequences in one forward and backward, all as long as the longest."""
    generated_at_once: int
    """Sequences."""
    micro_batch_tokens: int | None = None
    """What `micro_batch` times `context` is bounded by, instead of a number of sequences."""
    packing: bool = False
    """A micro-batch is one row: its attention mask is as wide as all its sequences."""
    passes: int = 1
    optimizer_steps: int = 1
    attention: str = "sdpa"
    is_care: bool = True
    has_reference: bool = True
    scores_old: bool = False
    """The old policy's log-probs are computed before training."""
    engine: str = "transformers"
    vllm: Any = field(default=None, repr=False)
    """`rollout.vllm`."""

    @property
    def mean_length(self) -> float:
        """Of a sequence."""
        return self.mean_prompt + self.mean_response

    @property
    def mean_micro_batch(self) -> float:
        """Sequences of average length in one forward and backward."""
        if self.micro_batch_tokens is None:
            return self.micro_batch
        return self.micro_batch_tokens / self.mean_length

    @property
    def encoded_prompts(self) -> float:
        """Most prompts whose images one forward encodes; those that repeat are encoded once.

        Where tokens are bounded, each brings its shortest response.
        """
        sequences = self.micro_batch
        if self.micro_batch_tokens is not None:
            sequences = max(1.0, self.micro_batch_tokens // (self.mean_prompt + 1))
        return min(sequences, max(1.0, self.prompts))


def training_of(config: Config, gpus: int) -> Training:
    """What DeepSpeed will do; `deepspeed.config` goes before the settings' own."""
    zero = dict(config.deepspeed.config.get("zero_optimization", {}))
    is_bf16 = config.model.dtype == "bfloat16"
    stage = int(zero.get("stage", config.deepspeed.zero_stage))
    lora = config.model.lora
    return Training(
        stage=stage,
        gpus=gpus,
        parameter_bytes=2 if is_bf16 else 4,
        has_master=is_bf16 or stage >= 1,
        freeze_vision=config.train.freeze_vision,
        lora_rank=lora.rank if lora else 0,
        checkpointing=config.train.gradient_checkpointing,
        offload_optimizer=_offloads(zero, "offload_optimizer"),
        offload_parameters=_offloads(zero, "offload_param"),
        reduce_bucket=int(zero.get("reduce_bucket_size", 5e8)),
        overlaps=bool(zero.get("overlap_comm", False)),
        live_parameters=int(zero.get("stage3_max_live_parameters", 1e9)),
    )


def workload_of(config: Config, architecture: Architecture, scenario: Scenario) -> Workload:
    """What one rank does in a step."""
    rollout, train, care = config.rollout, config.train, config.care
    is_care = config.algorithm == "care"
    reflects = is_care and care.reflection.enabled
    patches = 0
    if architecture.vision is not None:
        patches = scenario.images * _patches(config, architecture.vision, scenario)
        patches = min(patches, config.prompt.max_prompt_tokens * architecture.vision.merge**2)
    merged = patches // architecture.vision.merge**2 if architecture.vision else 0
    prompt = config.prompt.max_prompt_tokens
    reflection = (care.reflection.max_new_tokens or rollout.max_new_tokens) if reflects else 0
    context = prompt + rollout.max_new_tokens + reflection
    tokens = train.micro_batch_tokens
    trained = rollout.group_size
    if is_care:
        trained = min(trained, care.max_negatives + 1) + reflects
    return Workload(
        prompt=prompt,
        response=rollout.max_new_tokens,
        context=context,
        patches=patches,
        mean_prompt=min(prompt, merged + scenario.text_tokens),
        mean_response=max(1.0, rollout.max_new_tokens * scenario.mean_response_share),
        prompts=train.prompts_per_step / scenario.gpus,
        group_size=rollout.group_size,
        trained_per_group=trained,
        micro_batch=train.micro_batch_size if tokens is None else max(1.0, tokens / context),
        micro_batch_tokens=tokens,
        packing=train.packing,
        generated_at_once=rollout.batch_size,
        passes=train.num_iterations,
        optimizer_steps=train.num_iterations * train.mini_batches,
        attention=config.model.attention,
        is_care=is_care,
        has_reference=config.loss.kl_coef != 0,
        scores_old=train.num_iterations * train.mini_batches > 1,
        engine=rollout.engine,
        vllm=getattr(rollout, "vllm", None),
    )


def with_micro_batch(work: Workload, share: float) -> tuple[str, Workload]:
    """The setting that makes micro-batches `share` of what they are, and the workload with it."""
    if work.micro_batch_tokens is None:
        size = max(1, int(work.micro_batch * share))
        return f"train.micro_batch_size={size}", replace(work, micro_batch=size)
    tokens = max(work.context, int(work.micro_batch_tokens * share))
    smaller = replace(work, micro_batch=tokens / work.context, micro_batch_tokens=tokens)
    return f"train.micro_batch_tokens={tokens}", smaller


def _offloads(zero: dict[str, Any], key: str) -> bool:
    return dict(zero.get(key) or {}).get("device", "none") != "none"


def _patches(config: Config, vision: VisionShape, scenario: Scenario) -> int:
    """Patches of one image, scaled as Qwen's `smart_resize` does (transformers, qwen2_vl)."""
    largest = config.model.max_pixels or _PROCESSOR_PIXELS
    pixels = largest if scenario.image_pixels is None else min(scenario.image_pixels, largest)
    pixels = max(pixels, config.model.min_pixels or 0)
    side = vision.patch * vision.merge
    return max(1, math.floor(pixels / side**2)) * vision.merge**2
