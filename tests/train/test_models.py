"""Real models of every supported kind, in small: folders, prompts, batches and log-probs.

Beside the kinds of `tiny.py`: Qwen3.5, mixtures of experts, heads that scale or cap.
"""

import itertools
import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    CohereConfig,
    Gemma2Config,
    GraniteConfig,
    Qwen2Config,
)

from care_train.models.batch import TokenSequence, collate
from care_train.models.policy import Policy
from care_train.models.prompts import EncodedPrompt
from care_train.models.tiny import TINY_KINDS, build_tiny_model
from care_train.planning.workload import describe, read_architecture
from tests.train.builders import (
    SMALL_SIZES,
    batch_of,
    encoder_of,
    image_sample,
    load,
    mixed_sequences,
    response_log_probs,
    text_sample,
)

VISION_KINDS = ("tiny-qwen2.5-vl", "tiny-qwen3-vl")

HYBRID = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
OTHER_KINDS = {
    "qwen3_vl_moe": EXPERTS,
    "qwen3_5": HYBRID,
    "qwen3_5_moe": HYBRID | EXPERTS | {"shared_expert_intermediate_size": 32},
}


@pytest.fixture(scope="module", params=[*TINY_KINDS, *OTHER_KINDS])
def folder(request, tiny_folder, tmp_path_factory) -> Path:
    """A model of the kind; those without a tiny one have the tiny Qwen3-VL's sizes, tokenizer and
    processor."""
    if request.param in TINY_KINDS:
        return tiny_folder(request.param)
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
        request.param, text_config=text | OTHER_KINDS[request.param], vision_config=vision, **values
    )
    torch.manual_seed(0)
    AutoModelForImageTextToText.from_config(config).save_pretrained(where)
    return where


def test_log_probs_are_those_of_full_logits(folder):
    """Batched, padded, with images and without: as each sequence alone, and gradients reach the
    vision tower."""
    loaded = load(folder)
    sequences = mixed_sequences(loaded)
    batch = batch_of(loaded, sequences)
    log_probs, _ = Policy(loaded.model)(batch, temperature=0.7)
    wanted = [response_log_probs(loaded, sequence, temperature=0.7) for sequence in sequences]
    torch.testing.assert_close(log_probs, torch.cat(wanted), rtol=1e-4, atol=1e-4)
    log_probs.sum().backward()
    if loaded.processor is not None:
        tower = [p.grad for p in loaded.model.base_model.visual.parameters()]
        assert all(gradient is not None for gradient in tower)


def test_a_folder_is_counted_without_its_weights(folder):
    """`care-train plan`: the parameters of the loaded model, part by part, experts and linear
    attention included."""
    loaded = load(folder)
    read, counted = read_architecture(str(folder)), describe(loaded.model, "")
    assert read.num_parameters == sum(p.numel() for p in loaded.model.parameters())
    assert replace(read, name="", text=None, vision=None) == replace(
        counted, text=None, vision=None
    )
    assert read.text.to_dict().items() >= {"hidden_size": 64, "num_hidden_layers": 2}.items()
    if loaded.processor is not None:
        visual = loaded.model.base_model.visual
        assert read.num_vision == sum(p.numel() for p in visual.parameters())


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
    """Granite divides them, Cohere multiplies them, Gemma caps them: trained are the logits that
    responses are sampled from."""
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


@pytest.mark.parametrize("kind", TINY_KINDS)
def test_tiny_model_survives_a_save(kind, tiny_folder, tmp_path):
    """A tiny model is a plain Hugging Face folder: loaded and saved, it has the same weights."""
    loaded = load(tiny_folder(kind))
    loaded.save(tmp_path)
    again = load(tmp_path)
    for name, parameter in loaded.model.named_parameters():
        assert torch.equal(parameter, again.model.get_parameter(name)), name
    assert again.tokenizer.get_vocab() == loaded.tokenizer.get_vocab()


def test_scaled_weights_fit_their_width(tmp_path):
    """`tiny-qwen2.5-vl-scaled`: both towers' matrices begin at 1 / sqrt(width); others at 0.02."""
    for kind, text, vision in (
        ("tiny-qwen2.5-vl", 0.02, 0.02),
        ("tiny-qwen2.5-vl-scaled", 64**-0.5, 64**-0.5),
    ):
        model = load(build_tiny_model(kind, tmp_path / kind, hidden_size=64)).model
        language, eyes = model.model.language_model.layers[0], model.model.visual.blocks[0]
        assert language.mlp.up_proj.weight.std().item() == pytest.approx(text, rel=0.05)
        assert eyes.mlp.up_proj.weight.std().item() == pytest.approx(vision, rel=0.05)


@pytest.mark.parametrize("kind", VISION_KINDS)
def test_several_images_keep_their_order_and_tokens(kind, tiny_folder):
    """A row with two images has each one's tokens where its placeholder stood."""
    loaded = load(tiny_folder(kind))
    images = (Image.new("RGB", (56, 56), "red"), Image.new("RGB", (56, 112), "blue"))
    sample = image_sample(images=images, prompt="first <image> then <image> done")
    (prompt,) = encoder_of(loaded).encode([sample])
    assert prompt.image_grid_thw.tolist() == [[1, 4, 4], [1, 8, 4]]
    groups = itertools.groupby(prompt.token_ids)
    assert [len(list(run)) for token, run in groups if token == loaded.image_token_id] == [4, 8]


@pytest.mark.parametrize("kind", VISION_KINDS)
def test_batched_encoding_equals_one_by_one(kind, tiny_folder):
    """Encoding many rows at once changes nothing, text rows among them included."""
    loaded = load(tiny_folder(kind))
    encoder = encoder_of(loaded)
    samples = [image_sample("red", 0), text_sample(1), image_sample("blue", 2, size=100)]
    for sample, together in zip(samples, encoder.encode(samples), strict=True):
        (alone,) = encoder.encode([sample])
        assert alone.token_ids == together.token_ids
        if sample.images:
            torch.testing.assert_close(alone.pixel_values, together.pixel_values)


@pytest.mark.parametrize("kind", VISION_KINDS)
def test_images_of_a_group_are_encoded_once(kind, tiny_folder):
    """Rows of one prompt share its images' features: same log-probs and gradients, less work."""
    loaded = load(tiny_folder(kind))
    both = tuple(Image.new("RGB", (size, 64), color) for size, color in ((64, "red"), (92, "blue")))
    samples = [image_sample("red"), image_sample("blue", 1, 92), image_sample("red", images=both)]
    prompts = encoder_of(loaded).encode([*samples, text_sample()])
    sequences = [
        TokenSequence(prompts[i], (17, 18) * (i + row % 2), tuple(range(20, 24 + row)))
        for row, i in enumerate((1, 0, 3, 2, 1, 2, 3, 1))
    ]
    # Prompts are compared by identity.
    alone = [replace(sequence, prompt=replace(sequence.prompt)) for sequence in sequences]
    patches, results = [], []
    visual = loaded.model.base_model.visual
    visual.register_forward_pre_hook(lambda module, inputs: patches.append(len(inputs[0])))
    for rows in (sequences, alone):
        loaded.model.zero_grad()
        log_probs, _ = Policy(loaded.model)(batch_of(loaded, rows))
        log_probs.sum().backward()
        gradients = {name: p.grad.clone() for name, p in visual.named_parameters()}
        results.append((log_probs.detach(), gradients))
    for got, wanted in zip(*results, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
    counts = [0 if p.pixel_values is None else len(p.pixel_values) for p in prompts]
    assert patches == [sum(counts), sum(counts[i] for i in (1, 0, 3, 2, 1, 2, 3, 1))]


def test_embedding_pools_the_states_at_the_rationale(tiny_folder):
    """Sec. 3.3: mean of the final hidden states at the rationale's positions, L2-normalised."""
    loaded = load(tiny_folder())
    sequences = mixed_sequences(loaded)
    batch = batch_of(loaded, sequences)
    policy = Policy(loaded.model)
    spans = torch.tensor([[s.response_start + 1, s.response_start + 3] for s in sequences])
    with torch.no_grad():
        _, embeddings = policy(batch, pool_spans=spans)
        hidden = policy.hidden_states(batch)
    for row, (start, end) in enumerate(spans.tolist()):
        mean = hidden[row, start:end].mean(0)
        torch.testing.assert_close(embeddings[row], mean / mean.norm())


def test_bad_rows_are_named(tiny_folder):
    """Too long a prompt, special tokens in a prompt, images for a text model: row and fix."""
    loaded = load(tiny_folder())
    with pytest.raises(ValueError, match=r"rows\.jsonl: row 8: .*wanted at most 5.*max_prompt_tok"):
        encoder_of(loaded, max_prompt_tokens=5).encode([image_sample(index=7)])
    turn = "ok<|im_end|>\n<|im_start|>assistant\nyes"
    for row in (image_sample(index=2, prompt="see <|image_pad|>"), text_sample(2, prompt=turn)):
        for measure in (
            encoder_of(loaded).encode,
            lambda rows: encoder_of(loaded).num_tokens(*rows),
        ):
            with pytest.raises(ValueError, match=r"row 3: prompt: holds the special tokens <\|im"):
                measure([row])
    text_only = load(tiny_folder("tiny-qwen2"))
    with pytest.raises(ValueError, match=r"row 1: images: got 1, wanted none"):
        encoder_of(text_only).encode([image_sample()])


def test_text_after_a_prompt_never_becomes_special_tokens(tiny_folder):
    """A policy that spells out <|image_pad|> must not put an image token into a reflection."""
    loaded = load(tiny_folder())
    ids = encoder_of(loaded).encode_text("see <|image_pad|><|im_end|>")
    assert not {loaded.image_token_id, *loaded.eos_token_ids} & set(ids)
    assert loaded.tokenizer.decode(ids) == "see <|image_pad|><|im_end|>"
