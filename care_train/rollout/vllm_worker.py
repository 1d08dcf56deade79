"""What runs inside vLLM's workers: weights in, checked, and the ban on special tokens.

vLLM mixes `WeightReceiver` into its worker (`worker_extension_cls`). It imports this module in
every worker process before the model is built, which is when the patches are due.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch
from vllm.lora.layers import BaseLayerWithLoRA  # pyright: ignore[reportMissingImports]
from vllm.v1.sample.logits_processor import (  # pyright: ignore[reportMissingImports]
    LogitsProcessor,
)
from vllm.v1.worker.gpu.sample.logits_processor import (  # pyright: ignore[reportMissingImports]
    LogitsProcessor as GpuLogitsProcessor,
)

from care_train.compat import patch_vllm_on_cpu
from care_train.rollout.weight_channel import Broadcast, Call, join
from care_train.rollout.weight_sync import (
    ADAPTER_ID,
    SentTensor,
    checksum,
    find_adapter_failures,
    find_failures,
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
    a failure. A server's workers call `care_open` before the first one."""

    device: torch.device
    model_runner: Any
    _care_broadcast: Broadcast | None = None
    _care_filled: dict[str, list[SentTensor]]
    _care_adapter: dict[str, torch.Tensor]
    _care_has_base = False
    """Whether the base weights of this sender were received whole and checked."""

    @_in_words
    def care_open(self, call: Call, host: str) -> str | None:
        """Join the weight channel of the trainer, whose request came from `host`; says why not."""
        from vllm.distributed import get_tp_group  # pyright: ignore[reportMissingImports]

        group = get_tp_group()
        self._care_broadcast, self._care_has_base = None, False
        self._care_broadcast = join(call, host, 1 + group.rank_in_group, 1 + group.world_size)

    @_in_words
    def care_check_device(self) -> str | None:
        """Why the GPU is of no more use: a kernel that failed leaves its error to every later
        call. This one waits for nothing, as a broadcast may hang."""
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).query()
        return None

    def care_begin(self) -> None:
        """Forget what was sent before."""
        self._care_filled, self._care_adapter = {}, {}

    @_in_words
    def care_receive(self, tensors: Sequence[SentTensor], num_bytes: int) -> str | None:
        """Take one bucket of so many bytes from the channel and load its tensors, which lie there
        in this order; says what could not be loaded."""
        broadcast, self._care_broadcast = self._care_broadcast, None
        if broadcast is None:
            return "the server's workers have not met the trainer"
        bucket = torch.empty(num_bytes, dtype=torch.uint8, device=self.device)
        broadcast(bucket)
        # Only now: a channel that failed within a broadcast cannot be used again.
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
                filled = set(model.load_weights([(sent.name, tensor)]))
        # What vLLM's loaders raise on unknown names and wrong shapes.
        except (ValueError, KeyError, AttributeError, AssertionError, RuntimeError) as error:
            return f"{sent.name!r} {sent.shape}: vLLM could not load it: {error}"
        if not filled:
            return f"{sent.name!r}: vLLM has no parameter of this name"
        for parameter in filled:
            self._care_filled.setdefault(parameter, []).append(sent)
        return None

    @_in_words
    def care_failure(self) -> str | None:
        """What is wrong with the model after the last tensor."""
        # An adapter may come alone, to base weights that were checked when they were sent.
        if self._care_filled or not self._care_has_base:
            self._care_has_base = False
            with _without_wrappers(self.model_runner.get_model()) as model:
                failures = find_failures(model, self._care_filled)
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
