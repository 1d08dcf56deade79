"""Qwen3.5 and the mixtures of experts, built offline from transformers' own classes."""

import json
import shutil

import pytest
import torch
from transformers import AutoConfig, AutoModelForImageTextToText

from care_train.models.batch import TokenSequence, collate, image_inputs, packed_positions
from care_train.models.policy import Policy
from care_train.planning.workload import describe, read_architecture
from tests.train.builders import encoder_of, full_log_probs, image_sample, load, text_sample

HYBRID = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}

KINDS = {
    "qwen3_vl_moe": EXPERTS,
    "qwen3_5": HYBRID,
    "qwen3_5_moe": HYBRID | EXPERTS | {"shared_expert_intermediate_size": 32},
}


@pytest.fixture(scope="module", params=KINDS)
def folder(request, tiny_folder, tmp_path_factory):
    """A model of the kind, with the tiny Qwen3-VL's sizes, tokenizer and processor."""
    where = tmp_path_factory.mktemp("models") / request.param
    shutil.copytree(tiny_folder("tiny-qwen3-vl"), where)
    values = json.loads((where / "config.json").read_text())
    own = {"model_type", "architectures", "transformers_version", "dtype"}
    text, vision = (
        {k: v for k, v in values.pop(part).items() if k not in own}
        for part in ("text_config", "vision_config")
    )
    values = {k: v for k, v in values.items() if k not in own}
    config = AutoConfig.for_model(
        request.param, text_config=text | KINDS[request.param], vision_config=vision, **values
    )
    torch.manual_seed(0)
    AutoModelForImageTextToText.from_config(config).save_pretrained(where)
    return where


def _sequences(loaded):
    samples = [text_sample(0), image_sample("red", 1), image_sample("blue", 2, size=100)]
    prompts = encoder_of(loaded).encode(samples)
    # Two rollouts share the last prompt, whose image is encoded once.
    return [
        TokenSequence(prompt, (), tuple(range(20, 25 + place)))
        for place, prompt in enumerate([*prompts, prompts[-1]])
    ]


def test_log_probs_are_those_of_full_logits(folder):
    """Padded, with images and without: as each sequence alone, and gradients reach the tower."""
    loaded = load(folder)
    sequences = _sequences(loaded)
    log_probs, _ = Policy(loaded.model)(
        collate(sequences, loaded.pad_token_id, loaded.image_token_id)
    )
    wanted = []
    for sequence in sequences:
        ids = torch.tensor([sequence.token_ids])
        inputs = image_inputs([sequence.prompt], ids, loaded.image_token_id)
        full = full_log_probs(loaded, sequence.token_ids, inputs)
        wanted.append(full.gather(1, ids[0, 1:, None])[sequence.response_start - 1 :, 0])
    torch.testing.assert_close(log_probs, torch.cat(wanted), rtol=1e-4, atol=1e-4)
    log_probs.sum().backward()
    tower = [p.grad for p in loaded.model.base_model.visual.parameters()]
    assert all(gradient is not None for gradient in tower)


def test_packing_is_refused(folder):
    """Its packed forward is not proven equal to the padded one."""
    with pytest.raises(ValueError, match=r"train\.packing: .*train\.packing=false"):
        packed_positions(load(folder).model)


def test_the_plan_counts_it(folder):
    """All parameters, experts and linear attention included."""
    model = load(folder).model
    counted = read_architecture(str(folder))
    assert counted.num_parameters == sum(p.numel() for p in model.parameters())
    assert counted.num_vision == describe(model, "").num_vision > 0
