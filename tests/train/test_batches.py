"""Which sequences go through the model together, padded or packed, and that it changes nothing."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from care_train.config import TrainSettings
from care_train.models.batch import TokenSequence, collate, pack, packed_positions
from care_train.models.policy import Policy
from care_train.models.prompts import EncodedPrompt
from care_train.models.tiny import TINY_KINDS
from care_train.training.micro_batches import num_tokens, padded_tokens, split
from tests.train.builders import SMALL_SIZES, batch_of, load, make_config, mixed_sequences

LENGTHS = st.lists(st.integers(1, 100), max_size=40)


def _limits(packed: bool, tokens: int | None, size: int = 8) -> TrainSettings:
    return TrainSettings(micro_batch_size=size, micro_batch_tokens=tokens, packing=packed)


@given(
    lengths=LENGTHS,
    kind=st.sampled_from(["packed", "padded", "counted"]),
    more=st.integers(0, 200),
    count=st.integers(1, 12),
    ranks=st.integers(0, 50),
)
def test_every_sequence_once_and_none_over_the_limit(lengths, kind, more, count, ranks):
    """A partition, within `micro_batch_tokens` or without it `micro_batch_size`, of at least as
    many parts as another rank needs."""
    budget = None if kind == "counted" else max(lengths, default=1) + more
    limits = _limits(kind == "packed", budget, count)
    own = split(lengths, limits)
    parts = split(lengths, limits, at_least=max(ranks, len(own)))
    assert sorted(i for part in parts for i in part) == list(range(len(lengths)))
    assert len(parts) == min(max(ranks, len(own)), len(lengths))
    if budget is None:
        assert len(own) == -(-len(lengths) // count)
        assert all(len(part) <= count for part in parts)
        return
    size = num_tokens if kind == "packed" else padded_tokens
    sizes = [size(lengths, part) for part in parts]
    assert all(found <= budget for found in sizes)
    assert sizes == sorted(sizes, reverse=True)
    if kind == "packed" and lengths:
        # Longest first: packs are balanced (Graham 1969).
        assert sizes[0] - sizes[-1] <= max(lengths)


def test_padded_parts_are_as_small_as_their_number_allows():
    """Not one full and one almost empty micro-batch: two of alike cost."""
    parts = split([10] * 12, _limits(False, 110))
    assert [len(part) for part in parts] == [6, 6]


def test_a_budget_no_sequence_fits_is_an_error():
    """When a sequence comes; where settings bound all lengths: tests/train/test_config.py."""
    assert make_config({"train": {"micro_batch_tokens": 224}}).train.micro_batch_tokens == 224
    with pytest.raises(ValueError, match=r"train\.micro_batch_tokens: got 20, wanted at least 21"):
        split([3, 21], _limits(False, 20))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", TINY_KINDS)
def test_packed_equals_padded(kind, attention, tiny_folder):
    """Images and text mixed, deepstack included: the same hidden states, log-probs, embeddings,
    loss and gradients, so no sequence of a pack sees another one."""
    loaded = load(tiny_folder(kind))
    loaded.model.set_attn_implementation(attention)
    sequences, results = mixed_sequences(loaded), []
    spans = torch.tensor([[s.response_start + 1, s.response_start + 3] for s in sequences])
    batches = [batch_of(loaded, sequences, packed=packed) for packed in (False, True)]
    for batch in batches:
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
    assert batches[1].inputs["input_ids"].shape == (1, ids)


def test_a_model_that_is_not_tested_is_refused():
    """Qwen3 packs like Qwen2; another kind is an error that names it and the way out."""
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(Qwen3Config(head_dim=16, **SMALL_SIZES))
    sequences = [
        TokenSequence(EncodedPrompt(tuple(range(1, 4 + i))), (), tuple(range(9, 14 + 2 * i)))
        for i in range(3)
    ]
    policy = Policy(model)
    packed = policy(pack(sequences, packed_positions(model), None))[0]
    torch.testing.assert_close(packed, policy(collate(sequences, 0, None))[0])
    with pytest.raises(ValueError, match=r"train\.packing.*llama.*train\.packing=false"):
        packed_positions(LlamaForCausalLM(LlamaConfig(**SMALL_SIZES)))
