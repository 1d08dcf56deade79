"""What runs inside vLLM's workers: weights in, checked, and the ban on special tokens.

vLLM mixes `WeightReceiver` into its worker (`worker_extension_cls`). It imports this module in
every worker process before the model is built, which is when the patches are due.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from vllm.lora.layers import BaseLayerWithLoRA  # pyright: ignore[reportMissingImports]
from vllm.v1.sample.logits_processor import (  # pyright: ignore[reportMissingImports]
    LogitsProcessor,
)
from vllm.v1.worker.gpu.sample.logits_processor import (  # pyright: ignore[reportMissingImports]
    LogitsProcessor as GpuLogitsProcessor,
)

from care_train.compat import patch_vllm_on_cpu
from care_train.rollout.weight_sync import (
    ADAPTER_ID,
    MEET_SECONDS,
    Broadcast,
    SentTensor,
    checksum,
    join_group,
)

if not torch.cuda.is_available():
    patch_vllm_on_cpu()


class BannedTokens(LogitsProcessor, GpuLogitsProcessor):
    """Sets the logits of banned ids to -inf for every request.

    vLLM's own means fall short: `logit_bias` is bounded, so a policy can outweigh it; `bad_words`
    and `allowed_token_ids` are lists per request, as long as the vocabulary.

    vLLM has two model runners, whose logits processors have different interfaces: the first runs
    on CPUs, the second (V2) on GPUs. This is one for both.
    """

    def __init__(self, vllm_config: Any, *_: Any) -> None:
        banned = torch.tensor(
            vllm_config.additional_config["care_banned_token_ids"], dtype=torch.int64
        )
        # vLLM cuts the head's padding off itself.
        self._banned = banned[banned < vllm_config.model_config.get_vocab_size()]

    def apply(self, logits: torch.Tensor, ctx: Any = None) -> torch.Tensor:
        """[rows, V] logits, changed in place."""
        # Moved at the first use: what the second runner's processors allocate when they are made
        # is among the weights, whose memory vLLM drops when it sleeps.
        self._banned = self._banned.to(logits.device)
        return logits.index_fill_(1, self._banned, -torch.inf)

    def is_argmax_invariant(self) -> bool:
        """False: the likeliest token may be banned."""
        return False

    def update_state(self, batch_update: Any) -> None:
        """The same for every request: nothing to keep."""


@dataclass(frozen=True)
class Copy:
    """A part of a sent tensor, and where vLLM's loaders copied it to."""

    sent: SentTensor
    held: torch.Tensor
    """The place in the model's parameter."""
    offset: int
    """The part's first element in the sent tensor."""
    strides: tuple[int, ...]
    """From one element to the next there, per dimension of `held`."""


class _Copies(TorchDispatchMode):
    """Within a block of it, notes every copy from the memory of one tensor."""

    def __init__(self, sent: SentTensor, tensor: torch.Tensor) -> None:
        super().__init__()
        self._sent, self._tensor = sent, tensor
        self.found: list[Copy] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is torch.ops.aten.copy_.default:
            held, part = args[0], args[1].expand(args[0].shape)
            if part.untyped_storage().data_ptr() == self._tensor.untyped_storage().data_ptr():
                offset = part.storage_offset() - self._tensor.storage_offset()
                self.found.append(Copy(self._sent, held, offset, part.stride()))
        return func(*args, **(kwargs or {}))


def _in_words(method: Callable[..., str | None]) -> Callable[..., str | None]:
    """Answer with what a method raises.

    vLLM reads its workers' answers up to the first that raised, and takes those of the others for
    answers to its next call: with several workers, none of its calls would be right any more.
    """

    @wraps(method)
    def answer(*arguments: Any) -> str | None:
        try:
            return method(*arguments)
        # NCCL, torch and vLLM raise whatever they like.
        except Exception as error:
            return f"{type(error).__name__}: {error}"

    return answer


class WeightReceiver:
    """The worker's side of a weight sync: begin, load or receive every tensor, then ask for
    a failure. A server's workers on GPUs call `care_open` before the first one."""

    device: torch.device
    model_runner: Any
    _care_broadcast: Broadcast | None = None
    _care_copies: list[Copy]
    _care_adapter: dict[str, torch.Tensor]
    _care_has_base = False
    """Whether the base weights of this run were received whole and checked."""

    @_in_words
    def care_open(self, unique_id: bytes) -> str | None:
        """Join the trainer's NCCL group; says why not."""
        from vllm.distributed import get_tp_group  # pyright: ignore[reportMissingImports]

        group, self._care_broadcast = get_tp_group(), None
        rank, size = 1 + group.rank_in_group, 1 + group.world_size
        self._care_broadcast = join_group(unique_id, rank, size, MEET_SECONDS)

    @_in_words
    def care_check_device(self) -> str | None:
        """Why the GPU is of no more use: a kernel that failed leaves its error to every later
        call. This one waits for nothing, as a broadcast may hang."""
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).query()
        return None

    def care_begin(self, keeps_base: bool = True) -> None:
        """Forget what was sent before, but for base weights that an adapter may come to."""
        self._care_copies, self._care_adapter = [], {}
        self._care_has_base &= keeps_base

    @_in_words
    def care_receive(self, tensors: Sequence[SentTensor], content: bytes | None) -> str | None:
        """Load tensors, which lie in this order in `content` or, without it, in the next broadcast;
        says what could not be loaded."""
        if content is not None:
            bucket = torch.frombuffer(bytearray(content), dtype=torch.uint8).to(self.device)
        else:
            broadcast, self._care_broadcast = self._care_broadcast, None
            if broadcast is None:
                return "the server's workers have not met the trainer"
            size = sum(sent.num_bytes for sent in tensors)
            bucket = torch.empty(size, dtype=torch.uint8, device=self.device)
            broadcast(bucket)
            # Only now: a group that failed within a broadcast cannot be used again.
            self._care_broadcast = broadcast
        start = 0
        for sent in tensors:
            end = start + sent.num_bytes
            # A copy, because a tensor's bytes need not start where its dtype may.
            tensor = bucket[start:end].clone().view(getattr(torch, sent.dtype)).reshape(sent.shape)
            start = end
            problem = self.care_load(sent, tensor)
            if problem is not None:
                return problem
        return None

    @torch.inference_mode()
    def care_load(self, sent: SentTensor, tensor: torch.Tensor) -> str | None:
        """Load one tensor into the live model; says why it could not be loaded."""
        if sent.is_adapter:
            self._care_adapter[sent.name] = tensor.clone()
            return None if checksum(tensor) == sent.checksum else f"{sent.name!r}: arrived changed"
        try:
            with _without_wrappers(self.model_runner.get_model()) as model:
                with _Copies(sent, tensor) as copies:
                    model.load_weights([(sent.name, tensor)])
        # What vLLM's loaders raise on unknown names and wrong shapes.
        except (ValueError, KeyError, AttributeError, AssertionError, RuntimeError) as error:
            return f"{sent.name!r} {sent.shape}: vLLM could not load it: {error}"
        self._care_copies += copies.found
        if copies.found:
            return None
        return f"{sent.name!r}: vLLM has no parameter of this name, or fills it without a copy"

    @_in_words
    def care_failure(self) -> str | None:
        """What is wrong with the model after the last tensor."""
        # An adapter may come alone, to base weights that were checked when they were sent.
        if self._care_copies or not self._care_has_base:
            self._care_has_base = False
            with _without_wrappers(self.model_runner.get_model()) as model:
                failures = find_failures(model, self._care_copies)
            if failures:
                return failures[0]
            self._care_has_base = True
        return next(iter(self._care_load_adapter()), None) if self._care_adapter else None

    @torch.inference_mode()
    def _care_load_adapter(self) -> list[str]:
        """Make what was received the policy's adapter, in vLLM's LoRA layers, and check it."""
        from vllm.lora.lora_model import LoRAModel  # pyright: ignore[reportMissingImports]
        from vllm.lora.peft_helper import PEFTHelper  # pyright: ignore[reportMissingImports]

        manager = self.model_runner.lora_manager._adapter_manager
        rank = max(t.shape[0] for name, t in self._care_adapter.items() if "lora_A" in name)
        mapper = getattr(manager.model, "hf_to_vllm_mapper", None)
        adapter = LoRAModel.from_lora_tensors(
            ADAPTER_ID,
            {f"base_model.model.{name}": t for name, t in self._care_adapter.items()},
            # Scale 1: B was sent with its scale.
            PEFTHelper(r=rank, lora_alpha=rank, target_modules=[]),
            device="cpu",
            dtype=manager.lora_config.lora_dtype,
            weights_mapper=None if mapper is None else mapper.get_rename_mapper(),
        )
        # Taken now: `add_adapter` replaces q, k and v by one fused entry.
        sent = {name: (layer.lora_a, layer.lora_b) for name, layer in adapter.loras.items()}
        manager.remove_adapter(ADAPTER_ID)
        manager.add_adapter(adapter)
        manager.activate_adapter(ADAPTER_ID)
        return find_adapter_failures(manager, sent)


@contextmanager
def _without_wrappers(model: Any) -> Iterator[Any]:
    """vLLM's model as it was before its layers were wrapped for adapters.

    Within the wrappers, the weights have other names than vLLM's loaders know.
    """
    wrappers = {n: m for n, m in model.named_modules() if isinstance(m, BaseLayerWithLoRA)}
    for name, wrapper in wrappers.items():
        model.set_submodule(name, wrapper.base_layer)
    try:
        yield model
    finally:
        for name, wrapper in wrappers.items():
            model.set_submodule(name, wrapper)


def find_failures(model: Any, copies: Sequence[Copy]) -> list[str]:
    """What is wrong with vLLM's model, without wrappers for adapters, after the last copy; for
    people. Due on all workers."""
    from vllm.distributed import get_tp_group  # pyright: ignore[reportMissingImports]

    group = get_tp_group()
    tensors = {**dict(model.named_parameters()), **_saved_buffers(model)}
    name_at = {tensor.untyped_storage().data_ptr(): name for name, tensor in tensors.items()}
    filled: dict[str, list[Copy]] = {name: [] for name in tensors}
    for copy in copies:
        if (name := name_at.get(copy.held.untyped_storage().data_ptr())) is not None:
            filled[name].append(copy)
    failures = []
    for name, own in filled.items():
        # A place counts once, however often it was written.
        own = list({(c.held.storage_offset(), c.held.shape): c for c in own}.values())
        whole, num_filled = tensors[name], sum(copy.held.numel() for copy in own)
        if not own:
            failures.append(f"no tensor was sent for vLLM's {name!r}")
        # vLLM pads a vocabulary with zeros.
        elif num_filled < whole.numel() and whole.count_nonzero() > sum(
            copy.held.count_nonzero() for copy in own
        ):
            names = ", ".join(copy.sent.name for copy in own)
            failures.append(f"vLLM's {name!r} was sent in part only: {names}")
    parts: dict[str, set[tuple[Any, ...]]] = {}
    for copy in copies:
        number = checksum(copy.held, copy.offset, copy.strides)
        part = (number, copy.offset, copy.strides, copy.held.shape)
        parts.setdefault(copy.sent.name, set()).add(part)
    ranks: list[Any] = [parts] * group.world_size
    if group.world_size > 1:
        torch.distributed.all_gather_object(ranks, parts, group=group.cpu_group)
    for sent in dict.fromkeys(copy.sent for copy in copies):
        # A part that several ranks hold alike counts once.
        held = sum(part[0] for part in set().union(*(own.get(sent.name, ()) for own in ranks)))
        if (held - sent.checksum) % 2**64:
            failures.append(
                f"{sent.name!r}: vLLM holds other numbers than were sent (checksum "
                f"{held % 2**64:016x}, sent {sent.checksum % 2**64:016x})"
            )
    return failures


def _saved_buffers(model: Any) -> dict[str, torch.Tensor]:
    """Buffers that belong to a checkpoint, and would be random here: vLLM started without one.

    Not the scales of an attention without quantisation, which vLLM sets to 1 after loading.
    """
    saved = model.state_dict()
    return {
        name: buffer
        for name, buffer in model.named_buffers()
        if name in saved and not (name.endswith("_scale") and bool((buffer == 1).all()))
    }


def find_adapter_failures(manager: Any, sent: Mapping[str, Sequence[torch.Tensor]]) -> list[str]:
    """What is wrong with the adapter in the first slot of vLLM's `LoRAModelManager`, for people.

    `sent` has names of layers, and A [rank, in] and B [out, rank] of each.
    """
    slot = manager.lora_index_to_id.index(ADAPTER_ID)
    failures, known = [], set[str]()
    for name, module in manager.modules.items():
        parts = manager.packed_modules.get(name, [name])
        known |= sent.keys() & set(parts)
        halves = [sent.get(part, (None, None)) for part in parts]
        stacks = (module.lora_a_stacked, module.lora_b_stacked)
        shares = (module.slice_lora_a, module.slice_lora_b)
        for which, (stack, share) in enumerate(zip(stacks, shares, strict=True)):
            # An embedding and the head have one tensor, not one for each of several parts.
            held = [part[slot] for part in (stack if isinstance(stack, tuple) else (stack,))]
            wanted: list[Any] = [half[which] for half in halves]
            if getattr(module, "tp_size", 1) > 1 and any(half is not None for half in wanted):
                wanted = share(wanted) if len(wanted) > 1 else [share(wanted[0])]
            failures += [
                f"adapter of {part!r}: vLLM holds other numbers than were sent"
                for part, own, whole in zip(parts, held, wanted, strict=True)
                if not _is_held(own, whole)
            ]
    unknown = [f"adapter of {name!r}: vLLM adapts no such layer" for name in sent.keys() - known]
    return sorted(unknown) + failures


def _is_held(held: torch.Tensor, wanted: torch.Tensor | None) -> bool:
    """Whether a slot has these numbers, and zeros beside them: vLLM pads the rank."""
    held = held.reshape(-1, held.shape[-1])
    if wanted is None:
        return not held.any()
    rows, columns = wanted.shape
    is_same = torch.equal(held[:rows, :columns].cpu(), wanted.to(held.dtype).cpu())
    return is_same and not held[rows:].any() and not held[:rows, columns:].any()
