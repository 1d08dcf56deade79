"""Settings of the rollouts, one frozen dataclass per section."""

from dataclasses import dataclass, field
from typing import Literal
from urllib.parse import urlsplit

from care_train.config.base import STRICT, check, check_at_least


@dataclass(frozen=True, kw_only=True)
class VllmSettings:
    """What `rollout.engine: vllm` and `care-train serve` need to know."""

    __pydantic_config__ = STRICT

    server: str | None = None
    """`http://host:port` of a `care-train serve`, which then generates for all ranks. None: vLLM
    runs in the training processes."""
    server_timeout: float = 600.0
    """Seconds that one request to the server may take, a whole batch or a bucket of weights; after
    them the run stops."""
    server_token_file: str | None = None
    """A file with the token that the server demands, where it is neither in
    $CARE_TRAIN_SERVER_TOKEN nor found by itself: both sides may be given it. None: the server makes
    a token, which runs of its user find on its machine."""
    kv_cache_gib: float | None = None
    """Size of the KV cache in GiB. None: 1 on CPUs; on GPUs what gpu_memory_utilization leaves."""
    gpu_memory_utilization: float = 0.4
    """Share of each GPU's memory that vLLM may take, weights included; training has the rest."""
    tensor_parallel_size: int = 1
    """GPUs that share one copy of vLLM's weights. In the training processes they are ranks, which
    sample each other's prompts too; a server starts so many workers."""
    enforce_eager: bool = False
    """Without CUDA graphs: slower, less memory. CPUs are always eager."""
    sleep: bool = True
    """Free vLLM's memory while the policy trains. CPUs cannot: vLLM has no sleep mode there."""
    lora: Literal["merged", "adapter"] = "merged"
    """How adapters (`model.lora`) get there: `merged` into the weights they adapt, all of which are
    sent after every step; or `adapter`: base weights once, then adapters alone, which vLLM's LoRA
    kernels add at every token."""
    sync_bucket_mib: int = 512
    """Weights gathered at once for a weight sync, in MiB; a larger parameter goes alone."""
    log_level: Literal["debug", "info", "warning", "error"] = "error"
    """What vLLM's own log shows; the environment's VLLM_LOGGING_LEVEL goes before it."""

    def __post_init__(self) -> None:
        share, kv_cache = self.gpu_memory_utilization, self.kv_cache_gib
        check(0 < share <= 1, "rollout.vllm.gpu_memory_utilization", share, "in (0, 1]")
        check(kv_cache is None or kv_cache > 0, "rollout.vllm.kv_cache_gib", kv_cache, "above 0")
        url = urlsplit(self.server or "http://x")
        is_url = url.scheme in ("http", "https") and bool(url.hostname)
        check(is_url, "rollout.vllm.server", self.server, "http://host:port")
        check(self.server_timeout > 0, "rollout.vllm.server_timeout", self.server_timeout, "> 0")
        for key in ("tensor_parallel_size", "sync_bucket_mib"):
            check(getattr(self, key) >= 1, f"rollout.vllm.{key}", getattr(self, key), "at least 1")


@dataclass(frozen=True, kw_only=True)
class RolloutSettings:
    """How responses are sampled."""

    __pydantic_config__ = STRICT

    engine: Literal["transformers", "vllm"] = "transformers"
    """What generates: `transformers` (embedded, any device) or `vllm` (in the training process, on
    every rank its own, or as a server: `vllm.server`), with the weights sent after every optimiser
    step."""
    group_size: int = 8
    """G: rollouts per prompt."""
    temperature: float = 1.0
    """Sampling temperature; also used at evaluation (Sec. 8.2)."""
    top_p: float = 1.0
    """Nucleus threshold in (0, 1]; 1 keeps everything."""
    top_k: int = 0
    """Keep the k likeliest tokens; 0 keeps all."""
    max_new_tokens: int = 1024
    """Longest response in tokens."""
    batch_size: int = 256
    """Sequences generated at once on one rank."""
    max_log_prob_gap: float | None = 0.2
    """Mean difference of trainer's and engine's log-probs, in nats per token, over which a run's
    first step stops it. Engines without log-probs are not checked. None: no limit."""
    vllm: VllmSettings = field(default_factory=VllmSettings)

    def __post_init__(self) -> None:
        check(self.temperature > 0, "rollout.temperature", self.temperature, "above 0")
        check(0 < self.top_p <= 1, "rollout.top_p", self.top_p, "in (0, 1]")
        check_at_least(
            self,
            "rollout",
            group_size=2,
            top_k=0,
            max_new_tokens=1,
            batch_size=1,
            max_log_prob_gap=0,
        )
