"""The transformers engine: seeds, banned tokens, left padding, images kept."""

from dataclasses import replace

import pytest
import torch

from care_train.models.batch import image_inputs
from care_train.rollout.engine import Request, SamplingSettings, request_seed
from care_train.rollout.transformers_engine import SeededSampler, TransformersEngine
from tests.train.builders import encoder_of, full_log_probs, image_sample, load, text_sample

KINDS = ("tiny-qwen2.5-vl", "tiny-qwen3-vl")


def _requests(loaded, count=6):
    samples = [
        text_sample(i) if i % 3 == 0 else image_sample("red", i, size=64 + 28 * (i % 2))
        for i in range(count)
    ]
    prompts = encoder_of(loaded).encode(samples)
    return [Request(p, request_seed(0, 0, str(i), i)) for i, p in enumerate(prompts)]


@pytest.mark.parametrize("kind", [*KINDS, "tiny-qwen2"])
def test_a_group_shares_its_prefill(kind, tiny_folder):
    """Repeated contexts are computed once, with and without images. A response depends on its seed,
    not on its batch, nor on images of the one before: alone, reversed, or in small batches it is
    the same."""
    loaded = load(tiny_folder(kind))
    samples = [text_sample(0), text_sample(1, prompt="yes, what is it?")]
    if kind != "tiny-qwen2":
        samples += [image_sample("red", 2), image_sample("blue", 3, size=92)]
    prompts = encoder_of(loaded).encode(samples)
    contexts = [(prompt, prefix) for prompt in prompts for prefix in ((), (17, 18))]
    requests = [
        Request(prompt, request_seed(0, 0, str(place), index), prefix)
        for index in range(3)
        for place, (prompt, prefix) in enumerate(contexts)
    ]
    sampling, engine = SamplingSettings(8), TransformersEngine(loaded, 64)
    alone = [engine.generate([request], sampling)[0] for request in requests]
    shapes = []
    backbone = loaded.model.base_model
    handle = backbone.register_forward_pre_hook(
        lambda module, _, inputs: shapes.append(tuple(inputs["input_ids"].shape)), with_kwargs=True
    )
    together = engine.generate(requests, sampling)
    handle.remove()
    assert together == alone
    small = TransformersEngine(loaded, 2)
    assert small.generate(requests[::-1], sampling) == together[::-1]
    width = max(len(prompt.token_ids) + len(prefix) for prompt, prefix in contexts)
    assert shapes[:2] == [(len(contexts), width - 1), (len(requests), 1)]


def test_seeds_differ_over_run_step_prompt_and_rollout():
    """No two of a run's rollouts share a seed."""
    seeds = {
        request_seed(run, step, prompt, index)
        for run in range(3)
        for step in range(5)
        for prompt in ("a", "b", "1", "11")
        for index in range(12)
    }
    assert len(seeds) == 3 * 5 * 4 * 12


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_takes_the_argmax_of_the_training_forward(kind, tiny_folder):
    """Left-padded generation with images sees what the right-padded training forward sees: the
    prompt, and the prefix where one is forced."""
    loaded = load(tiny_folder(kind))
    banned = _special_ids(loaded)
    requests = [replace(r, prefix_ids=(20, 21)[: i % 3]) for i, r in enumerate(_requests(loaded))]
    found = TransformersEngine(loaded, 64).generate(requests, SamplingSettings(8, greedy=True))
    for request, completion in zip(requests, found, strict=True):
        context = request.prompt.token_ids + request.prefix_ids
        ids = context + completion.token_ids
        inputs = image_inputs([request.prompt], torch.tensor([ids]), loaded.image_token_id)
        full = full_log_probs(loaded, ids, inputs)[len(context) - 1 :]
        full[:, banned] = -torch.inf
        assert full.argmax(-1).tolist() == list(completion.token_ids)


def _with_bias(loaded, token: int, bias: float):
    """A head that leans to one token in every state."""
    head = loaded.model.get_output_embeddings()
    head.bias = torch.nn.Parameter(torch.zeros(head.out_features))
    with torch.no_grad():
        head.bias[token] = bias
    return loaded


def test_special_and_image_tokens_are_never_sampled(tiny_folder):
    """A policy that wants to write <|image_pad|> cannot: the next forward would not survive it."""
    loaded = load(tiny_folder())
    _with_bias(loaded, loaded.image_token_id, 50.0)
    completions = TransformersEngine(loaded, 64).generate(_requests(loaded), SamplingSettings(16))
    sampled = {token for completion in completions for token in completion.token_ids}
    assert sampled and not sampled & set(_special_ids(loaded))


def test_the_models_own_generation_config_does_not_bend_sampling(tiny_folder):
    """Published models ship repetition penalties and top-k; rollouts must not inherit them."""
    loaded = load(tiny_folder())
    requests, sampling = _requests(loaded), SamplingSettings(12)
    plain = TransformersEngine(loaded, 64).generate(requests, sampling)
    config = loaded.model.generation_config
    config.repetition_penalty, config.top_k, config.temperature = 5.0, 1, 0.01
    config.no_repeat_ngram_size, config.do_sample = 1, True
    assert TransformersEngine(loaded, 64).generate(requests, sampling) == plain


def test_sampling_follows_the_distribution():
    """Over many seeds, frequencies match softmax(logits / T) after top-k and top-p."""
    logits = torch.tensor([2.0, 1.0, 0.5, 0.0, -1.0])
    sampling = SamplingSettings(1, temperature=0.8, top_p=0.95, top_k=4)
    sampler = SeededSampler(range(20000), sampling, [1], 3, torch.device("cpu"))
    scores = sampler(torch.zeros(20000, 3, dtype=torch.int64), logits.expand(20000, -1))
    frequency = torch.bincount(scores.argmax(-1), minlength=5) / 20000
    # Token 1 is banned; top-k 4 keeps 0, 2, 3, 4; top-p 0.95 drops the tail 4.
    kept = (logits / 0.8)[[0, 2, 3]].softmax(0)
    wanted = torch.tensor([kept[0], 0.0, kept[1], kept[2], 0.0])
    torch.testing.assert_close(frequency, wanted, atol=0.012, rtol=0)


def test_a_response_ends_at_eos(tiny_folder):
    """EOS ends a response and is kept; the length limit leaves it unfinished."""
    loaded = load(tiny_folder())
    eos = loaded.eos_token_ids[0]
    engine = TransformersEngine(_with_bias(loaded, eos, 4.0), 64)
    completions = engine.generate(_requests(loaded, 24), SamplingSettings(6))
    assert {completion.finished for completion in completions} == {True, False}
    for completion in completions:
        assert completion.finished == (completion.token_ids[-1] == eos)
        assert eos not in completion.token_ids[:-1]
        assert completion.finished or len(completion.token_ids) == 6


def _special_ids(loaded):
    tokens = loaded.tokenizer.added_tokens_decoder.items()
    return [i for i, token in tokens if token.special and i not in loaded.eos_token_ids]
