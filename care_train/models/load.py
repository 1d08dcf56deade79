"""Load a policy, vision-language or text only, with what prepares its input."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    GenerationConfig,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from care_train.config import LoraSettings, ModelSettings
from care_train.models.fast_paths import apply_liger, runnable, say_once
from care_train.models.folder import (
    check_loaded,
    check_tokenizer,
    check_weight_files,
    read_config,
    readable,
)
from care_train.models.lora import add_adapters

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
        with readable(folder, "the processor (processor_config.json, preprocessor_config.json)"):
            processor = AutoProcessor.from_pretrained(folder, trust_remote_code=False)
            tokenizer = processor.image_processor and processor.tokenizer
    else:
        processor = None
        with readable(folder, "the tokenizer"):
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    check_tokenizer(folder, tokenizer, model.get_input_embeddings().num_embeddings)
    return LoadedModel(model, processor, tokenizer)


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
