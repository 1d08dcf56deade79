"""LoRA through peft: adapters put into a model that stays what it was to everyone else.

They are injected in place, without peft's wrapper, so that the model keeps its class, its names and
its methods; `training/weights.py` gives the weights that it amounts to.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from care_train.config import LoraSettings

_ADAPTER = "default"


def add_adapters(model: Any, settings: LoraSettings, seed: int) -> None:
    """Put adapters into `model` and freeze all else; they change nothing until they are trained.

    Args:
        model: a transformers model, on any device, meta too.
        settings: `model.adapters`.
        seed: of the first weights: every rank has the same.

    Raises:
        ValueError: the settings name no layer, or the head.
    """
    from peft import LoraConfig, inject_adapter_in_model

    linears = _linear_layers(model, settings)
    wholes = _named_modules(model, settings.modules_to_save)
    alpha: Any = settings.alpha  # Annotated as int; any number works.
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=alpha,
        target_modules=linears,
        modules_to_save=wholes or None,
    )
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        inject_adapter_in_model(config, model, _ADAPTER)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(model.dtype)


def has_adapters(model: nn.Module) -> bool:
    return hasattr(model, "peft_config")


@contextmanager
def without_adapters(model: nn.Module) -> Iterator[None]:
    """The model as it was before `add_adapters`; for forwards without gradients."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import ModulesToSaveWrapper

    kinds = (BaseTunerLayer, ModulesToSaveWrapper)
    layers = [module for module in model.modules() if isinstance(module, kinds)]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


def save_adapter(model: nn.Module, folder: Path, base: str) -> None:
    """Write a whole model's adapters alone, as peft and vLLM read them; `base` is their model."""
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    state = get_peft_model_state_dict(model, adapter_name=_ADAPTER)
    tensors = {f"base_model.model.{k}": v.detach().cpu().contiguous() for k, v in state.items()}
    config: Any = model.peft_config
    config = config[_ADAPTER]
    config.base_model_name_or_path, config.inference_mode = base, True
    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(str(folder))
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})


def _linear_layers(model: Any, settings: LoraSettings) -> list[str]:
    """Names of the linear layers to adapt: all but the head, and the vision tower unless asked."""
    head = model.get_output_embeddings()
    visual = getattr(model.base_model, "visual", None)
    if settings.vision and visual is None:
        raise ValueError("model.train_vision: got true, but the model has no vision tower")
    towers = set() if visual is None or settings.vision else set(visual.modules())
    linears = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not head and module not in towers
    ]
    if isinstance(settings.target_modules, str):
        return linears
    for end in settings.target_modules:
        if not any(_ends(name, end) for name in linears):
            known = ", ".join(sorted({name.rpartition(".")[2] for name in linears}))
            raise ValueError(
                f"model.lora.target_modules: {end!r} is no linear layer that can be adapted "
                f"(model.train_vision={str(settings.vision).lower()}); there are {known}"
            )
    return [n for n in linears if any(_ends(n, end) for end in settings.target_modules)]


def _named_modules(model: Any, ends: Sequence[str]) -> list[str]:
    """Names of the modules that are trained whole."""
    head, found = model.get_output_embeddings(), []
    tied = (head, model.get_input_embeddings())
    for end in ends:
        chosen = {name: m for name, m in model.named_modules() if name and _ends(name, end)}
        if not chosen:
            raise ValueError(f"model.lora.modules_to_save: the model has no module {end!r}")
        for name, module in chosen.items():
            if any(part in tied for part in module.modules()):
                raise ValueError(
                    f"model.lora.modules_to_save: {name!r} is, or holds, an embedding or the head, "
                    "which stay as they are: the fused loss needs a plain head; train all weights "
                    "(model.lora.rank=0), or leave it out"
                )
        found += chosen
    return found


def _ends(name: str, end: str) -> bool:
    return name == end or name.endswith(f".{end}")
