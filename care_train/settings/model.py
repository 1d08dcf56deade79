"""Settings of the model and of what it is shown."""

from dataclasses import dataclass
from typing import Literal

from care_train.algorithm.settings import STRICT


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
    """transformers' attention implementation."""
    min_pixels: int | None = None
    """Smallest image area in pixels the image processor scales to. None: the processor's own."""
    max_pixels: int | None = None
    """Largest image area in pixels the image processor scales to. None: the processor's own."""


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
    """Longest prompt in tokens, images expanded; a longer one is an error naming the row."""
