"""Bytes of activations: what autograd keeps for the backward, and what passes through.

Counted operation by operation over transformers' Qwen2.5-VL and Qwen3-VL layers (5.19,
modeling_qwen2_5_vl.py and modeling_qwen3_vl.py), in the manner of arXiv:2205.05198, Sec. 4.1, for
attention that keeps no score matrix. `b` is the bytes of an element, 4 or 2.
"""

import torch

from care_kernels.chunks import chunk_rows
from care_train.planning.architecture import Architecture, TextShape, VisionShape
from care_train.planning.workload import Training, Workload


def rms_norm_bytes(width: int, b: int) -> int:
    """Per token: the fp32 input, the normalised input (for the weight's gradient), the output."""
    return width * (4 + 2 * b)


def text_layer_bytes(text: TextShape, b: int) -> int:
    """Per token, kept by one decoder layer.

    Two norms; rotated queries, keys and values (repeated to the query heads, since a padding mask
    rules out grouped attention), the attention's output twice and its fp32 normaliser; gate, up,
    silu(gate) and their product.
    """
    norms = 2 * rms_norm_bytes(text.hidden, b)
    if text.has_query_norm:
        norms += (4 + b) * (text.query_width + text.key_width)
    attention = 5 * b * text.query_width + 4 * text.num_heads
    return norms + attention + 4 * b * text.intermediate


def vision_layer_bytes(vision: VisionShape, b: int) -> int:
    """Per patch, kept by one block of the vision tower."""
    attention = 5 * b * vision.hidden
    if vision.is_gated:
        return 2 * rms_norm_bytes(vision.hidden, b) + attention + 4 * b * vision.intermediate
    # Layer norms keep input and output; GELU its input and output.
    return 4 * b * vision.hidden + attention + 2 * b * vision.intermediate


def mask_bytes(work: Workload, text: TextShape, b: int, length: int) -> float:
    """The mask [B, 1, T, T], as booleans and as the numbers that attention adds.

    FlashAttention needs lengths alone.
    """
    if work.attention == "flash_attention_2":
        return 0.0
    return _pairs(work, length) * (1 + b)


def _pairs(work: Workload, length: int) -> float:
    """Places of the score matrices of a micro-batch: B x T x T, packed 1 x (B T) x (B T)."""
    if work.packing:
        return (work.micro_batch * length) ** 2
    return work.micro_batch * length**2


def score_matrix_bytes(work: Workload, text: TextShape, b: int, length: int) -> float:
    """Per layer, [B, heads, T, T] kept by `eager` attention: fp32 softmax, and what it becomes."""
    if work.attention != "eager":
        return 0.0
    return text.num_heads * _pairs(work, length) * (4.0 if b == 4 else 4.0 + 2 * b)


def text_activation_bytes(architecture: Architecture, training: Training, work: Workload) -> float:
    """The language model over one micro-batch of the longest sequences.

    With gradient checkpointing (arXiv:1604.06174): each layer's input, and one layer in full.
    """
    text, b = architecture.text, training.parameter_bytes
    tokens = work.micro_batch * work.context
    layer = tokens * text_layer_bytes(text, b) + score_matrix_bytes(work, text, b, work.context)
    ends = tokens * (rms_norm_bytes(text.hidden, b) + b * text.hidden)
    if training.checkpointing:
        kept = text.layers * tokens * b * text.hidden + layer
    else:
        kept = text.layers * layer
    return kept + ends + mask_bytes(work, text, b, work.context)


def vision_activation_bytes(
    architecture: Architecture, training: Training, work: Workload
) -> float:
    """The vision tower over one micro-batch's images; every prompt brings its own.

    Frozen, it keeps nothing and passes one block's through.
    """
    vision, b = architecture.vision, training.parameter_bytes
    if vision is None or not work.patches:
        return 0.0
    patches = work.encoded_prompts * work.patches
    block = patches * vision_layer_bytes(vision, b)
    is_frozen = training.freeze_vision or bool(training.lora_rank)
    pixels = patches * 3 * 2 * vision.patch**2 * (4 + b)
    if is_frozen:
        return pixels + block
    if training.checkpointing:
        return pixels + vision.layers * patches * b * vision.hidden + block
    return pixels + vision.layers * block


def loss_chunk(
    architecture: Architecture, training: Training, work: Workload, kind: str
) -> tuple[int, int]:
    """Rows of logits that the fused loss holds at once, and the bytes of each logit.

    Exponentials in bfloat16, or float32 logits where the head is float32.
    """
    text, logit_bytes = architecture.text, training.parameter_bytes
    rows = chunk_rows(
        round(work.micro_batch * work.response),
        text.vocab,
        text.hidden,
        logit_bytes=logit_bytes,
        device=torch.device(kind),
        sums_weight_gradient=not training.lora_rank,
    )
    return rows, logit_bytes


def loss_chunk_bytes(
    architecture: Architecture, training: Training, work: Workload, kind: str
) -> float:
    """One chunk of the fused loss, instead of [B, T, V]."""
    rows, logit_bytes = loss_chunk(architecture, training, work, kind)
    return float(rows * logit_bytes * architecture.text.vocab)


def loss_gradient_bytes(
    architecture: Architecture, training: Training, work: Workload, kind: str
) -> float:
    """dX and dW of the fused loss: fp32 dW where there are several chunks, and its cast."""
    text, b = architecture.text, training.parameter_bytes
    rows = work.micro_batch * work.response
    hidden = rows * text.hidden * (b + b)
    if training.lora_rank:
        return hidden
    is_one_chunk = rows <= loss_chunk(architecture, training, work, kind)[0]
    # A lone chunk's dW is the gradient itself.
    weight = float(b) if is_one_chunk else (4.0 if b == 4 else 4.0 + b)
    return hidden + architecture.num_head * weight


def scoring_bytes(
    architecture: Architecture, training: Training, work: Workload, kind: str
) -> float:
    """One forward without gradient: the widest layer, and a chunk of logits."""
    text, b = architecture.text, training.parameter_bytes
    tokens = work.micro_batch * work.context
    layer = tokens * (3 * b * text.intermediate + 3 * b * text.hidden)
    passing = 0.0
    if architecture.vision is not None and work.patches:
        patches = work.encoded_prompts * work.patches
        passing = patches * vision_layer_bytes(architecture.vision, b)
    widest = max(layer + score_matrix_bytes(work, text, b, work.context), passing)
    return (
        widest
        + mask_bytes(work, text, b, work.context)
        + loss_chunk_bytes(architecture, training, work, kind)
    )


def kv_cache_bytes_per_token(text: TextShape, b: int) -> int:
    """Keys and values of all layers."""
    return 2 * text.layers * text.key_width * b


def generation_bytes(architecture: Architecture, training: Training, work: Workload) -> float:
    """transformers' generate: the KV cache, the prefill's widest layer, and the sampler's rows.

    The sampler holds fp32 scores twice and fp64 probabilities and their sums per vocabulary entry
    (rollout/sampling.py), after the model's own logits.
    """
    text, b = architecture.text, training.parameter_bytes
    sequences = min(work.generated_at_once, max(1.0, work.prompts * work.group_size))
    # A reflection is generated from a prompt and a forced rationale.
    prefill = work.context - work.response
    cache = sequences * work.context * kv_cache_bytes_per_token(text, b)
    layer = sequences * prefill * (3 * b * text.intermediate + 3 * b * text.hidden)
    sampler = sequences * text.vocab * (b + 4 + 4 + 8 + 8)
    return cache + max(layer, sampler)
