"""The policy's weights under the names of its Hugging Face folder, a bucket at a time."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from care_train.models.lora import has_adapters
from care_train.rollout.engine import WeightParts

_PEFT_PREFIX = "base_model.model."


@dataclass(frozen=True)
class Weight:
    """One tensor of the folder and the parameters it is made of."""

    name: str
    parameters: tuple[nn.Parameter, ...]
    make: Callable[[], torch.Tensor]
    """Makes the tensor; under ZeRO-3 to be called while the parameters are gathered."""

    @property
    def num_bytes(self) -> int:
        # A parameter that ZeRO-3 shards is empty; DeepSpeed keeps its size in `ds_numel`.
        sizes = (getattr(p, "ds_numel", p.numel()) * p.element_size() for p in self.parameters)
        return sum(sizes)


def policy_weights(model: Any, parts: WeightParts = WeightParts.MERGED) -> list[Weight]:
    """The weights of a model under the names of its Hugging Face folder.

    Args:
        model: from transformers, with or without adapters.
        parts: whether adapters are merged into the layers they adapt, listed beside them, or listed
            alone. Listed ones are `<layer>.lora_A.weight` and `<layer>.lora_B.weight`, the latter
            times the adapter's scale.

    Raises:
        ValueError: an adapter that is not a plain sum (DoRA).
    """
    if not has_adapters(model):
        return [_plain(name, parameter) for name, parameter in model.named_parameters()]
    adapted = {name: m for name, m in model.named_modules() if hasattr(m, "get_delta_weight")}
    weights = []
    for name, parameter in model.named_parameters():
        owner = next((o for o in adapted if name.startswith(f"{o}.")), None)
        if owner is None:
            if ".original_module." not in name:
                weights.append(_plain(_folder_name(name), parameter))
        elif name == f"{owner}.base_layer.weight":
            own, layer = _folder_name(f"{owner}.weight"), adapted[owner]
            if any(getattr(layer, "use_dora", {}).get(name) for name in layer.active_adapters):
                raise ValueError(f"{own}: a DoRA adapter; wanted LoRA, which merges by addition")
            is_merged = parts is WeightParts.MERGED
            weights.append(_merged(own, parameter, layer) if is_merged else _plain(own, parameter))
        elif name.startswith(f"{owner}.base_layer."):
            weights.append(_plain(_folder_name(name.replace(".base_layer.", ".")), parameter))
    if parts is WeightParts.MERGED:
        return weights
    halves = [half for owner, layer in adapted.items() for half in _halves(owner, layer)]
    return halves if parts is WeightParts.ADAPTER else weights + halves


def whole_weights(model: Any) -> dict[str, torch.Tensor]:
    """All weights and buffers of a model's Hugging Face folder, on the model's device.

    The model must not be sharded.
    """
    with torch.no_grad():
        return {weight.name: weight.make() for weight in policy_weights(model)} | buffers(model)


def buffers(model: Any) -> dict[str, torch.Tensor]:
    """The model's persistent buffers, by name: what its folder holds beside the parameters."""
    saved = model.state_dict()
    return {name: buffer for name, buffer in model.named_buffers() if name in saved}


def drop_weights(model: nn.Module) -> None:
    """Free a model's memory for good, whoever still holds it."""
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = tensor.data.new_empty(0)


def tensor_bytes(tree: Any) -> int:
    """Bytes of all tensors in nested lists and mappings; a ZeRO-3 parameter counts its shard."""
    if isinstance(tree, torch.Tensor):
        shard = getattr(tree, "ds_tensor", tree)
        return shard.numel() * shard.element_size()
    if isinstance(tree, dict):
        tree = list(tree.values())
    return sum(map(tensor_bytes, tree)) if isinstance(tree, list) else 0


def stream(
    weights: Sequence[Weight],
    bucket_bytes: int,
    gathered: Callable[[Sequence[nn.Parameter]], AbstractContextManager[None]],
) -> Iterator[tuple[str, torch.Tensor]]:
    """Names and whole tensors; each tensor is valid until the iterator goes on.

    At most `bucket_bytes` are gathered at once, but for a single larger weight. `gathered` returns
    a block in which the given parameters are whole on every rank.
    """
    for bucket in _buckets(weights, bucket_bytes):
        with gathered([p for weight in bucket for p in weight.parameters]):
            for weight in bucket:
                with torch.no_grad():
                    tensor = weight.make()
                yield weight.name, tensor


def _buckets(weights: Sequence[Weight], bucket_bytes: int) -> list[list[Weight]]:
    """The weights in order, as many together as fit into `bucket_bytes`; a larger one alone."""
    result: list[list[Weight]] = []
    free = 0
    for weight in weights:
        if not result or weight.num_bytes > free:
            result.append([])
            free = bucket_bytes
        result[-1].append(weight)
        free -= weight.num_bytes
    return result


def _plain(name: str, parameter: nn.Parameter) -> Weight:
    return Weight(name, (parameter,), lambda: parameter.detach())


def _halves(owner: str, layer: Any) -> list[Weight]:
    [adapter] = layer.active_adapters
    a, b, scale = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight, layer.scaling[adapter]

    def scaled() -> torch.Tensor:
        return (b.detach().float() * scale).to(b.dtype)

    name = _folder_name(owner)
    return [_plain(f"{name}.lora_A.weight", a), Weight(f"{name}.lora_B.weight", (b,), scaled)]


def _merged(name: str, base: nn.Parameter, layer: Any) -> Weight:
    adapters = list(layer.active_adapters)
    own = tuple(p for n, p in layer.named_parameters() if not n.startswith("base_layer."))

    def make() -> torch.Tensor:
        # Summed in fp32 and rounded once: a delta is often smaller than bfloat16's steps.
        merged = base.detach().to(torch.float32, copy=True)
        for adapter in adapters:
            merged += layer.get_delta_weight(adapter)
        return merged.to(base.dtype)

    return Weight(name, (base, *own), make)


def _folder_name(name: str) -> str:
    parts = name.removeprefix(_PEFT_PREFIX).split(".")
    if "modules_to_save" in parts:
        place = parts.index("modules_to_save")
        del parts[place : place + 2]
    return ".".join(parts)
