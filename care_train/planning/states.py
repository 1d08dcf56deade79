"""Bytes of model states on one rank: parameters, gradients, optimiser, and DeepSpeed's buffers.

Source of the multipliers: ZeRO (arXiv:1910.02054, Sec. 3.1), and as DeepSpeed 0.19's
`estimate_zero2_model_states_mem_needs` and `estimate_zero3_model_states_mem_needs` count them.
"""

from care_train.planning.architecture import Architecture
from care_train.planning.workload import Training

ADAM_BYTES = 8
"""Two fp32 moments per trained parameter."""


def num_trained(architecture: Architecture, training: Training) -> int:
    """Parameters with a gradient: all, without the vision tower, or LoRA's r (in + out) per layer
    (arXiv:2106.09685, Sec. 4.1)."""
    if training.lora_rank:
        return training.lora_rank * sum(i + o for i, o in architecture.num_linears)
    frozen = architecture.num_vision if training.freeze_vision else 0
    return architecture.num_parameters - frozen


def num_held(architecture: Architecture, training: Training) -> int:
    """All parameters, LoRA's adapters beside the weights they adapt."""
    adapters = num_trained(architecture, training) if training.lora_rank else 0
    return architecture.num_parameters + adapters


def parameter_bytes(architecture: Architecture, training: Training) -> float:
    """Weights that forward and backward read: sharded from ZeRO-3 on."""
    if training.offload_parameters and training.stage == 3:
        return 0.0
    held = num_held(architecture, training) * training.parameter_bytes
    return held / (training.gpus if training.stage == 3 else 1)


def master_bytes(architecture: Architecture, training: Training) -> float:
    """The optimiser's own fp32 weights; none for plain fp32 without ZeRO."""
    if not training.has_master or training.offload_optimizer:
        return 0.0
    return 4 * num_trained(architecture, training) / training.shards


def optimizer_bytes(architecture: Architecture, training: Training) -> float:
    """AdamW's moments."""
    if training.offload_optimizer:
        return 0.0
    return ADAM_BYTES * num_trained(architecture, training) / training.shards


def gradient_bytes(architecture: Architecture, training: Training) -> float:
    """Gradients between backward and step: sharded from ZeRO-2 on."""
    whole = num_trained(architecture, training) * training.parameter_bytes
    if training.stage < 2:
        return whole
    return 0.0 if training.offload_optimizer else whole / training.gpus


def bucket_bytes(architecture: Architecture, training: Training, kind: str) -> float:
    """Where ZeRO 1-3 collects gradients to reduce (stage_1_and_2.py `setup_buckets`, stage3.py).

    It is allocated in full whatever the model's size; on a CPU untouched pages cost nothing.
    """
    if training.stage == 0:
        return 0.0
    elements = training.reduce_bucket
    if kind == "cpu":
        elements = min(elements, num_trained(architecture, training))
    doubled = training.overlaps and training.stage < 3
    return elements * training.parameter_bytes * (2 if doubled else 1)


def gathered_bytes(architecture: Architecture, training: Training) -> float:
    """Whole parameters that ZeRO-3 keeps at once: `stage3_max_live_parameters`, and one layer more.

    On one rank a gathered parameter is a copy of its shard, too.
    """
    if training.stage < 3:
        return 0.0
    live = training.live_parameters + architecture.largest_layer
    return min(live, num_held(architecture, training)) * training.parameter_bytes


def step_bytes(architecture: Architecture, training: Training, kind: str) -> float:
    """The step's temporaries: an fp32 copy of the gradients, and AdamW's denominator.

    torch's foreach AdamW, chosen on GPUs, makes sqrt(v) of all parameters at once (torch
    optim/adamw.py); on a CPU it makes two per tensor, which are all parameters where ZeRO has
    flattened them. ZeRO 1-2 flatten a rank's gradients before converting them.
    """
    if training.offload_optimizer:
        return 0.0
    own = num_trained(architecture, training) / training.shards
    is_flat = training.stage >= 1
    temporaries = 4 * own if kind != "cpu" else (8 * own if is_flat else 0.0)
    copies = 4 * own if training.has_master else 0.0
    return temporaries + copies


def host_bytes(architecture: Architecture, training: Training, per_node: int) -> float:
    """Main memory of one node that offloading fills: master weights, moments and fp32 gradients.

    Without offload, each process reads the weights on its way to the device.
    """
    ranks = min(per_node, training.gpus)
    total = ranks * num_held(architecture, training) * float(training.parameter_bytes)
    if training.offload_optimizer:
        per_rank = num_trained(architecture, training) / training.shards
        total += ranks * per_rank * (4 + ADAM_BYTES + 4 + training.parameter_bytes)
    return total


def checkpoint_bytes(architecture: Architecture, training: Training) -> float:
    """What a checkpoint holds over all ranks: weights, and the optimiser's fp32 states."""
    states = ADAM_BYTES + (4 if training.has_master else 0)
    weights = num_held(architecture, training) * training.parameter_bytes
    return weights + states * num_trained(architecture, training)


def export_bytes(architecture: Architecture, training: Training) -> float:
    """`final/`: a plain folder."""
    return float(architecture.num_parameters * training.parameter_bytes)
