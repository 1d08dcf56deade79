"""Architectures beside the tiny models': Qwen3.5, mixtures of experts, heads that scale or cap."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    CohereConfig,
    Gemma2Config,
    GraniteConfig,
    Qwen2Config,
)

from care_train.models.batch import TokenSequence, collate, image_inputs, packed_positions
from care_train.models.policy import Policy
from care_train.models.prompts import EncodedPrompt
from care_train.planning.workload import describe, read_architecture
from tests.train.builders import (
    SMALL_SIZES,
    encoder_of,
    full_log_probs,
    image_sample,
    load,
    text_sample,
)

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


@pytest.mark.parametrize(
    "config",
    [
        GraniteConfig(logits_scaling=0.125, **SMALL_SIZES),
        CohereConfig(logit_scale=4.0, **SMALL_SIZES),
        Gemma2Config(
            final_logit_softcapping=0.5, initializer_range=0.3, head_dim=16, **SMALL_SIZES
        ),
    ],
    ids=["granite", "cohere", "gemma2"],
)
def test_log_probs_are_those_of_the_models_own_logits(config):
    """Granite divides by logits_scaling, Cohere multiplies by logit_scale, Gemma caps: trained on
    the logits they sample from."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    sequences = [TokenSequence(EncodedPrompt((5, 6, 7)), (), (9, 10, 11, 12 + i)) for i in range(2)]
    batch = collate(sequences, 0, None)
    policy = Policy(model)
    with torch.no_grad():
        logits = model(batch.inputs["input_ids"]).logits.flatten(0, 1)[batch.rows].float()
        found = policy(batch, temperature=0.8)[0]
        hidden = policy.hidden_states(batch).flatten(0, 1)[batch.rows]
    wanted = (logits / 0.8).log_softmax(-1).gather(1, batch.target_ids[:, None])[:, 0]
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(policy.head.logits(hidden), logits, rtol=1e-4, atol=1e-4)
    plain = (hidden @ policy.head.weight.T / 0.8).log_softmax(-1)
    assert (plain.gather(1, batch.target_ids[:, None])[:, 0] - wanted).abs().max() > 1e-2


def test_a_head_that_is_no_plain_matrix_is_refused(monkeypatch):
    """Its weight alone would not be what the model computes: the error names the model."""
    model = AutoModelForCausalLM.from_config(Qwen2Config(**SMALL_SIZES))
    wrapped = SimpleNamespace(base_layer=model.lm_head)
    monkeypatch.setattr(model, "get_output_embeddings", lambda: wrapped)
    with pytest.raises(ValueError, match="Qwen2ForCausalLM with an adapter on its output head"):
        Policy(model)
