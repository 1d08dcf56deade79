"""What a rank holds and does in a step, in numbers, from a configuration."""

import math
from dataclasses import dataclass

from care_train.config import Config
from care_train.planning.architecture import Architecture

GIB = 2**30
GPUS_PER_NODE = 8
_PROCESSOR_PIXELS = 28 * 28 * 1280
"""What Qwen's image processors scale to at most by default (transformers, qwen2_vl)."""


@dataclass(frozen=True)
class Device:
    """One GPU, or the CPU."""

    name: str
    memory: float
    """Bytes that a process can see."""
    is_cpu: bool = False

    @property
    def overhead(self) -> float:
        """Bytes of CUDA context, libraries' workspaces and NCCL's buffers: assumed, 1.5 GiB."""
        return 0.0 if self.is_cpu else 1.5 * GIB


_GPU_GIB = {
    "b200": 179.1,
    "h200": 140.4,
    "h100": 79.6,
    "a100": 79.3,
    "a100-40": 39.4,
    "l40s": 45.0,
    "rtx4090": 24.0,
}
"""Memory as nvidia-smi reports it, by the names that `--gpu` takes."""


def gpu(name: str) -> Device:
    """The GPU of a name.

    Raises:
        ValueError: an unknown one.
    """
    if name.lower() not in _GPU_GIB:
        raise ValueError(f"--gpu: got {name!r}, wanted one of {', '.join(_GPU_GIB)}")
    return Device(name.lower(), _GPU_GIB[name.lower()] * GIB)


@dataclass(frozen=True)
class Workload:
    """A configuration's run as one of its ranks sees it; lengths are in tokens, the longest."""

    config: Config
    model: Architecture
    device: Device
    gpus: int = 8
    images: int = 1
    """Per prompt."""
    image_pixels: int | None = None
    """Of one image; None: the most that the image processor leaves."""

    @property
    def stage(self) -> int:
        """ZeRO's."""
        return self.config.deepspeed.zero_stage

    @property
    def shards(self) -> int:
        """Ranks that share the optimiser's states."""
        return self.gpus if self.stage >= 1 else 1

    @property
    def element_bytes(self) -> int:
        """Of one weight or activation."""
        return 2 if self.config.model.dtype == "bfloat16" else 4

    @property
    def has_master(self) -> bool:
        """The optimiser works on fp32 copies of its own."""
        return self.element_bytes == 2 or self.stage >= 1

    @property
    def lora_rank(self) -> int:
        """0: all weights are trained."""
        return self.config.model.lora.rank if self.config.model.lora else 0

    @property
    def freezes_vision(self) -> bool:
        return self.config.train.freeze_vision or bool(self.lora_rank)

    @property
    def num_trained(self) -> int:
        """Parameters with a gradient: all, without the vision tower, or LoRA's r (in + out) per
        layer (arXiv:2106.09685, Sec. 4.1)."""
        if self.lora_rank:
            return self.lora_rank * self.model.lora_width
        frozen = self.model.num_vision if self.config.train.freeze_vision else 0
        return self.model.num_parameters - frozen

    @property
    def num_held(self) -> int:
        """All parameters, LoRA's adapters beside the weights they adapt."""
        return self.model.num_parameters + (self.num_trained if self.lora_rank else 0)

    @property
    def reflection(self) -> int:
        """Longest reflection."""
        if self.config.algorithm != "care" or not self.config.care.reflection.enabled:
            return 0
        return self.config.longest_reflection

    @property
    def prompt(self) -> int:
        """Longest prompt, images expanded."""
        return self.config.prompt.max_prompt_tokens

    @property
    def context(self) -> int:
        """Longest sequence: a reflection follows another response's rationale."""
        return self.prompt + self.config.rollout.max_new_tokens + self.reflection

    @property
    def image_tokens(self) -> int:
        """Tokens of a prompt's images, scaled as Qwen's `smart_resize` does (transformers,
        qwen2_vl)."""
        if self.model.vision is None:
            return 0
        largest = self.config.model.max_pixels or _PROCESSOR_PIXELS
        pixels = largest if self.image_pixels is None else min(self.image_pixels, largest)
        pixels = max(pixels, self.config.model.min_pixels or 0)
        vision = self.model.vision
        each = max(1, math.floor(pixels / (vision.patch_size * vision.spatial_merge_size) ** 2))
        return min(self.images * each, self.prompt)

    @property
    def patches(self) -> int:
        """Vision patches of a prompt."""
        return (
            self.image_tokens * self.model.vision.spatial_merge_size**2 if self.model.vision else 0
        )

    @property
    def prompts(self) -> float:
        """Prompts per rank and step."""
        return self.config.train.prompts_per_step / self.gpus

    @property
    def trained_per_group(self) -> int:
        """Sequences per prompt that reach the optimiser, at most."""
        size = self.config.rollout.group_size
        if self.config.algorithm != "care":
            return size
        return min(size, self.config.care.max_negatives + 1) + (self.reflection > 0)

    @property
    def micro_batch(self) -> float:
        """Sequences in one forward and backward, all as long as the longest."""
        tokens = self.config.train.micro_batch_tokens
        if tokens is None:
            return self.config.train.micro_batch_size
        return max(1.0, tokens / self.context)

    @property
    def encoded_prompts(self) -> float:
        """Most prompts whose images one forward encodes; those that repeat are encoded once.

        Where tokens are bounded, each brings its images and a response of one token.
        """
        sequences, tokens = self.micro_batch, self.config.train.micro_batch_tokens
        if tokens is not None:
            sequences = max(1.0, tokens // (self.image_tokens + 1))
        return min(sequences, max(1.0, self.prompts))
