"""Settings of the model and of what it is shown."""

from dataclasses import field
from typing import Annotated, Literal

from pydantic import PositiveFloat, PositiveInt

from care_train.config.base import Role, check, section


@section
class LoraSettings:
    """Low-rank adapters (arXiv:2106.09685), trained in place of the weights they sit beside."""

    rank: Annotated[PositiveInt, Role.FIXED] = 16
    """r: the adapters' inner dimension."""
    alpha: PositiveFloat = 32.0
    """Adapters count alpha / rank times."""
    target_modules: Annotated[Literal["all-linear"] | list[str], Role.FIXED] = "all-linear"
    """`all-linear`, or ends of the names of linear layers (`[q_proj, v_proj]`); never the head."""
    vision: Annotated[bool, Role.FIXED] = False
    """Adapt the vision tower's linear layers too."""
    modules_to_save: Annotated[list[str], Role.FIXED] = field(default_factory=list)
    """Ends of the names of modules that are trained whole beside the adapters (`[merger]`); not the
    head."""

    def __post_init__(self) -> None:
        check(
            bool(self.target_modules),
            "model.lora.target_modules",
            self.target_modules,
            "'all-linear' or a list of names",
        )


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
    """transformers' attention implementation. flash_attention_2 needs a GPU, flash-attn and
    bfloat16; where it cannot run, a message says why and sdpa is used."""
    liger: bool = False
    """Liger's kernels for RMSNorm, SwiGLU and rotary embeddings (liger-kernel, on GPUs) in place of
    transformers' own; where they cannot run, a message says why. The loss is this package's."""
    min_pixels: PositiveInt | None = None
    """Smallest image area in pixels the image processor scales to. None: the processor's own."""
    max_pixels: PositiveInt | None = None
    """Largest image area in pixels the image processor scales to. None: the processor's own."""
    lora: LoraSettings | None = None
    """Train adapters alone; the reference of the KL is then the model without them, at no memory of
    its own. None: train all weights."""


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
    think_tag: str = "think"
    """Name of the rationale's tag (`reasoning` for Qwen3-VL, Sec. 8.2)."""
    answer_tag: str = "answer"
    """Name of the answer's tag."""
    max_prompt_tokens: PositiveInt = 2048
    """Longest prompt in tokens, images expanded. All rows are measured before the first step."""
    overlong: Literal["error", "drop"] = "error"
    """What becomes of training rows with a longer prompt. `error`: nothing starts, they are named.
    `drop`: the others are trained on, they are listed in the run's `data.dropped.jsonl` (the cold
    start's in `sft.data.dropped.jsonl`). Nothing is ever truncated, no held-out row dropped."""
