"""Which sequences go through the model together, and that it changes nothing."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from care_train.config import TrainSettings
from care_train.models.batch import TokenSequence, collate, pack, packed_positions
from care_train.models.policy import Policy
from care_train.models.prompts import EncodedPrompt
from care_train.training.micro_batches import num_tokens, padded_tokens, split
from tests.train.builders import load, make_config

LENGTHS = st.lists(st.integers(1, 100), max_size=40)


def _limits(packed: bool, tokens: int | None, size: int = 8) -> TrainSettings:
    return TrainSettings(micro_batch_size=size, micro_batch_tokens=tokens, packing=packed)


@given(lengths=LENGTHS, packed=st.booleans(), more=st.integers(0, 200), ranks=st.integers(0, 50))
def test_every_sequence_once_and_none_over_the_budget(lengths, packed, more, ranks):
    """A partition, within `micro_batch_tokens`, of at least as many parts as another rank needs."""
    budget = max(lengths, default=1) + more
    limits = _limits(packed, budget)
    own = split(lengths, limits)
    parts = split(lengths, limits, at_least=max(ranks, len(own)))
    assert sorted(i for part in parts for i in part) == list(range(len(lengths)))
    assert len(parts) == min(max(ranks, len(own)), len(lengths))
    size = num_tokens if packed else padded_tokens
    sizes = [size(lengths, part) for part in parts]
    assert all(found <= budget for found in sizes)
    assert sizes == sorted(sizes, reverse=True)


@given(lengths=LENGTHS, size=st.integers(1, 12), ranks=st.integers(0, 50))
def test_by_sequences(lengths, size, ranks):
    """Without a budget: at most `micro_batch_size` each, in as many parts as another rank needs."""
    limits = _limits(False, None, size)
    own = split(lengths, limits)
    assert len(own) == -(-len(lengths) // size)
    parts = split(lengths, limits, at_least=max(ranks, len(own)))
    assert sorted(i for part in parts for i in part) == list(range(len(lengths)))
    assert len(parts) == min(max(ranks, len(own)), len(lengths))
    assert all(len(part) <= size for part in parts)


@given(lengths=st.lists(st.integers(1, 100), min_size=1, max_size=40), more=st.integers(0, 400))
def test_packs_are_balanced(lengths, more):
    """Longest first: two packs differ by no more than the longest sequence, and there is none too
    many by more than a third of the tokens (Graham 1969)."""
    budget = max(lengths) + more
    parts = split(lengths, _limits(True, budget))
    sizes = [num_tokens(lengths, part) for part in parts]
    assert max(sizes) - min(sizes) <= max(lengths)
    if len(parts) > 1:
        fewest = -(-sum(lengths) // budget)
        assert len(parts) == fewest or sum(lengths) > (len(parts) - 1) * budget / 2


def test_padded_parts_are_as_small_as_their_number_allows():
    """Not one full and one almost empty micro-batch: two of alike cost."""
    parts = split([10] * 12, _limits(False, 110))
    assert [len(part) for part in parts] == [6, 6]


def test_a_budget_no_sequence_fits_is_an_error():
    """At the settings where lengths are bounded; where they are not, when a sequence comes."""
    with pytest.raises(ValueError, match=r"train\.micro_batch_tokens: got 223, .*at least 224"):
        make_config({"train": {"micro_batch_tokens": 223}})
    assert make_config({"train": {"micro_batch_tokens": 224}}).train.micro_batch_tokens == 224
    limits = _limits(False, 20)
    with pytest.raises(ValueError, match=r"train\.micro_batch_tokens: got 20, wanted at least 21"):
        split([3, 21], limits)


@pytest.fixture(scope="module")
def rows(tiny_folder):
    """A model, sequences, the loss's rows for each, and what they make all at once."""
    loaded = load(tiny_folder("tiny-qwen2"))
    generator = torch.Generator().manual_seed(0)
    draw = lambda n: tuple(torch.randint(10, 60, (n,), generator=generator).tolist())  # noqa: E731
    sequences = [TokenSequence(EncodedPrompt(draw(2 + i)), (), draw(9 - i)) for i in range(7)]
    weights = [torch.randn(len(s.response_ids), generator=generator) for s in sequences]
    inputs = loaded, sequences, weights
    return inputs, _loss_and_gradients(inputs, [range(7)], packed=False)


def _loss_and_gradients(inputs, parts, packed):
    loaded, sequences, weights = inputs
    policy = Policy(copy.deepcopy(loaded.model))
    total = 0.0
    for part in parts:
        chosen = [sequences[i] for i in part]
        if packed:
            batch = pack(chosen, packed_positions(loaded.model), None)
        else:
            batch = collate(chosen, loaded.pad_token_id, None)
        advantages = torch.cat([weights[i] for i in part])
        kl = torch.full_like(advantages, 0.1)
        reference = advantages * 0.1 - 2
        arguments = {"advantages": advantages, "kl_weights": kl, "ref_log_probs": reference}
        output, _ = policy(batch, 1.0, arguments)
        output.loss.backward()
        total += float(output.loss.detach())
    return total, [p.grad for p in policy.parameters()]


@settings(max_examples=12)
@given(data=st.data(), packed=st.booleans())
def test_any_partition_has_one_loss_and_one_gradient(data, packed, rows):
    """Micro-batches are how a sum is taken: any partition, in any order, padded or packed."""
    inputs, whole = rows
    owners = data.draw(st.lists(st.integers(0, 3), min_size=7, max_size=7))
    order = data.draw(st.permutations(range(7)))
    parts = [[i for i in order if owners[i] == k] for k in range(4)]
    loss, gradients = _loss_and_gradients(inputs, [part for part in parts if part], packed)
    assert loss == pytest.approx(whole[0], rel=1e-5, abs=1e-5)
    for mine, wanted in zip(gradients, whole[1], strict=True):
        torch.testing.assert_close(mine, wanted, rtol=1e-4, atol=1e-5)
