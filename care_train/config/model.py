"""Settings of the model and of what it is shown."""

from dataclasses import dataclass, field
from typing import Literal

from care_train.config.base import STRICT, check, check_at_least


@dataclass(frozen=True, kw_only=True)
class LoraSettings:
    """Low-rank adapters (arXiv:2106.09685), trained in place of the weights they sit beside."""

    __pydantic_config__ = STRICT

    rank: int = 16
    """r: the adapters' inner dimension."""
    alpha: float = 32.0
    """Adapters count alpha / rank times."""
    dropout: float = 0.0
    """Share of an adapter's inputs dropped in training. Above 0 the policy that is trained is not
    the one that sampled: meant for a cold start."""
    target_modules: str | list[str] = "all-linear"
    """`all-linear`, or ends of the names of linear layers (`[q_proj, v_proj]`); never the head."""
    vision: bool = False
    """Adapt the vision tower's linear layers too."""
    modules_to_save: list[str] = field(default_factory=list)
    """Ends of the names of modules that are trained whole beside the adapters (`[merger]`); not the
    head."""

    def __post_init__(self) -> None:
        check(self.rank >= 1, "model.lora.rank", self.rank, "at least 1")
        check(self.alpha > 0, "model.lora.alpha", self.alpha, "above 0")
        check(0 <= self.dropout < 1, "model.lora.dropout", self.dropout, "in [0, 1)")
        is_known = isinstance(self.target_modules, list) or self.target_modules == "all-linear"
        check(
            bool(self.target_modules) and is_known,
            "model.lora.target_modules",
            self.target_modules,
            "'all-linear' or a list of names",
        )


@dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """Which model, and in which precision."""

    __pydantic_config__ = STRICT

    path: str = "tiny-qwen2.5-vl"
    """A Hugging Face folder, or a tiny model made on the spot: tiny-qwen2.5-vl | tiny-qwen3-vl |
    tiny-qwen2."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of weights and activations; bfloat16 keeps fp32 master weights in the optimiser."""
    attention: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    """transformers' attention implementation. flash_attention_2 needs a GPU, flash-attn and
    bfloat16; where it cannot run, a message says why and sdpa is used."""
    liger: bool = False
    """Liger's kernels for RMSNorm, SwiGLU and rotary embeddings (liger-kernel, on GPUs) in place of
    transformers' own; where they cannot run, a message says why. The loss is this package's."""
    min_pixels: int | None = None
    """Smallest image area in pixels the image processor scales to. None: the processor's own."""
    max_pixels: int | None = None
    """Largest image area in pixels the image processor scales to. None: the processor's own."""
    lora: LoraSettings | None = None
    """Train adapters alone; the reference of the KL is then the model without them, at no memory of
    its own. None: train all weights."""


@dataclass(frozen=True, kw_only=True)
class PromptSettings:
    """How a row becomes a prompt, and which tags the response uses."""

    __pydantic_config__ = STRICT

    system: str | None = (
        "First reason inside <think> </think>, then give the final answer inside "
        "<answer> </answer>."
    )
    """System message. None: none."""
    think_tag: str = "think"
    """Name of the rationale's tag (`reasoning` for Qwen3-VL, Sec. 8.2)."""
    answer_tag: str = "answer"
    """Name of the answer's tag."""
    max_prompt_tokens: int = 2048
    """Longest prompt in tokens, images expanded. All rows are measured before the first step."""
    overlong: Literal["error", "drop"] = "error"
    """What becomes of training rows with a longer prompt. `error`: nothing starts, they are named.
    `drop`: the others are trained on, they are listed in the run's `data.dropped.jsonl` (the cold
    start's in `sft.data.dropped.jsonl`). Nothing is ever truncated, no held-out row dropped."""
    max_image_pixels: int = 50_000_000
    """Largest image accepted, in pixels: rows are untrusted."""

    def __post_init__(self) -> None:
        check_at_least(self, "prompt", max_prompt_tokens=1, max_image_pixels=1)
