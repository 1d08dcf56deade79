"""Bytes on one rank: what is there in each phase of a step, and the largest sum.

Model states: ZeRO (arXiv:1910.02054, Sec. 3.1), and as DeepSpeed 0.19's
`estimate_zero2_model_states_mem_needs` and `estimate_zero3_model_states_mem_needs` count them.

Activations, what autograd keeps for the backward: counted operation by operation over the layers of
Qwen2.5-VL and Qwen3-VL in transformers 5.19, in the manner of arXiv:2205.05198, Sec. 4.1, for
attention that keeps no score matrix. `b` is the bytes of an element.
"""

from dataclasses import dataclass
from typing import Any

import torch

from care_kernels.chunks import chunk_rows
from care_train.planning.workload import GIB, GPUS_PER_NODE, Workload
from care_train.rollout.weight_sync import BUCKET_BYTES

PHASES = ("load", "generate", "log_probs", "train", "step", "sync")
"""load: before ZeRO shards. log_probs: forwards without gradient. train: forward and backward.
step: the optimiser's. sync: weights to the rollout engine."""

_RESIDENT = PHASES[1:]

_ADAM_BYTES = 8
"""Two fp32 moments per trained parameter."""


@dataclass(frozen=True)
class Item:
    """Something that takes memory."""

    name: str
    num_bytes: float
    phases: tuple[str, ...]
    """When it is there."""


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes on one rank."""

    items: tuple[Item, ...]
    limit: float
    """What the device has."""

    def phase_bytes(self, phase: str) -> float:
        """All that is there in a phase."""
        return sum(item.num_bytes for item in self.items if phase in item.phases)

    def item_bytes(self, *names: str) -> float:
        """The bytes of items; 0 for one that is not there."""
        return sum(item.num_bytes for item in self.items if item.name in names)

    @property
    def peak_phase(self) -> str:
        """When most is there."""
        return max(PHASES, key=self.phase_bytes)

    @property
    def peak(self) -> float:
        """The most bytes at any time."""
        return self.phase_bytes(self.peak_phase)

    @property
    def fits(self) -> bool:
        """With 5 % to spare, which the allocator loses to fragments."""
        return self.peak <= 0.95 * self.limit


def plan_memory(work: Workload) -> MemoryPlan:
    """Every item of one rank's memory; empty ones are left out."""
    items = (
        *_state_items(work),
        *_rollout_items(work),
        *_passing_items(work),
        Item("context and libraries", work.device.overhead, PHASES),
    )
    return MemoryPlan(tuple(item for item in items if item.num_bytes > 0), work.device.memory)


def host_bytes(work: Workload) -> float:
    """Main memory of one node: the weights that each process reads on its way to the device, what
    offloading fills with master weights, moments and fp32 gradients, and a sleeping vLLM's weights
    under `lora: adapter`."""
    ranks, b, rollout = min(GPUS_PER_NODE, work.gpus), work.element_bytes, work.config.rollout
    total = ranks * work.num_held * float(b)
    if rollout.vllm_in_process and rollout.vllm.lora == "adapter":
        total += ranks * model_bytes(work) / rollout.vllm.tensor_parallel_size
    if work.config.deepspeed.offloads("optimizer"):
        total += ranks * work.num_trained / work.shards * (4 + _ADAM_BYTES + 4 + b)
    return total


def checkpoint_bytes(work: Workload) -> float:
    """What a checkpoint holds over all ranks: weights, and the optimiser's fp32 states."""
    states = _ADAM_BYTES + (4 if work.has_master else 0)
    return float(work.num_held * work.element_bytes + states * work.num_trained)


def model_bytes(work: Workload) -> float:
    """All weights, as in `final/`."""
    return float(work.model.num_parameters * work.element_bytes)


def _state_items(work: Workload) -> list[Item]:
    b, is_sharded, deepspeed = work.element_bytes, work.stage == 3, work.config.deepspeed
    parameters = work.num_held * b / (work.gpus if is_sharded else 1)
    own = work.num_trained / work.shards
    gathered = 0.0
    if is_sharded:
        # Whole parameters kept at once, and one layer more; on one rank these are copies too.
        live = int(deepspeed.zero.get("stage3_max_live_parameters", 1e9))
        gathered = float(min(live + work.model.largest_layer, work.num_held) * b)
    on_device = not deepspeed.offloads("optimizer")
    # With LoRA the reference is the policy without its adapters.
    copies_reference = work.config.loss.kl_coef != 0 and not work.lora_rank
    # ZeRO-3 allocates gradients and their buckets once, the other stages for each backward.
    in_backward = _RESIDENT if is_sharded else ("train",)
    after_backward = _RESIDENT if is_sharded else ("train", "step")
    return [
        Item("parameters", 0.0 if deepspeed.offloads("param") else parameters, _RESIDENT),
        Item("whole model before sharding", model_bytes(work), ("load",)),
        Item("fp32 master weights", 4 * own * (work.has_master and on_device), _RESIDENT),
        Item("optimiser states", _ADAM_BYTES * own * on_device, _RESIDENT),
        Item("gradients", _gradient_bytes(work), after_backward),
        Item("gradient reduce buckets", _bucket_bytes(work), in_backward),
        Item("reference model", model_bytes(work) * copies_reference, PHASES),
        Item("parameters gathered by ZeRO-3", gathered, ("log_probs", "train")),
        Item("fp32 gradients and AdamW temporaries", _step_bytes(work, own) * on_device, ("step",)),
    ]


def _gradient_bytes(work: Workload) -> float:
    """Gradients between backward and step: sharded from ZeRO-2 on."""
    whole = float(work.num_trained * work.element_bytes)
    if work.stage < 2:
        return whole
    return 0.0 if work.config.deepspeed.offloads("optimizer") else whole / work.gpus


def _bucket_bytes(work: Workload) -> float:
    """Where ZeRO 1-3 collects gradients to reduce (stage_1_and_2.py `setup_buckets`, stage3.py).

    It is allocated in full whatever the model's size; on a CPU untouched pages cost nothing.
    """
    zero = work.config.deepspeed.zero
    if work.stage == 0:
        return 0.0
    elements = int(zero.get("reduce_bucket_size", 5e8))
    if work.device.is_cpu:
        elements = min(elements, work.num_trained)
    is_doubled = zero.get("overlap_comm", False) and work.stage < 3
    return float(elements * work.element_bytes * (2 if is_doubled else 1))


def _step_bytes(work: Workload, own: float) -> float:
    """The step's temporaries: an fp32 copy of the gradients, and AdamW's denominator.

    torch's foreach AdamW, chosen on GPUs, makes sqrt(v) of all parameters at once (torch
    optim/adamw.py); on a CPU it makes two per tensor, which are all parameters where ZeRO has
    flattened them. ZeRO 1-2 flatten a rank's gradients before converting them.
    """
    temporaries = 4 * own
    if work.device.is_cpu:
        temporaries = 8 * own if work.stage >= 1 else 0.0
    return temporaries + (4 * own if work.has_master else 0.0)


def _rollout_items(work: Workload) -> list[Item]:
    rollout, whole = work.config.rollout, model_bytes(work)
    if rollout.engine == "transformers":
        copy = whole if work.stage == 3 else 0.0
        return [
            Item("rollout copy of the model", copy, PHASES),
            Item("KV cache and generation", _generation_bytes(work), ("generate",)),
        ]
    # As gathered, and in vLLM's precision.
    bucket = BUCKET_BYTES * (2 if work.stage == 3 else 1)
    if not rollout.vllm_in_process:
        # To a server it goes as one, of its parts.
        return [Item("weight sync bucket", bucket + BUCKET_BYTES, ("sync",))]
    vllm = rollout.vllm
    share = vllm.gpu_memory_utilization * work.device.memory
    if work.device.is_cpu:
        share = whole / vllm.tensor_parallel_size + GIB
    sleeps = not work.device.is_cpu
    # CARE runs the old policy between rollouts and reflections, both of which vLLM samples.
    awake = ("generate", "sync", *(("log_probs",) if work.config.algorithm == "care" else ()))
    # Level-2 sleep leaves about a GiB of CUDA graphs and workspaces: assumed.
    asleep = tuple(phase for phase in PHASES if phase not in awake)
    return [
        Item("vLLM", share, awake if sleeps else PHASES),
        Item("vLLM asleep", GIB if sleeps else 0.0, asleep),
        Item("weight sync bucket", bucket, ("sync",)),
    ]


def _generation_bytes(work: Workload) -> float:
    """transformers' generate: the KV cache, the prefill's widest layer, and the sampler's rows.

    The sampler holds fp32 scores twice and fp64 probabilities and their sums per vocabulary entry,
    after the model's own logits.
    """
    model, b, rollout = work.model, work.element_bytes, work.config.rollout
    sequences = min(rollout.batch_size, max(1.0, work.prompts * rollout.group_size))
    # A reflection is generated from a prompt and a forced rationale.
    prefill = work.context - rollout.max_new_tokens
    cache = sequences * work.context * 2 * model.text.num_hidden_layers * model.key_width * b
    layer = sequences * prefill * 3 * b * (model.intermediate + model.text.hidden_size)
    sampler = sequences * model.text.vocab_size * (b + 4 + 4 + 8 + 8)
    return cache + max(layer, sampler)


def _passing_items(work: Workload) -> list[Item]:
    text, b = work.model.text, work.element_bytes
    rows = round(work.micro_batch * work.config.rollout.max_new_tokens)
    # Exponentials in bfloat16, or float32 logits where the head is float32.
    chunk = chunk_rows(
        rows,
        text.vocab_size,
        text.hidden_size,
        logit_bytes=b,
        device=torch.device("cpu" if work.device.is_cpu else "cuda"),
        sums_weight_gradient=not work.lora_rank,
    )
    # dX twice, and dW: one chunk's is the gradient itself, several are summed in fp32 and cast.
    gradients = rows * text.hidden_size * 2.0 * b
    if not work.lora_rank:
        several = 4.0 if b == 4 else 4.0 + b
        gradients += text.vocab_size * text.hidden_size * (float(b) if rows <= chunk else several)
    suffix = ", checkpointed" if work.config.train.gradient_checkpointing else ""
    return [
        Item(f"activations of the language model{suffix}", text_activation_bytes(work), ("train",)),
        Item(f"activations of the vision tower{suffix}", _vision_activations(work), ("train",)),
        Item("loss: chunk of logits", float(chunk * b * text.vocab_size), ("train", "log_probs")),
        Item("loss: gradients of hidden states and head", gradients, ("train",)),
        Item("forward without gradient", _forward_bytes(work), ("log_probs",)),
    ]


def text_activation_bytes(work: Workload) -> float:
    """The language model over one micro-batch of the longest sequences.

    With gradient checkpointing (arXiv:1604.06174): each layer's input, and one layer in full.
    """
    text, b = work.model.text, work.element_bytes
    tokens = work.micro_batch * work.context
    layer = tokens * _text_layer_bytes(work) + _score_matrix_bytes(work)
    kept = text.num_hidden_layers * layer
    if work.config.train.gradient_checkpointing:
        kept = text.num_hidden_layers * tokens * b * text.hidden_size + layer
    # The last norm, and its output where the loss's rows are taken from it.
    ends = tokens * (_rms_norm_bytes(text.hidden_size, b) + b * text.hidden_size)
    return kept + ends + _mask_bytes(work)


def _vision_activations(work: Workload) -> float:
    """The vision tower over one micro-batch's images; every prompt brings its own.

    Frozen, it keeps nothing and passes one block's through.
    """
    vision, b = work.model.vision, work.element_bytes
    if vision is None or not work.patches:
        return 0.0
    patches = work.encoded_prompts * work.patches
    block = patches * _vision_layer_bytes(vision, b)
    pixels = patches * 3 * 2 * vision.patch_size**2 * (4 + b)
    if work.freezes_vision:
        return pixels + block
    if work.config.train.gradient_checkpointing:
        return pixels + vision.depth * patches * b * vision.hidden_size + block
    return pixels + vision.depth * block


def _forward_bytes(work: Workload) -> float:
    """One forward without gradient: the widest layer, of the language model or the vision tower."""
    model, vision, b = work.model, work.model.vision, work.element_bytes
    tokens = work.micro_batch * work.context
    layer = tokens * 3 * b * (model.intermediate + model.text.hidden_size)
    block = 0.0
    if vision is not None:
        block = work.encoded_prompts * work.patches * _vision_layer_bytes(vision, b)
    return max(layer + _score_matrix_bytes(work), block) + _mask_bytes(work)


def _rms_norm_bytes(width: int, b: int) -> int:
    """Per token: the fp32 input, the normalised input (for the weight's gradient), the output."""
    return width * (4 + 2 * b)


def _text_layer_bytes(work: Workload) -> int:
    """Per token, kept by one decoder layer.

    Two norms; rotated queries, keys and values (repeated to the query heads, since a padding mask
    rules out grouped attention), the attention's output twice and its fp32 normaliser; gate, up,
    silu(gate) and their product.
    """
    model, text, b = work.model, work.model.text, work.element_bytes
    norms = 2 * _rms_norm_bytes(text.hidden_size, b)
    if model.has_query_norm:
        norms += (4 + b) * (model.query_width + model.key_width)
    attention = 5 * b * model.query_width + 4 * text.num_attention_heads
    return norms + attention + 4 * b * model.intermediate


def _vision_layer_bytes(vision: Any, b: int) -> int:
    """Per patch, kept by one block of the vision tower."""
    attention = 5 * b * vision.hidden_size
    if hasattr(vision, "fullatt_block_indexes"):
        norms = 2 * _rms_norm_bytes(vision.hidden_size, b)
        return norms + attention + 4 * b * vision.intermediate_size
    # Layer norms keep input and output; GELU its input and output.
    return 4 * b * vision.hidden_size + attention + 2 * b * vision.intermediate_size


def _mask_bytes(work: Workload) -> float:
    """The mask [B, 1, T, T], as booleans and as the numbers that attention adds.

    FlashAttention needs lengths alone.
    """
    if work.config.model.attention == "flash_attention_2":
        return 0.0
    return _score_places(work) * (1 + work.element_bytes)


def _score_matrix_bytes(work: Workload) -> float:
    """Per layer, [B, heads, T, T] kept by `eager` attention: fp32 softmax, and what it becomes."""
    if work.config.model.attention != "eager":
        return 0.0
    kept = 4 if work.element_bytes == 4 else 4 + 2 * work.element_bytes
    return work.model.text.num_attention_heads * _score_places(work) * float(kept)


def _score_places(work: Workload) -> float:
    """Places of a head's score matrices: B x T x T, packed 1 x (B T) x (B T)."""
    if work.config.train.packing:
        return (work.micro_batch * work.context) ** 2
    return work.micro_batch * work.context**2
