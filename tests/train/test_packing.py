"""Packed batches: sequences end to end, the numbers of padded ones."""

import copy
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from care_train.models.batch import TokenSequence, collate, pack, packed_positions
from care_train.models.policy import Policy
from care_train.models.prompts import EncodedPrompt
from care_train.models.tiny import TINY_KINDS
from tests.train.builders import encoder_of, image_sample, load, text_sample


def _sequences(loaded, has_images: bool) -> list[TokenSequence]:
    """Text rows, one image, two images in a row, two rollouts of one prompt; lengths all differ."""
    samples = [text_sample(0), text_sample(1, prompt="is it red?")]
    if has_images:
        two = (image_sample(size=56).images[0], image_sample("blue", size=110).images[0])
        samples += [
            image_sample("red", 2, size=100),
            image_sample(index=3, images=two, prompt="<image> or <image>?"),
        ]
    prompts = encoder_of(loaded).encode(samples)
    generator = torch.Generator().manual_seed(0)
    sequences = []
    for place, prompt in enumerate([*prompts, prompts[-1]]):
        ids = torch.randint(10, 60, (4 + 3 * place,), generator=generator).tolist()
        sequences.append(TokenSequence(prompt, tuple(ids[:2]) if place % 2 else (), tuple(ids)))
    return sequences


def _both(loaded, sequences):
    padded = collate(sequences, loaded.pad_token_id, loaded.image_token_id)
    return padded, pack(sequences, packed_positions(loaded.model), loaded.image_token_id)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", TINY_KINDS)
def test_packed_equals_padded(kind, attention, tiny_folder):
    """Images and text mixed, deepstack included: the same hidden states, log-probs, embeddings,
    loss and gradients."""
    loaded = load(tiny_folder(kind))
    loaded.model.set_attn_implementation(attention)
    sequences = _sequences(loaded, has_images=kind != "tiny-qwen2")
    spans = torch.tensor([[s.response_start + 1, s.response_start + 3] for s in sequences])
    results = []
    for batch in _both(loaded, sequences):
        policy = Policy(copy.deepcopy(loaded.model))
        rows, embeddings = policy(batch, pool_spans=spans, rows_only=True)
        log_probs, _ = policy(batch, temperature=0.7)
        advantages = torch.linspace(-1, 1, len(rows))
        arguments = {"advantages": advantages, "old_log_probs": log_probs.detach() - 0.1}
        output, _ = policy(batch, 0.7, arguments)
        output.loss.backward()
        gradients = {n: p.grad for n, p in policy.named_parameters() if p.grad is not None}
        assert len(gradients) > 20
        results.append((rows, log_probs, embeddings, output.loss, gradients))
    for padded, packed in zip(*results, strict=True):
        torch.testing.assert_close(packed, padded, rtol=1e-4, atol=2e-5)
    ids = sum(len(s.token_ids) for s in sequences)
    assert _both(loaded, sequences)[1].inputs["input_ids"].shape == (1, ids)


@pytest.mark.parametrize("kind", ["tiny-qwen2.5-vl", "tiny-qwen3-vl"])
def test_positions_are_those_of_each_sequence_alone(kind, tiny_folder):
    """Time, height and width as `get_rope_index` has them for the whole sequence, and a count that
    begins anew: without the first, images are misplaced; without the second, sequences mix."""
    loaded = load(tiny_folder(kind))
    sequences = _sequences(loaded, has_images=True)
    position_ids = _both(loaded, sequences)[1].inputs["position_ids"][:, 0]
    start = 0
    for sequence in sequences:
        own = position_ids[:, start : start + len(sequence.token_ids)]
        ids = torch.tensor([sequence.token_ids])
        types = (ids == loaded.image_token_id).int()
        grid = sequence.prompt.image_grid_thw
        wanted, _ = loaded.model.base_model.get_rope_index(ids, types, image_grid_thw=grid)
        assert torch.equal(own[1:], wanted[:, 0])
        assert torch.equal(own[0], torch.arange(ids.shape[1]))
        start += ids.shape[1]
    assert start == position_ids.shape[1]


def test_sequences_of_a_pack_do_not_see_each_other(tiny_folder):
    """Another neighbour, the same log-probs."""
    loaded = load(tiny_folder())
    sequences = _sequences(loaded, has_images=True)
    policy = Policy(loaded.model)
    found = []
    for first in (sequences[0], sequences[4]):
        batch = _both(loaded, [first, sequences[2]])[1]
        with torch.no_grad():
            rows, _ = policy(batch)
        found.append(rows[-len(sequences[2].response_ids) :])
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-5)


SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}


def test_a_model_that_is_not_tested_is_refused():
    """Qwen3 packs like Qwen2; another kind is an error that names it and the way out."""
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(Qwen3Config(head_dim=16, **SIZES))
    sequences = [
        TokenSequence(EncodedPrompt(tuple(range(1, 4 + i))), (), tuple(range(9, 14 + 2 * i)))
        for i in range(3)
    ]
    policy = Policy(model)
    packed = policy(pack(sequences, packed_positions(model), None))[0]
    torch.testing.assert_close(packed, policy(collate(sequences, 0, None))[0])
    with pytest.raises(ValueError, match=r"train\.packing.*llama.*train\.packing=false"):
        packed_positions(LlamaForCausalLM(LlamaConfig(**SIZES)))
