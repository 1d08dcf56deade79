"""Tiny models built offline from the real architectures: what the quickstart and the tests train.

Config, model, processor and tokenizer are transformers' own classes; only the sizes are small, the
weights random, and the byte-level BPE vocabulary is trained on the text it is given.

Weights begin at transformers' 0.02, which suits widths of thousands. `tiny-qwen2.5-vl-scaled`
begins at 1 / sqrt(width): at 0.02 a layer of width 128 passes on a fifth of its input, and the
model barely learns to read images in a few hundred steps.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from transformers import (
    GenerationConfig,
    PreTrainedConfig,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2Tokenizer,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
)

from care_train import hub
from care_train.config import Config
from care_train.data import Sample
from care_train.distributed import barrier, is_main

_SPECIAL = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)

# The layout of Qwen's chat format, for messages whose content is text or a list of parts.
_CHAT_TEMPLATE = """\
{%- for message in messages -%}
<|im_start|>{{ message.role }}
{% if message.content is string %}{{ message.content }}{% else %}
{%- for part in message.content -%}
{%- if part.type == 'image' -%}<|vision_start|><|image_pad|><|vision_end|>
{%- else -%}{{ part.text }}{%- endif -%}
{%- endfor -%}
{%- endif -%}<|im_end|>
{% endfor -%}
{%- if add_generation_prompt -%}<|im_start|>assistant
{% endif -%}"""

_CORPUS = (
    "user assistant system First reason inside <think> </think>, then give the final answer "
    "inside <answer> </answer>.",
    "<think>the image shows a shape</think> <answer>yes</answer> <reasoning> </reasoning>",
    "what is the color of the shape in the image? is there a circle, a triangle or a rectangle?",
)


def model_folder(config: Config, folder: Path, samples: Iterable[Sample]) -> Path:
    """`model.path`'s folder, or the tiny model that it names, built in `folder` unless it is there.

    The first rank builds; the others wait.

    Args:
        config: the run's.
        folder: where a tiny model is built.
        samples: read only then, for the text that its tokenizer is trained on.
    """
    if config.model.path not in TINY_KINDS:
        return hub.model_folder(config.model.path)
    if is_main() and not (folder / "config.json").is_file():
        # The suffix of what a killed run leaves unfinished: `clean_up` removes it.
        partial = folder.with_name(folder.name + ".partial")
        build_tiny_model(config.model.path, partial, _corpus(config, samples), seed=config.seed)
        partial.rename(folder)
    barrier()
    return folder


def _corpus(config: Config, samples: Iterable[Sample]) -> list[str]:
    think, answer = config.prompt.think_tag, config.prompt.answer_tag
    lines = [config.prompt.system or "", config.care.reflection.cue]
    for row in samples:
        response = f"<{think}>{row.rationale or ''}</{think}> <{answer}>{row.answer}</{answer}>"
        lines += [row.prompt, response]
    return lines


def build_tiny_model(
    kind: str,
    folder: str | Path,
    corpus: Iterable[str] = (),
    *,
    seed: int = 0,
    hidden_size: int = 128,
) -> Path:
    """Write a tiny model, its tokenizer and its processor as a plain Hugging Face folder.

    Args:
        kind: one of `TINY_KINDS`.
        folder: where to write.
        corpus: text the tokenizer is trained on, besides the tags and the chat format.
        seed: seeds the weights.
        hidden_size: width of the language model, a multiple of 32.

    Raises:
        ValueError: an unknown kind.
    """
    if kind not in _RECIPES:
        raise ValueError(
            f"model.path: got {kind!r}, wanted a folder or one of {', '.join(TINY_KINDS)}"
        )
    recipe, tokenizer = _RECIPES[kind], _train_tokenizer(corpus)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = recipe.model(_config(recipe, tokenizer, hidden_size))
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    model.save_pretrained(folder)
    if recipe.processor is None:
        tokenizer.save_pretrained(folder)
        return Path(folder)
    # One merged token covers 28 x 28 pixels.
    size = {"shortest_edge": 56 * 56, "longest_edge": 112 * 112}
    images = Qwen2VLImageProcessor(patch_size=14, merge_size=2, size=size)
    videos = recipe.video_processor(patch_size=14, merge_size=2)
    processor = recipe.processor(images, tokenizer, videos, chat_template=_CHAT_TEMPLATE)
    processor.save_pretrained(folder)
    return Path(folder)


def tiny_config(kind: str) -> PreTrainedConfig:
    """The configuration of a tiny model whose tokenizer has seen no rows; nothing is built."""
    return _config(_RECIPES[kind], _train_tokenizer(), 128)


def _train_tokenizer(corpus: Iterable[str] = ()) -> Any:
    # A bound far above what a small corpus can fill: training stops when no pair repeats.
    tokenizer: Any = Qwen2Tokenizer().train_new_from_iterator(
        [*_CORPUS, *corpus], vocab_size=2048, new_special_tokens=list(_SPECIAL), show_progress=False
    )
    tokenizer.eos_token, tokenizer.pad_token = "<|im_end|>", "<|endoftext|>"
    tokenizer.chat_template = _CHAT_TEMPLATE
    tokenizer.padding_side = "left"
    return tokenizer


@dataclass(frozen=True)
class _Recipe:
    """What a tiny model is made of."""

    config: Any
    model: Any
    text: Mapping[str, Any] = field(default_factory=dict)
    """What its language model's configuration has beside the sizes."""
    vision: Mapping[str, Any] | None = None
    """The same of the vision tower; None: text only."""
    processor: Any = None
    video_processor: Any = None
    is_scaled: bool = False
    """The first weights' deviation is 1 / sqrt(hidden size)."""


# Heads are 32 wide and have 16 rotary pairs: time 4, height 6, width 6.
_ROPE = {"rope_type": "default", "mrope_section": [4, 6, 6], "rope_theta": 1e4}
_QWEN2_5_VL = _Recipe(
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    {"rope_parameters": _ROPE},
    {"window_size": 56, "fullatt_block_indexes": [1]},
    Qwen2_5_VLProcessor,
    Qwen2VLVideoProcessor,
)
_RECIPES = {
    "tiny-qwen2.5-vl": _QWEN2_5_VL,
    "tiny-qwen2.5-vl-scaled": replace(_QWEN2_5_VL, is_scaled=True),
    "tiny-qwen3-vl": _Recipe(
        Qwen3VLConfig,
        Qwen3VLForConditionalGeneration,
        {"head_dim": 32, "rope_parameters": _ROPE | {"mrope_interleaved": True}},
        {"num_position_embeddings": 64, "deepstack_visual_indexes": [0]},
        Qwen3VLProcessor,
        Qwen3VLVideoProcessor,
    ),
    "tiny-qwen2": _Recipe(Qwen2Config, Qwen2ForCausalLM),
}
TINY_KINDS = tuple(_RECIPES)


def _config(recipe: _Recipe, tokenizer: Any, hidden_size: int) -> PreTrainedConfig:
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": hidden_size,
        "intermediate_size": 3 * hidden_size,
        "num_hidden_layers": 2,
        "num_attention_heads": hidden_size // 32,
        "num_key_value_heads": max(1, hidden_size // 64),
        "max_position_embeddings": 4096,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        **recipe.text,
    }
    if recipe.vision is None:
        return recipe.config(tie_word_embeddings=False, **text)
    vision = {
        "depth": 2,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_heads": 4,
        "patch_size": 14,
        "out_hidden_size": hidden_size,
        **recipe.vision,
    }
    ids = tokenizer.convert_tokens_to_ids
    config = recipe.config(
        text_config=text,
        vision_config=vision,
        tie_word_embeddings=False,
        image_token_id=ids("<|image_pad|>"),
        video_token_id=ids("<|video_pad|>"),
        vision_start_token_id=ids("<|vision_start|>"),
        vision_end_token_id=ids("<|vision_end|>"),
    )
    for part in (config.get_text_config(), config.vision_config) if recipe.is_scaled else ():
        part.initializer_range = part.hidden_size**-0.5
    return config
