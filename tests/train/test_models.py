"""Tiny real models, prompts and batches."""

import itertools
from dataclasses import replace

import pytest
import torch
from PIL import Image

from care_train.config import ModelSettings
from care_train.models.batch import TokenSequence, collate, image_inputs
from care_train.models.load import load_model
from care_train.models.policy import Policy
from care_train.models.tiny import TINY_KINDS, build_tiny_model
from tests.train.builders import encoder_of, full_log_probs, image_sample, load, text_sample

VISION_KINDS = ("tiny-qwen2.5-vl", "tiny-qwen3-vl")


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


def test_unknown_models_are_named(tmp_path):
    """A folder that is not there, and a tiny kind that is none."""
    with pytest.raises(ValueError, match=r"model\.path.*nowhere.*config\.json"):
        load_model(ModelSettings(path=str(tmp_path / "nowhere")))
    with pytest.raises(ValueError, match="tiny-qwen9"):
        build_tiny_model("tiny-qwen9", tmp_path)


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


@pytest.mark.parametrize("kind", TINY_KINDS)
def test_log_probs_equal_full_logits(kind, tiny_folder):
    """The policy's log-probs, batched and padded, are those of each sequence's full logits."""
    loaded = load(tiny_folder(kind))
    sequences = _mixed_sequences(loaded, with_images=kind != "tiny-qwen2")
    batch = collate(sequences, loaded.pad_token_id, loaded.image_token_id)
    with torch.no_grad():
        got, _ = Policy(loaded.model)(batch, temperature=0.7)
    start = 0
    for sequence in sequences:
        ids = torch.tensor([sequence.token_ids])
        inputs = image_inputs([sequence.prompt], ids, loaded.image_token_id)
        full = full_log_probs(loaded, sequence.token_ids, inputs, temperature=0.7)
        wanted = full.gather(1, ids[0, 1:, None])[sequence.response_start - 1 :, 0]
        own = got[start : start + len(wanted)]
        torch.testing.assert_close(own, wanted, rtol=1e-4, atol=1e-4)
        start += len(wanted)
    assert start == len(got)


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
        batch = collate(rows, loaded.pad_token_id, loaded.image_token_id)
        log_probs, _ = Policy(loaded.model)(batch)
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
    sequences = _mixed_sequences(loaded, with_images=True)
    batch = collate(sequences, loaded.pad_token_id, loaded.image_token_id)
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


def _mixed_sequences(loaded, with_images):
    samples = [text_sample(0), text_sample(1, prompt="is it red?")]
    if with_images:
        samples += [image_sample("red", 2), image_sample("blue", 3, size=100)]
    generator = torch.Generator().manual_seed(0)
    sequences = []
    for place, prompt in enumerate(encoder_of(loaded).encode(samples)):
        ids = torch.randint(10, 60, (5 + place,), generator=generator).tolist()
        prefix = tuple(ids[:2]) if place % 2 else ()
        sequences.append(TokenSequence(prompt, prefix, tuple(ids)))
    return sequences
