"""Settings of the rollouts, one frozen dataclass per section."""

from dataclasses import field
from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from care_train.config.base import PositiveShare, Role, check, section


@section
class VllmSettings:
    """What `rollout.engine: vllm` and `care-train serve` need to know."""

    server: Annotated[str | None, Role.FREE] = None
    """`http://host:port` of a `care-train serve`, which then generates for all ranks. None: vLLM
    runs in the training processes. The server makes a token, which runs of its user find on its
    machine; elsewhere both sides are given one by $CARE_TRAIN_SERVER_TOKEN."""
    kv_cache_gib: PositiveFloat | None = None
    """Size of the KV cache in GiB. None: 1 on CPUs; on GPUs what gpu_memory_utilization leaves."""
    gpu_memory_utilization: PositiveShare = 0.4
    """Share of each GPU's memory that vLLM may take, weights included; training has the rest."""
    tensor_parallel_size: PositiveInt = 1
    """GPUs that share one copy of vLLM's weights. In the training processes they are ranks, which
    sample each other's prompts too; a server starts so many workers."""
    enforce_eager: bool = False
    """Without CUDA graphs: slower, less memory. CPUs are always eager."""
    lora: Literal["merged", "adapter"] = "merged"
    """How adapters (`model.lora`) get there: `merged` into the weights they adapt, all of which are
    sent after every step; or `adapter`: base weights once, then adapters alone, which vLLM's LoRA
    kernels add at every token. While the policy trains, vLLM's caches and weights leave the GPU:
    `merged` ones come anew, base weights wait in main memory."""

    def __post_init__(self) -> None:
        url = urlsplit(self.server or "http://x")
        is_url = url.scheme in ("http", "https") and bool(url.hostname)
        check(is_url, "rollout.vllm.server", self.server, "http://host:port")

    @property
    def sleep_level(self) -> int:
        """vLLM's: 1 keeps the weights in main memory, 2 drops them."""
        return 1 if self.lora == "adapter" else 2


@section
class RolloutSettings:
    """How responses are sampled."""

    engine: Literal["transformers", "vllm"] = "transformers"
    """What generates: `transformers` (embedded, any device) or `vllm` (in the training process, on
    every rank its own, or as a server: `vllm.server`), with the weights sent after every optimiser
    step."""
    group_size: Annotated[int, Field(ge=2)] = 8
    """G: rollouts per prompt."""
    temperature: PositiveFloat = 1.0
    """Sampling temperature; also used at evaluation (Sec. 8.2)."""
    top_p: PositiveShare = 1.0
    """Nucleus threshold; 1 keeps everything."""
    top_k: NonNegativeInt = 0
    """Keep the k likeliest tokens; 0 keeps all."""
    max_new_tokens: PositiveInt = 1024
    """Longest response in tokens."""
    batch_size: Annotated[PositiveInt, Role.SPEED] = 256
    """Sequences generated at once on one rank, in evaluations too."""
    max_log_prob_gap: Annotated[NonNegativeFloat | None, Role.SPEED] = 0.2
    """Mean difference of trainer's and engine's log-probs, in nats per token, over which a run
    stops. Compared in the first step after vLLM started or woke up. None: no limit."""
    vllm: Annotated[VllmSettings, Role.SPEED] = field(default_factory=VllmSettings)
