"""A model's sizes from its configuration, on the meta device: no weights, no hub."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

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
