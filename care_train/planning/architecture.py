"""A model's sizes from its configuration, on the meta device: no weights, no hub."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from care_train.models.load import auto_class
from care_train.models.tiny import TINY_KINDS, tiny_config

BACKBONES = tuple(
    sorted(path.stem for path in (Path(__file__).parent / "backbones").glob("*.json"))
)
"""The paper's backbones (Sec. 8.2), whose configurations ship with this package."""


@dataclass(frozen=True)
class TextShape:
    """Sizes of the language model."""

    layers: int
    hidden: int
    intermediate: int
    query_width: int
    """Query heads times their width."""
    key_width: int
    """Key heads times their width; the values' too."""
    num_heads: int
    vocab: int
    has_query_norm: bool
    """Queries and keys have RMS norms of their own (Qwen3)."""


@dataclass(frozen=True)
class VisionShape:
    """Sizes of the vision tower."""

    layers: int
    hidden: int
    intermediate: int
    patch: int
    """Side of a patch in pixels."""
    merge: int
    """Patches along a side that become one token."""
    window: int
    """Patches that attend to each other in windowed layers; 0: no such layers."""
    full_layers: int
    """Layers where all patches of an image attend to each other."""
    is_gated: bool
    """Gated MLP and RMS norms (Qwen2.5-VL); else GELU and layer norms (Qwen3-VL)."""


@dataclass(frozen=True)
class Architecture:
    """What the formulas need to know of a model. Counts are of parameters, tied ones once."""

    name: str
    text: TextShape
    vision: VisionShape | None
    num_parameters: int
    num_vision: int
    num_embedding: int
    """The input embedding, which is read but not multiplied."""
    is_tied: bool
    """The head is the input embedding."""
    num_linears: tuple[tuple[int, int], ...]
    """(inputs, outputs) of each linear layer of the language model but the head: what LoRA
    adapts."""
    largest_layer: int
    """Parameters of the largest module that ZeRO-3 gathers at once."""

    @property
    def num_head(self) -> int:
        """Parameters of the language-model head."""
        return self.text.vocab * self.text.hidden

    @property
    def num_multiplied(self) -> int:
        """Parameters of the language model that each token is multiplied with, head excluded."""
        body = self.num_parameters - self.num_vision - self.num_embedding
        return body if self.is_tied else body - self.num_head


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
    if visual is None:
        visual = getattr(model.base_model, "vision_tower", None)
    num_vision = 0 if visual is None else sum(p.numel() for p in visual.parameters())
    embedding = model.get_input_embeddings().weight
    head = model.get_output_embeddings()
    in_vision = set() if visual is None else set(visual.modules())
    linears = [
        (module.in_features, module.out_features)
        for module in model.modules()
        if isinstance(module, torch.nn.Linear) and module is not head and module not in in_vision
    ]
    vision_config = getattr(model.config, "vision_config", None)
    return Architecture(
        name=name,
        text=_text_shape(model.config.get_text_config(), model),
        vision=None if vision_config is None else _vision_shape(vision_config),
        num_parameters=sum(p.numel() for p in model.parameters()),
        num_vision=num_vision,
        num_embedding=embedding.numel(),
        is_tied=head.weight is embedding,
        num_linears=tuple(linears),
        largest_layer=_largest_layer(model),
    )


def _read_config(path: str) -> Any:
    if (Path(path) / "config.json").is_file():
        return AutoConfig.from_pretrained(path)
    name = backbone_of(path)
    if name is not None:
        file = Path(__file__).parent / "backbones" / f"{name}.json"
        values = json.loads(file.read_text())
        return AutoConfig.for_model(values.pop("model_type"), **values)
    if path in TINY_KINDS:
        return tiny_config(path)
    raise ValueError(
        f"model.path: {path}: no config.json there; wanted a Hugging Face model folder, one of "
        f"{', '.join(TINY_KINDS)}, or a folder named {', '.join(BACKBONES)} (with or without "
        "-Instruct)"
    )


def backbone_of(path: str) -> str | None:
    """Which backbone a path or hub name means by its last part; None: none of them."""
    wanted = Path(path).name.lower().removesuffix("-thinking").removesuffix("-instruct")
    return next((n for n in BACKBONES if n.lower().removesuffix("-instruct") == wanted), None)


def _text_shape(config: Any, model: Any) -> TextShape:
    head_dim = getattr(config, "head_dim", None)
    head_dim = head_dim or config.hidden_size // config.num_attention_heads
    return TextShape(
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        intermediate=config.intermediate_size,
        query_width=config.num_attention_heads * head_dim,
        key_width=(getattr(config, "num_key_value_heads", None) or config.num_attention_heads)
        * head_dim,
        num_heads=config.num_attention_heads,
        vocab=config.vocab_size,
        has_query_norm=any(name.endswith(".q_norm") for name, _ in model.named_modules()),
    )


def _vision_shape(config: Any) -> VisionShape:
    def first(*names: str, default: Any = None) -> Any:
        return next((getattr(config, n) for n in names if getattr(config, n, None)), default)

    layers = first("depth", "num_hidden_layers", default=0)
    patch, window = first("patch_size", default=14), first("window_size", default=0)
    full = first("fullatt_block_indexes", default=None)
    return VisionShape(
        layers=layers,
        hidden=first("hidden_size", "embed_dim", default=0),
        intermediate=first("intermediate_size", default=4 * first("hidden_size", default=0)),
        patch=patch,
        merge=first("spatial_merge_size", default=2),
        window=(window // patch) ** 2,
        full_layers=layers if full is None else len(full),
        is_gated=full is not None,
    )


def _largest_layer(model: Any) -> int:
    """The largest sum of parameters that belong to one module itself, without its children."""
    return max(sum(p.numel() for p in m.parameters(recurse=False)) for m in model.modules())
