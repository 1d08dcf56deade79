"""LoRA adapters from the trainer into vLLM's LoRA layers, compared with what was sent every time.

vLLM wraps the layers that an adapter may change, and names the weights of wrapped layers otherwise
than its loaders do: base weights are loaded and checked with the wrappers taken off for the moment.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

_ADAPTER_ID = 1
_ENDS = (".lora_A.weight", ".lora_B.weight")
# vLLM's own list: `MaxLoRARanks`.
_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)


def is_adapter(name: str) -> bool:
    """Whether a tensor is half of an adapter."""
    return name.endswith(_ENDS)


def vllm_arguments(rank: int | None) -> dict[str, Any]:
    """What `LLM` must know to take an adapter of this rank; None: it gets none.

    Raises:
        ValueError: a rank larger than vLLM takes.
    """
    if rank is None:
        return {}
    if rank > _RANKS[-1]:
        raise ValueError(
            f"model.lora.rank: got {rank}, wanted at most {_RANKS[-1]} for "
            "rollout.vllm.lora=adapter"
        )
    return {"enable_lora": True, "max_lora_rank": next(r for r in _RANKS if r >= rank)}


def adapter_request() -> Any:
    """What makes vLLM sample with the adapter that was sent."""
    from vllm.lora.request import LoRARequest  # pyright: ignore[reportMissingImports]

    return LoRARequest("policy", _ADAPTER_ID, "sent by the trainer")


@contextmanager
def without_wrappers(model: Any) -> Iterator[None]:
    """vLLM's model as it was before its layers were wrapped for adapters."""
    from vllm.lora.layers import BaseLayerWithLoRA  # pyright: ignore[reportMissingImports]

    wrappers = {n: m for n, m in model.named_modules() if isinstance(m, BaseLayerWithLoRA)}
    for name, wrapper in wrappers.items():
        model.set_submodule(name, wrapper.base_layer)
    try:
        yield
    finally:
        for name, wrapper in wrappers.items():
            model.set_submodule(name, wrapper)


@torch.inference_mode()
def load_adapter(worker: Any, tensors: Mapping[str, torch.Tensor]) -> list[str]:
    """In vLLM's worker: make these the policy's adapter; what is wrong with what it then holds.

    Args:
        worker: vLLM's.
        tensors: all halves of the adapter, `<layer>.lora_A.weight` [rank, in] and
            `<layer>.lora_B.weight` [out, rank], the latter times the adapter's scale.
    """
    from vllm.lora.lora_model import LoRAModel  # pyright: ignore[reportMissingImports]
    from vllm.lora.peft_helper import PEFTHelper  # pyright: ignore[reportMissingImports]

    manager = worker.model_runner.lora_manager._adapter_manager
    rank = max(tensor.shape[0] for name, tensor in tensors.items() if name.endswith(_ENDS[0]))
    mapper = getattr(manager.model, "hf_to_vllm_mapper", None)
    adapter = LoRAModel.from_lora_tensors(
        _ADAPTER_ID,
        {f"base_model.model.{name}": tensor.clone() for name, tensor in tensors.items()},
        # B has the scale in it.
        PEFTHelper(r=rank, lora_alpha=rank, target_modules=[]),
        device="cpu",
        dtype=manager.lora_config.lora_dtype,
        weights_mapper=None if mapper is None else mapper.get_rename_mapper(),
    )
    sent = {name: (layer.lora_a, layer.lora_b) for name, layer in adapter.loras.items()}
    manager.remove_adapter(_ADAPTER_ID)
    manager.add_adapter(adapter)
    manager.activate_adapter(_ADAPTER_ID)
    return _failures(manager, sent)


def _failures(manager: Any, sent: dict[str, tuple[torch.Tensor, torch.Tensor]]) -> list[str]:
    slot = manager.lora_index_to_id.index(_ADAPTER_ID)
    failures, taken = [], set[str]()
    for name, module in manager.modules.items():
        parts = manager.packed_modules.get(name, [name])
        taken |= sent.keys() & set(parts)
        halves = [sent.get(part, (None, None)) for part in parts]
        stacks = (module.lora_a_stacked, module.lora_b_stacked)
        slices = (module.slice_lora_a, module.slice_lora_b)
        for which, (stack, own_share) in enumerate(zip(stacks, slices, strict=True)):
            # An embedding and the head have one tensor, not one for each of several parts.
            held = [part[slot] for part in (stack if isinstance(stack, tuple) else (stack,))]
            wanted = _of_this_rank(module, own_share, [pair[which] for pair in halves])
            failures += [
                f"adapter of {part!r}: vLLM holds other numbers than were sent"
                for part, own, whole in zip(parts, held, wanted, strict=True)
                if not _is_held(own, whole)
            ]
    left = [f"adapter of {name!r}: vLLM adapts no such layer" for name in sent.keys() - taken]
    return sorted(left) + failures


def _of_this_rank(
    module: Any, own_share: Callable[[Any], Any], parts: list[torch.Tensor | None]
) -> list[torch.Tensor | None]:
    if getattr(module, "tp_size", 1) == 1 or not any(part is not None for part in parts):
        return parts
    return own_share(parts) if len(parts) > 1 else [own_share(parts[0])]


def _is_held(held: torch.Tensor, wanted: torch.Tensor | None) -> bool:
    """Whether a slot has these numbers, and zeros beside them: vLLM pads the rank."""
    held = held.reshape(-1, held.shape[-1])
    if wanted is None:
        return not held.any()
    rows, columns = wanted.shape
    is_same = torch.equal(held[:rows, :columns].cpu(), wanted.to(held.dtype).cpu())
    return is_same and not held[rows:].any() and not held[:rows, columns:].any()
