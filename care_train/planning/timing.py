"""Rough seconds of one step by part: FLOPs and bytes over a device's rates, times an efficiency.

The efficiencies are assumptions, named here and printed with the plan; a step is not overlapped.
"""

from dataclasses import dataclass

from care_train.planning import states
from care_train.planning.activations import kv_cache_bytes_per_token
from care_train.planning.architecture import Architecture
from care_train.planning.hardware import Accelerator
from care_train.planning.workload import Training, Workload


@dataclass(frozen=True)
class Efficiencies:
    """Shares of the data sheet's rates that are reached: assumed."""

    forward: float = 0.45
    """Of the FLOP rate, in forwards without gradient and prefills."""
    training: float = 0.35
    """Of the FLOP rate, in forward and backward."""
    decode: float = 0.6
    """Of the memory's bandwidth, in vLLM's decoding and in the optimiser."""
    links: float = 0.7
    """Of the links' and the network's bandwidth, in collectives."""
    eager_layer: float = 0.8e-3
    """Seconds that transformers' generate needs per layer and token at least: kernel launches."""
    host: float = 50e9
    """Bytes per second and rank of an optimiser in main memory, PCIe included."""

    def describe(self) -> str:
        """One line for people."""
        return (
            f"{self.forward:.0%} of peak FLOP/s in forwards, {self.training:.0%} in training, "
            f"{self.decode:.0%} of memory bandwidth, {self.links:.0%} of links"
        )


@dataclass(frozen=True)
class TimePlan:
    """Seconds of one step on the average batch."""

    generate: float
    score: float
    train: float
    optimizer: float
    communicate: float
    sync: float

    @property
    def parts(self) -> dict[str, float]:
        """By name."""
        return {
            "generate": self.generate,
            "score": self.score,
            "forward and backward": self.train,
            "gradients and shards over links": self.communicate,
            "optimiser": self.optimizer,
            "weight sync": self.sync,
        }

    @property
    def total(self) -> float:
        """Of a step."""
        return sum(self.parts.values())


def plan_time(
    architecture: Architecture,
    training: Training,
    work: Workload,
    device: Accelerator,
    rates: Efficiencies | None = None,
) -> TimePlan:
    """Seconds of each part of a step on one rank; ranks work at the same time."""
    rates = rates or Efficiencies()
    rate = device.flops * (1.0 if training.parameter_bytes == 2 else 0.5)
    sampled = work.prompts * work.group_size
    trained = work.prompts * work.trained_per_group * work.passes
    forward = forward_flops(architecture, work)
    # A reflection costs one response more per prompt.
    generated = sampled + (work.prompts if work.is_care else 0.0)
    scored = (sampled if work.is_care else 0.0) * forward
    for needed in (work.has_reference, work.scores_old):
        scored += work.prompts * work.trained_per_group * forward if needed else 0.0
    return TimePlan(
        generate=generate_seconds(architecture, training, work, device, rates, generated),
        score=scored / (rate * rates.forward),
        train=trained * train_flops(architecture, training, work) / (rate * rates.training),
        optimizer=work.optimizer_steps * optimizer_seconds(architecture, training, device, rates),
        communicate=communication_seconds(architecture, training, work, device, rates),
        sync=sync_seconds(architecture, training, work, device, rates),
    )


def forward_flops(architecture: Architecture, work: Workload) -> float:
    """Of one average sequence: 2 per parameter and token, and attention's two products.

    Source: arXiv:2001.08361, Sec. 2.1; causal attention multiplies half of the T x T pairs. The
    head runs on the response alone.
    """
    text, tokens = architecture.text, work.mean_length
    dense = 2 * architecture.num_multiplied * tokens
    head = 2 * architecture.num_head * work.mean_response
    attention = 2 * text.layers * text.query_width * tokens**2
    return dense + head + attention + vision_flops(architecture, work)


def vision_flops(architecture: Architecture, work: Workload) -> float:
    """Of one sequence's images; windowed layers attend inside their windows."""
    vision = architecture.vision
    if vision is None:
        return 0.0
    windowed = (vision.layers - vision.full_layers) * min(vision.window, work.patches)
    pairs = work.patches * (vision.full_layers * work.patches + windowed)
    return 2 * architecture.num_vision * work.patches + 4 * vision.hidden * pairs


def train_flops(architecture: Architecture, training: Training, work: Workload) -> float:
    """Forward and backward: three forwards, a fourth with checkpointing, fewer where frozen.

    A frozen part needs no weight gradients, and a frozen vision tower no backward at all.
    """
    vision = vision_flops(architecture, work)
    language = forward_flops(architecture, work) - vision
    recomputed = 1 if training.checkpointing else 0
    factor = (2 if training.lora_rank else 3) + recomputed
    is_frozen = training.freeze_vision or bool(training.lora_rank)
    return language * factor + vision * (1 if is_frozen else 3 + recomputed)


def generate_seconds(
    architecture: Architecture,
    training: Training,
    work: Workload,
    device: Accelerator,
    rates: Efficiencies,
    sequences: float,
) -> float:
    """Prefill by FLOPs; each decoded token reads all weights and the batch's keys and values.

    vLLM prefills a prompt once per group (prefix caching) and keeps its batch full; transformers
    prefills each sequence, and a batch lasts until its longest response ends.
    """
    b, text = training.parameter_bytes, architecture.text
    is_vllm = work.engine == "vllm"
    at_once = min(work.generated_at_once, max(sequences, 1.0))
    batches = sequences / at_once
    length = work.mean_response if is_vllm else float(work.response)
    if not is_vllm:
        batches = max(1.0, float(-(-sequences // at_once)))
    prompts = work.prompts if is_vllm else sequences
    per_prompt = 2 * architecture.num_multiplied * work.mean_prompt + vision_flops(
        architecture, work
    )
    rate = device.flops * (1.0 if b == 2 else 0.5)
    prefill = prompts * per_prompt / (rate * rates.forward)
    weights = (architecture.num_multiplied + architecture.num_head) * b
    context = work.mean_prompt + length / 2
    cache = at_once * context * kv_cache_bytes_per_token(text, b)
    token = (weights + cache) / (device.bandwidth * rates.decode)
    compute = 2 * at_once * weights / b / (rate * rates.forward)
    token = max(token, compute, 0.0 if is_vllm else text.layers * rates.eager_layer)
    return prefill + batches * length * token


def optimizer_seconds(
    architecture: Architecture, training: Training, device: Accelerator, rates: Efficiencies
) -> float:
    """One AdamW step: gradient, master weight and moments read, the latter three written."""
    own = states.num_trained(architecture, training) / training.shards
    moved = own * (4 + 2 * 4 + 2 * states.ADAM_BYTES + training.parameter_bytes)
    if training.offload_optimizer:
        return moved / rates.host
    return moved / (device.bandwidth * rates.decode)


def communication_seconds(
    architecture: Architecture,
    training: Training,
    work: Workload,
    device: Accelerator,
    rates: Efficiencies,
) -> float:
    """Gradients reduced and parameters gathered by ring collectives, (N - 1) / N of the bytes each.

    Source: arXiv:1910.02054, Sec. 7: 2 x the parameters per step below ZeRO-3; ZeRO-3 gathers
    them for every forward and backward of every micro-batch, and ZeRO-2 reduces as often.
    """
    if training.gpus == 1:
        return 0.0
    b, ranks = training.parameter_bytes, training.gpus
    trained = states.num_trained(architecture, training) * b
    held = states.num_held(architecture, training) * b
    per_pass = work.prompts * work.trained_per_group
    micro_batches = work.passes * max(1.0, per_pass / work.mean_micro_batch)
    scored = work.prompts * work.group_size * work.is_care / work.mean_micro_batch
    if training.stage < 2:
        moved = 2.0 * trained * work.optimizer_steps
    elif training.stage == 2:
        moved = trained * (micro_batches + work.optimizer_steps)
    else:
        gathers = 2 * micro_batches + scored
        moved = gathers * held + micro_batches * trained
    return moved * (ranks - 1) / ranks / (_link(training, device) * rates.links)


def sync_seconds(
    architecture: Architecture,
    training: Training,
    work: Workload,
    device: Accelerator,
    rates: Efficiencies,
) -> float:
    """Weights to the rollout engine: gathered under ZeRO-3, then copied, and read twice to check.

    transformers below ZeRO-3 generates with the policy itself.
    """
    is_shared = work.engine == "transformers" and training.stage < 3
    if is_shared:
        return 0.0
    whole = architecture.num_parameters * training.parameter_bytes
    copied = (4 if work.engine == "vllm" else 2) * whole / (device.bandwidth * rates.decode)
    if training.stage < 3 or training.gpus == 1:
        return copied
    share = (training.gpus - 1) / training.gpus
    return copied + whole * share / (_link(training, device) * rates.links)


def _link(training: Training, device: Accelerator) -> float:
    """Bytes per second of the slowest link on a ring over all ranks."""
    return device.link if training.gpus <= device.gpus_per_node else device.network
