"""Load a policy, vision-language or text only, with what prepares its input.

FlashAttention and Liger's kernels: where they can run, and what runs in their place.
"""

import importlib.util
import inspect
import logging
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from types import MethodType
from typing import Any

import torch
import transformers
from packaging.version import Version
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    GenerationConfig,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from care_train.config import LoraSettings, ModelSettings
from care_train.models.folder import (
    check_loaded,
    check_tokenizer,
    check_weight_files,
    read_config,
    readable,
)
from care_train.models.lora import add_adapters

logger = logging.getLogger(__name__)

LIGER_KINDS = ("qwen2", "qwen2_5_vl", "qwen3", "qwen3_vl")
"""Model types whose Liger forward is tested to equal transformers'."""

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class LoadedModel:
    """A model with its processor (None for a text model) and tokenizer."""

    model: Any
    processor: Any
    tokenizer: Any

    @property
    def image_token_id(self) -> int | None:
        """Placeholder of one merged image patch in the sequence; None without images."""
        return getattr(self.model.config, "image_token_id", None)

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Ids that end a response."""
        eos = self.model.generation_config.eos_token_id
        if eos is None:
            eos = self.tokenizer.eos_token_id
        return tuple(eos) if isinstance(eos, list) else (eos,)

    @property
    def pad_token_id(self) -> int:
        """Filler for padded positions, always masked."""
        pad = self.tokenizer.pad_token_id
        return self.eos_token_ids[0] if pad is None else pad

    def save(self, folder: str | Path, weights: Mapping[str, torch.Tensor] | None = None) -> None:
        """Write a plain Hugging Face folder: safetensors, config, tokenizer and processor.

        `weights` are under the model's own names; None where the model holds them whole.
        """
        state = None if weights is None else dict(weights)
        self.model.save_pretrained(folder, state_dict=state)
        (self.processor or self.tokenizer).save_pretrained(folder)

    def save_skeleton(self, folder: str | Path) -> None:
        """All of `save` but the weights: what `load_skeleton` makes a model of."""
        self.model.config.save_pretrained(folder)
        self.model.generation_config.save_pretrained(folder)
        (self.processor or self.tokenizer).save_pretrained(folder)


def load_model(settings: ModelSettings, folder: str | Path | None = None) -> LoadedModel:
    """Load `folder`, or `settings.path`, in the settings' precision, attention and kernels.

    Attention or kernels that this machine cannot run are replaced, and a message says so.

    Raises:
        ValueError: the folder is not there, incomplete or damaged, or its weights are not those of
            the model in its config.json.
    """
    path = Path(settings.path if folder is None else folder)
    config = read_config(path)
    settings, notes = runnable(settings, config.model_type)
    for note in notes:
        say_once(note)
    check_weight_files(path)
    with readable(path, "the weights"):
        model, report = auto_class(config).from_pretrained(
            path,
            dtype=DTYPES[settings.dtype],
            attn_implementation=settings.attention,
            trust_remote_code=False,
            output_loading_info=True,
            # Reported like the others by `check_loaded`, which names them.
            ignore_mismatched_sizes=True,
        )
    check_loaded(path, report)
    if settings.liger:
        apply_liger(model)
    return _limited(_with_preparation(model, path), settings)


def load_without_weights(settings: ModelSettings, folder: str | Path | None = None) -> LoadedModel:
    """`load_model` with parameters on the meta device, for an engine that is sent its weights.

    Raises:
        ValueError: as `load_model`, but for the weights.
    """
    path = Path(settings.path if folder is None else folder)
    config = read_config(path)
    with torch.device("meta"):
        model = auto_class(config).from_config(config, dtype=DTYPES[settings.dtype])
    return _limited(_with_preparation(model, path), settings)


def auto_class(config: Any) -> Any:
    """The class of transformers' that makes the model of a configuration."""
    return AutoModelForImageTextToText if _has_vision(config) else AutoModelForCausalLM


def _has_vision(config: Any) -> bool:
    """Whether the model reads images: not if its `architectures` name a text model's class alone,
    as those of a text checkpoint do that kept its parent's `vision_config`."""
    if getattr(config, "vision_config", None) is None:
        return False
    named = getattr(config, "architectures", None)
    return not named or MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.get(config.model_type) in named


def _with_preparation(model: Any, folder: Path) -> LoadedModel:
    """The model with the generation config, tokenizer and, if it reads images, processor."""
    if (folder / "generation_config.json").is_file():
        # transformers' own loading falls back to defaults where the file is damaged.
        with readable(folder, "generation_config.json"):
            model.generation_config = GenerationConfig.from_pretrained(folder)
    if _has_vision(model.config):
        _check_takes_encoded_images(model, folder)
        with readable(folder, "the processor (processor_config.json, preprocessor_config.json)"):
            processor = AutoProcessor.from_pretrained(folder, trust_remote_code=False)
            tokenizer = processor.image_processor and processor.tokenizer
    else:
        processor = None
        with readable(folder, "the tokenizer"):
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    check_tokenizer(folder, tokenizer, model.get_input_embeddings().num_embeddings)
    return LoadedModel(model, processor, tokenizer)


def _check_takes_encoded_images(model: Any, folder: Path) -> None:
    """A forward that lacks the argument drops it in its `**kwargs`: the policy would be blind."""
    if "mm_encoder_outputs" not in inspect.signature(model.base_model.forward).parameters:
        raise ValueError(
            f"model.path: {folder}: {type(model.base_model).__name__} of transformers "
            f"{transformers.__version__} takes no encoded images (mm_encoder_outputs), and would "
            "see none; wanted a model that does, with transformers 5.18 or newer"
        )


def load_skeleton(
    folder: str | Path,
    weights: Mapping[str, torch.Tensor],
    lora: LoraSettings | None = None,
) -> LoadedModel:
    """A model of what `save_skeleton` wrote, in the precision it was trained in.

    Args:
        folder: the skeleton.
        weights: by name; those of adapters too.
        lora: the adapters it was trained with.

    Raises:
        ValueError: the weights are not those of such a model.
    """
    folder = Path(folder)
    config = read_config(folder)
    with torch.device("meta"):
        model = auto_class(config).from_config(config)
        if lora is not None:
            add_adapters(model, lora, seed=0)
    cast = {name: tensor.to(config.dtype) for name, tensor in weights.items()}
    result = model.load_state_dict(cast, strict=False, assign=True)
    model.tie_weights()
    lost = [n for n, p in model.named_parameters() if p.is_meta] + result.unexpected_keys
    if lost:
        raise ValueError(f"{folder}: the weights and the model differ in {lost[0]!r}")
    return _with_preparation(model, folder)


def _limited(loaded: LoadedModel, settings: ModelSettings) -> LoadedModel:
    """With the settings' bounds on the area images are scaled to."""
    if loaded.processor is not None:
        images = loaded.processor.image_processor
        limits = {"shortest_edge": settings.min_pixels, "longest_edge": settings.max_pixels}
        given = {name: value for name, value in limits.items() if value is not None}
        images.size = type(images.size)(**(dict(images.size) | given))
    return loaded


def runnable(settings: ModelSettings, kind: str | None = None) -> tuple[ModelSettings, list[str]]:
    """The settings that this machine can run, and a sentence for each that it cannot.

    Args:
        settings: what is asked for.
        kind: the model's `model_type`; None: not known yet.
    """
    notes = []
    is_flash = settings.attention == "flash_attention_2"
    if is_flash and (reason := _why_no_flash_attention(settings.dtype)):
        notes.append(f"model.attention=flash_attention_2 cannot run: {reason}; sdpa is used")
        settings = replace(settings, attention="sdpa")
    if settings.liger and (reason := _why_no_liger(kind)):
        notes.append(f"model.liger cannot run: {reason}; transformers' own layers are used")
        settings = replace(settings, liger=False)
    return settings, notes


@cache
def say_once(note: str) -> None:
    """Log one of `runnable`'s sentences, by the first rank."""
    if os.environ.get("RANK", "0") == "0":
        logger.warning("warning: %s", note)


def _why_no_flash_attention(dtype: str) -> str | None:
    if not torch.cuda.is_available():
        return "there is no GPU"
    if torch.version.hip is None and torch.cuda.get_device_capability() < (8, 0):
        return f"{torch.cuda.get_device_name()} is older than Ampere (compute capability 8.0)"
    if importlib.util.find_spec("flash_attn") is None:
        return "flash-attn is not installed (pip install flash-attn)"
    if dtype != "bfloat16":
        return f"it computes in bfloat16, and model.dtype is {dtype}"
    return None


def _why_no_liger(kind: str | None) -> str | None:
    # Triton's interpreter runs the kernels on CPUs, slowly: for tests.
    if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
        return "there is no GPU"
    if importlib.util.find_spec("liger_kernel") is None:
        return "liger-kernel is not installed (pip install liger-kernel)"
    # 0.8.5 imports classes, and replaces functions, that transformers 5.23 has moved.
    if Version(transformers.__version__) >= Version("5.23"):
        return f"Liger is not tested with transformers {transformers.__version__}, but before 5.23"
    if kind is not None and kind not in LIGER_KINDS:
        return f"it is not tested with {kind} models, but with {', '.join(LIGER_KINDS)}"
    return None


def recompute_activations(model: Any) -> None:
    """Keep each layer's inputs alone for the backward, and compute the rest again."""
    # transformers 5.23 renamed it.
    renamed = getattr(model, "activation_checkpointing_enable", None)
    (renamed or model.gradient_checkpointing_enable)({"use_reentrant": False})


def apply_liger(model: Any) -> None:
    """Put Liger's RMSNorm, SwiGLU and rotary embedding into a loaded model.

    Its fused loss is left out: `care_kernels` computes the loss. Functions are replaced in the
    module of the model's class, so for all models of this kind in the process.

    Source: arXiv:2410.10989; liger_kernel/transformers/monkey_patch.py.
    """
    from liger_kernel.transformers import LigerSwiGLUMLP, liger_rotary_pos_emb
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN

    MODEL_TYPE_TO_APPLY_LIGER_FN[model.config.model_type](
        rope=True,
        rms_norm=True,
        swiglu=True,
        cross_entropy=False,
        fused_linear_cross_entropy=False,
        model=model,
    )
    # Liger 0.8.5 replaces the multimodal rotary function that Qwen2.5-VL had before transformers 5
    # merged the three axes ahead of the layers, and no SwiGLU of Qwen3-VL's.
    module: Any = sys.modules[type(model).__module__]
    module.apply_rotary_pos_emb = liger_rotary_pos_emb
    for layer in getattr(model.base_model, "language_model", model.base_model).layers:
        layer.mlp.forward = MethodType(LigerSwiGLUMLP.forward, layer.mlp)
