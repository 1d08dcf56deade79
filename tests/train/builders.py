"""Short ways to make sessions, prompts and groups for the trainer's tests."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import deepspeed
import torch

from care_train.config import (
    Config,
    LoraSettings,
    ModelSettings,
    PromptSettings,
    build_config,
    merge,
)
from care_train.data import Sample
from care_train.distributed import initialize_process_group
from care_train.models.batch import (
    ModelBatch,
    TokenSequence,
    collate,
    image_inputs,
    multimodal_positions,
    pack,
    packed_positions,
)
from care_train.models.load import LoadedModel, load_model
from care_train.models.prompts import PromptEncoder
from care_train.training.engine import MicroBatch, PolicyEngine
from care_train.training.optimizer import OptimizerSettings
from care_train.training.session import Session, open_session

SMALL_SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
"""Of a language model of any architecture of transformers."""


def make_config(values: dict | None = None) -> Config:
    """A small configuration for a tiny model."""
    base = {
        "prompt": {"system": None, "max_prompt_tokens": 200},
        "rollout": {"group_size": 4, "max_new_tokens": 12},
        "train": {"steps": 2, "prompts_per_step": 4, "micro_batch_size": 8, "learning_rate": 1e-3},
        "limits": {"empty_steps": None},
        "logging": {"report_to": [], "samples_every": 0},
    }
    return build_config(merge(base, values or {}))


def make_session(folder: Path, values: dict | None = None) -> Session:
    config = make_config(values)
    return open_session(config, folder, initialize_process_group())


def load(folder: Path, **model) -> LoadedModel:
    return load_model(ModelSettings(path=str(folder), **model))


def encoder_of(loaded: LoadedModel, **prompt) -> PromptEncoder:
    return PromptEncoder(loaded, PromptSettings(system=None, **prompt))


def image_sample(color: str = "red", index: int = 0, size: int = 64, **fields) -> Sample:
    """A row with one drawn image."""
    from PIL import Image

    values = {
        "id": f"sample/{index}",
        "prompt": "what color is the image?",
        "answer": color,
        "images": (Image.new("RGB", (size, size), color),),
        "location": f"rows.jsonl: row {index + 1}",
    }
    return Sample(**(values | fields))


def text_sample(index: int = 0, **fields) -> Sample:
    values = {
        "id": f"text/{index}",
        "prompt": "what color is the image?",
        "answer": "red",
        "location": f"rows.jsonl: row {index + 1}",
    }
    return Sample(**(values | fields))


def random_sequences(loaded: LoadedModel, count: int = 6) -> list[TokenSequence]:
    """Rows with and without an image in turn, with responses of 3 tokens and more."""
    generator = torch.Generator().manual_seed(1)
    has_image = loaded.processor is not None
    samples = [
        image_sample("red", i) if i % 2 and has_image else text_sample(i) for i in range(count)
    ]
    return [
        TokenSequence(p, (), tuple(torch.randint(10, 60, (3 + i,), generator=generator).tolist()))
        for i, p in enumerate(encoder_of(loaded).encode(samples))
    ]


def mixed_sequences(loaded: LoadedModel) -> list[TokenSequence]:
    """Rows with no, one and two images, and two rollouts of one prompt, whose images are encoded
    once; lengths all differ."""
    samples = [text_sample(0), text_sample(1, prompt="is it red?")]
    if loaded.processor is not None:
        two = (image_sample(size=56).images[0], image_sample("blue", size=110).images[0])
        samples += [image_sample("red", 2), image_sample("blue", 3, size=100)]
        samples += [image_sample(index=4, images=two, prompt="<image> or <image>?")]
    prompts = encoder_of(loaded).encode(samples)
    return [
        TokenSequence(prompt, (20, 21) if place % 2 else (), tuple(range(20, 25 + place)))
        for place, prompt in enumerate([*prompts, prompts[-1]])
    ]


def batch_of(
    loaded: LoadedModel, sequences: Sequence[TokenSequence], *, packed: bool = False
) -> ModelBatch:
    """Padded, or packed, as the engine makes it."""
    if packed:
        return pack(sequences, packed_positions(loaded.model), loaded.image_token_id)
    positions = multimodal_positions(loaded.model)
    return collate(sequences, loaded.pad_token_id, loaded.image_token_id, positions)


def make_engine(
    loaded: LoadedModel,
    values: dict | None = None,
    *,
    zero_stage: int = 0,
    bf16: bool = False,
    lora: LoraSettings | None = None,
    **optimizer: Any,
) -> PolicyEngine:
    """What trains `loaded` under the settings `values`; `optimizer` replaces the defaults of these
    tests."""
    settings = {"learning_rate": 1e-2, "total_steps": 10, "max_grad_norm": 1e9} | optimizer
    config = make_config(merge({"deepspeed": {"zero_stage": zero_stage}}, values or {}))
    model = replace(config.model, dtype="bfloat16" if bf16 else "float32")
    model = replace(model, lora=lora or model.lora)
    return PolicyEngine(
        loaded,
        OptimizerSettings(**settings),
        replace(config, model=model),
        initialize_process_group(),
        copy_for_rollouts=True,
    )


def micro_batch(
    engine: PolicyEngine,
    sequences: list[TokenSequence] | None = None,
    advantages: Sequence[float] = (1.0, -0.5, 2.0, -1.0, 0.25, 1.5),
) -> MicroBatch:
    """One advantage per sequence, by default six random ones, over all response tokens."""
    sequences = sequences or random_sequences(engine.loaded)
    lengths = torch.tensor([len(s.response_ids) for s in sequences])
    rows = torch.repeat_interleave(torch.tensor(list(advantages)), lengths) / lengths.sum()
    return MicroBatch(engine.collate(sequences), {"advantages": rows})


def whole_weights(engine: PolicyEngine) -> dict[str, torch.Tensor]:
    """A copy of the policy's parameters, gathered from all ranks."""
    named = dict(engine.loaded.model.named_parameters())
    with deepspeed.zero.GatheredParameters(list(named.values())):
        return {name: parameter.detach().clone() for name, parameter in named.items()}


def assert_same_weights(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> None:
    """Bit for bit."""
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


def full_log_probs(loaded: LoadedModel, token_ids, inputs=None, temperature: float = 1.0):
    """[T-1, V] log-softmax of one unpadded sequence's full logits: the plain way."""
    ids = torch.tensor([token_ids])
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)} | (inputs or {})
    with torch.no_grad():
        logits = loaded.model(**batch).logits[0].float()
    return (logits / temperature).log_softmax(-1)[:-1]


def response_log_probs(loaded: LoadedModel, sequence: TokenSequence, temperature: float = 1.0):
    """Of each response token of a sequence alone, from its full logits."""
    ids = torch.tensor([sequence.token_ids])
    inputs = image_inputs([sequence.prompt], ids, loaded.image_token_id)
    full = full_log_probs(loaded, sequence.token_ids, inputs, temperature)
    return full.gather(1, ids[0, 1:, None])[sequence.response_start - 1 :, 0]
