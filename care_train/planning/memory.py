"""Peak memory of one rank: what is there in each phase of a step, and the largest sum."""

from dataclasses import dataclass

from care_train.planning import activations as act
from care_train.planning import states
from care_train.planning.architecture import Architecture
from care_train.planning.hardware import GIB, Accelerator
from care_train.planning.workload import Training, Workload

PHASES = ("load", "generate", "score", "train", "step", "sync")
"""load: before ZeRO shards. score: forwards without gradient. train: forward and backward. step:
the optimiser's. sync: weights to the rollout engine."""

_RESIDENT = ("generate", "score", "train", "step", "sync")


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

    def item_bytes(self, name: str) -> float:
        """One item's bytes; 0 where there is none of that name."""
        return sum(item.num_bytes for item in self.items if item.name == name)

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


def plan_memory(
    architecture: Architecture, training: Training, work: Workload, device: Accelerator
) -> MemoryPlan:
    """Every item of one rank's memory; empty ones are left out."""
    items = (
        *_model_items(architecture, training, work, device.kind),
        *_rollout_items(architecture, training, work, device),
        *_passing_items(architecture, training, work, device.kind),
        Item("context and libraries", device.overhead, PHASES),
    )
    return MemoryPlan(tuple(item for item in items if item.num_bytes > 0), device.memory)


def _model_items(
    architecture: Architecture, training: Training, work: Workload, kind: str
) -> list[Item]:
    whole = architecture.num_parameters * float(training.parameter_bytes)
    is_sharded = training.stage == 3
    gradients = states.gradient_bytes(architecture, training)
    buckets = states.bucket_bytes(architecture, training, kind)
    # ZeRO-3 allocates both once, the others for each backward.
    keeps = _RESIDENT if is_sharded else ("train",)
    gradient_phases = _RESIDENT if is_sharded else ("train", "step")
    return [
        Item("parameters", states.parameter_bytes(architecture, training), _RESIDENT),
        Item("whole model before sharding", whole, ("load",)),
        Item("fp32 master weights", states.master_bytes(architecture, training), _RESIDENT),
        Item("optimiser states", states.optimizer_bytes(architecture, training), _RESIDENT),
        Item("gradients", gradients, gradient_phases),
        Item("gradient reduce buckets", buckets, keeps),
        Item("reference model", whole if _copies_reference(training, work) else 0.0, PHASES),
        Item(
            "parameters gathered by ZeRO-3",
            states.gathered_bytes(architecture, training),
            ("score", "train"),
        ),
        Item(
            "fp32 gradients and AdamW temporaries",
            states.step_bytes(architecture, training, kind),
            ("step",),
        ),
    ]


def _rollout_items(
    architecture: Architecture, training: Training, work: Workload, device: Accelerator
) -> list[Item]:
    whole = architecture.num_parameters * float(training.parameter_bytes)
    if work.engine == "vllm":
        share, sync = _vllm_bytes(architecture, training, work, device)
        sleeps = work.vllm.sleep_level > 0 and device.kind != "cpu"
        # Level-2 sleep leaves about a GiB of CUDA graphs and workspaces: assumed.
        return [
            Item("vLLM", share, ("generate", "sync") if sleeps else PHASES),
            Item("vLLM asleep", GIB if sleeps else 0.0, ("load", "score", "train", "step")),
            Item("weight sync bucket", sync, ("sync",)),
        ]
    copies = whole if training.stage == 3 else 0.0
    generation = act.generation_bytes(architecture, training, work)
    return [
        Item("rollout copy of the model", copies, PHASES),
        Item("KV cache and generation", generation, ("generate",)),
    ]


def _vllm_bytes(
    architecture: Architecture, training: Training, work: Workload, device: Accelerator
) -> tuple[float, float]:
    """vLLM's share (weights, KV cache, activations) and the bucket of a weight sync, twice: as
    gathered, and in vLLM's precision."""
    settings = work.vllm
    if settings.kv_cache_gib is None and device.kind != "cpu":
        share = settings.gpu_memory_utilization * device.memory
    else:
        weights = architecture.num_parameters * training.parameter_bytes
        kv_cache = 1.0 if settings.kv_cache_gib is None else settings.kv_cache_gib
        share = weights / settings.tensor_parallel_size + kv_cache * GIB
    bucket = settings.sync_bucket_mib * 2.0**20
    return share, bucket * (2 if training.stage == 3 else 1)


def _passing_items(
    architecture: Architecture, training: Training, work: Workload, kind: str
) -> list[Item]:
    language = act.text_activation_bytes(architecture, training, work)
    vision = act.vision_activation_bytes(architecture, training, work)
    suffix = ", checkpointed" if training.checkpointing else ""
    return [
        Item(f"activations of the language model{suffix}", language, ("train",)),
        Item(f"activations of the vision tower{suffix}", vision, ("train",)),
        Item(
            "loss: chunk of logits",
            act.loss_chunk_bytes(architecture, training, work, kind),
            ("train",),
        ),
        Item(
            "loss: gradients of hidden states and head",
            act.loss_gradient_bytes(architecture, training, work, kind),
            ("train",),
        ),
        Item(
            "forward without gradient",
            act.scoring_bytes(architecture, training, work, kind),
            ("score",),
        ),
    ]


def _copies_reference(training: Training, work: Workload) -> bool:
    """With LoRA the reference is the policy without its adapters."""
    return work.has_reference and not training.lora_rank
