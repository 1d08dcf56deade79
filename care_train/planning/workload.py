"""What a rank holds and does in a step, in numbers: from a configuration and its model's sizes.

The model is built on the meta device: no weights are read.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from care_train.config import Config
from care_train.hub import model_folder
from care_train.models.folder import read_config
from care_train.models.load import auto_class
from care_train.models.tiny import TINY_KINDS, tiny_config

_FOLDER = Path(__file__).parent / "backbones"
BACKBONES = tuple(sorted(path.stem for path in _FOLDER.glob("*.json")))
"""The paper's backbones (Sec. 8.2), whose configurations ship with this package."""


@dataclass(frozen=True)
class Architecture:
    """What the formulas need to know of a model. Counts are of parameters, tied ones once."""

    name: str
    text: Any
    """transformers' configuration of the language model."""
    vision: Any
    """That of the vision tower; None: text only."""
    has_query_norm: bool
    """Queries and keys have RMS norms of their own (Qwen3)."""
    num_parameters: int
    num_vision: int
    """Of them in the vision tower."""
    lora_width: int
    """Inputs and outputs of all linear layers of the language model but the head, which LoRA
    adapts: an adapter has rank x (inputs + outputs) parameters."""
    largest_layer: int
    """Parameters of the largest module that ZeRO-3 gathers at once."""

    @property
    def query_width(self) -> int:
        """Query heads times their width."""
        return self.text.num_attention_heads * self._head_dim

    @property
    def key_width(self) -> int:
        """Key heads times their width; the values' too."""
        heads = getattr(self.text, "num_key_value_heads", None) or self.text.num_attention_heads
        return heads * self._head_dim

    @property
    def _head_dim(self) -> int:
        head_dim = getattr(self.text, "head_dim", None)
        return head_dim or self.text.hidden_size // self.text.num_attention_heads

    @property
    def intermediate(self) -> int:
        """Width of a token's MLP: in a mixture of experts, of those chosen for it together."""
        experts = getattr(self.text, "num_experts_per_tok", None)
        return experts * self.text.moe_intermediate_size if experts else self.text.intermediate_size


def read_architecture(path: str) -> Architecture:
    """The sizes of a Hugging Face folder, one of `BACKBONES` or a tiny model.

    Raises:
        ValueError: neither a folder with a config.json nor a known name.
    """
    config = _read_config(path)
    with torch.device("meta"):
        model = auto_class(config).from_config(config)
    return describe(model, Path(path).name)


def describe(model: Any, name: str) -> Architecture:
    """The sizes of a transformers model, on any device."""
    visual = getattr(model.base_model, "visual", None)
    head = model.get_output_embeddings()
    in_vision = set() if visual is None else set(visual.modules())
    modules = dict(model.named_modules())
    return Architecture(
        name=name,
        text=model.config.get_text_config(),
        vision=None if visual is None else model.config.vision_config,
        has_query_norm=any(key.endswith(".q_norm") for key in modules),
        num_parameters=_count(model),
        num_vision=0 if visual is None else _count(visual),
        lora_width=sum(
            module.in_features + module.out_features
            for module in modules.values()
            if isinstance(module, torch.nn.Linear) and module is not head
            if module not in in_vision
        ),
        largest_layer=max(_count(module, recurse=False) for module in modules.values()),
    )


def _count(module: torch.nn.Module, *, recurse: bool = True) -> int:
    return sum(parameter.numel() for parameter in module.parameters(recurse))


def _read_config(path: str) -> Any:
    if path in TINY_KINDS:
        return tiny_config(path)
    name = backbone_of(path)
    if name is not None and not (Path(path) / "config.json").is_file():
        values = json.loads((_FOLDER / f"{name}.json").read_text())
        return AutoConfig.for_model(values.pop("model_type"), **values)
    folder = model_folder(path, with_weights=False)
    if not folder.is_dir():
        raise ValueError(
            f"model.path: {path}: no such folder; wanted a Hugging Face model folder, a model of "
            f"the Hub (ORG/NAME), one of {', '.join(TINY_KINDS)}, or a folder named "
            f"{', '.join(BACKBONES)} (with or without -Instruct)"
        )
    return read_config(folder)


def backbone_of(path: str) -> str | None:
    """Which backbone a path or hub name means by its last part; None: none of them."""
    wanted = Path(path).name.lower().removesuffix("-thinking").removesuffix("-instruct")
    return next((n for n in BACKBONES if n.lower().removesuffix("-instruct") == wanted), None)


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
        return self.config.model.lora.rank

    @property
    def freezes_vision(self) -> bool:
        return self.config.model.train_vision is False or bool(self.lora_rank)

    @property
    def num_trained(self) -> int:
        """Parameters with a gradient: all, without the vision tower, or LoRA's r (in + out) per
        layer (arXiv:2106.09685, Sec. 4.1)."""
        if self.lora_rank:
            return self.lora_rank * self.model.lora_width
        frozen = self.model.num_vision if self.config.model.train_vision is False else 0
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
        vision = self.model.vision
        return 0 if vision is None else self.image_tokens * vision.spatial_merge_size**2

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
