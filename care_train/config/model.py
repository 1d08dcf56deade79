"""Settings of the model, of what it is shown, and of how it is sampled."""

from dataclasses import field, replace
from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from care_train.config.base import PositiveShare, Role, check, read_url, section

PixelRange = Annotated[list[PositiveInt], Field(min_length=2, max_length=2)]
NameList = Annotated[list[str], Field(min_length=1)]


@section
class LoraSettings:
    """Low-rank adapters (arXiv:2106.09685), trained in place of the weights they sit beside. The
    reference of the KL is then the model without them, at no memory of its own."""

    rank: Annotated[NonNegativeInt, Role.FIXED] = 0
    """r: the adapters' inner dimension, such as 16. 0: no adapters, all weights are trained."""
    alpha: PositiveFloat = 32.0
    """Adapters count alpha / rank times."""
    target_modules: Annotated[Literal["all-linear"] | NameList, Role.FIXED] = "all-linear"
    """`all-linear`, or ends of the names of linear layers (`[q_proj, v_proj]`); never the head."""
    vision: Annotated[bool, Field(exclude=True)] = False
    """Set by `model.train_vision`: the vision tower's linear layers have adapters too."""
    modules_to_save: Annotated[list[str], Role.FIXED] = field(default_factory=list)
    """Ends of the names of modules that are trained whole beside the adapters (`[merger]`); not the
    head."""


@section
class ModelSettings:
    """Which model, and in which precision."""

    path: str = "tiny-qwen2.5-vl"
    """A Hugging Face folder; a model of the Hub, `ORG/NAME[@REVISION]`, where no such folder is; or
    a tiny model made on the spot: tiny-qwen2.5-vl | tiny-qwen2.5-vl-scaled (first weights scaled to
    its width) | tiny-qwen3-vl | tiny-qwen2."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of weights and activations; bfloat16 keeps fp32 master weights in the optimiser."""
    attention: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    """transformers' attention implementation. `flash_attention_2` needs a GPU, flash-attn and
    bfloat16; where it cannot run, a message says why and sdpa is used."""
    liger: bool = False
    """Liger's kernels for RMSNorm, SwiGLU and rotary embeddings (liger-kernel, on GPUs) in place of
    transformers' own; where they cannot run, a message says why. The loss is this package's."""
    image_pixels: PositiveInt | PixelRange | None = None
    """Largest image area in pixels that the image processor scales to, or the smallest and the
    largest (`[262144, 4194304]`). None: the processor's own."""
    train_vision: Annotated[bool | None, Role.FIXED] = None
    """Whether the vision tower is trained, in the cold start too; under LoRA, whether it has
    adapters. None: trained where all weights are, without adapters under LoRA."""
    lora: LoraSettings = field(default_factory=LoraSettings)
    """Adapters in place of all weights."""

    def __post_init__(self) -> None:
        low, high = self.min_pixels or 0, self.max_pixels or 0
        check(low <= high, "model.image_pixels", [low, high], "the smaller number first")

    @property
    def min_pixels(self) -> int | None:
        """Smallest image area; None: the processor's own."""
        return self.image_pixels[0] if isinstance(self.image_pixels, list) else None

    @property
    def max_pixels(self) -> int | None:
        """Largest image area; None: the processor's own."""
        pixels = self.image_pixels
        return pixels[1] if isinstance(pixels, list) else pixels

    @property
    def adapters(self) -> LoraSettings | None:
        """What is trained under LoRA; None where all weights are."""
        return replace(self.lora, vision=bool(self.train_vision)) if self.lora.rank else None


@section
class PromptSettings:
    """How a row becomes a prompt, and which tags the response uses."""

    system: str | None = (
        "First reason inside <think> </think>, then give the final answer inside "
        "<answer> </answer>."
    )
    """System message. None: none."""
    suffix: str | None = None
    """Text behind each row's prompt, in the same message. None: none."""
    tags: Annotated[list[str], Field(min_length=2, max_length=2)] = field(
        default_factory=lambda: ["think", "answer"]
    )
    """Names of the tags around the rationale (`reasoning` for Qwen3-VL, Sec. 8.2) and around the
    answer. `boxed` in the second place: the answer is what the response's last `\\boxed{}` holds,
    behind a rationale in its tags."""
    max_prompt_tokens: PositiveInt = 2048
    """Longest prompt in tokens, images expanded. All rows are measured before the first step."""
    overlong: Literal["error", "drop"] = "error"
    """What becomes of training rows with a longer prompt. `error`: nothing starts, they are named.
    `drop`: the others are trained on, they are listed in the run's `data.dropped.jsonl` (the cold
    start's in `sft.data.dropped.jsonl`). Nothing is ever truncated, no held-out row dropped."""

    def __post_init__(self) -> None:
        good = all(self.tags) and self.think_tag != self.answer_tag
        check(good, "prompt.tags", self.tags, "two different names")

    @property
    def think_tag(self) -> str:
        """Name of the rationale's tag."""
        return self.tags[0]

    @property
    def answer_tag(self) -> str:
        """Name of the answer's tag, also where a box takes its place in responses."""
        return "answer" if self.is_boxed else self.tags[1]

    @property
    def is_boxed(self) -> bool:
        """Whether the answer stands in the last `\\boxed{}`."""
        return self.tags[1] == "boxed"


@section
class VllmSettings:
    """What `rollout.engine: vllm` and `care-train serve` need to know."""

    server: Annotated[str | None, Role.FREE] = None
    """`http://host:port` of a `care-train serve`, which then generates for all ranks. None: vLLM
    runs in the training processes. The server makes a token, which runs of its user find on its
    machine; elsewhere both sides are given one by $CARE_TRAIN_SERVER_TOKEN."""
    gpu_memory_utilization: PositiveShare = 0.4
    """Share of each GPU's memory that vLLM may take, weights included; training has the rest. On
    CPUs the KV cache has 1 GiB, or $VLLM_CPU_KVCACHE_SPACE."""
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
        is_url = self.server is None or read_url(self.server) is not None
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

    @property
    def vllm_in_process(self) -> bool:
        """Whether vLLM runs in the training processes."""
        return self.engine == "vllm" and self.vllm.server is None
