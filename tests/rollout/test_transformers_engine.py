"""The transformers engine: seeds, banned tokens, left padding, images kept."""

from dataclasses import replace

import pytest
import torch

from care_train.rollout.engine import Request, SamplingSettings, request_seed
from care_train.rollout.transformers_engine import SeededSampler, TransformersEngine
from tests.rollout.conftest import GREEDY, KINDS, trainer_log_probs
from tests.train.builders import encoder_of, image_sample, load, text_sample


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
def test_greedy_takes_the_argmax_of_the_training_forward(kind, embedded):
    """Left-padded generation with images sees what the right-padded training forward sees; half of
    the requests have a forced prefix, which continues the prompt."""
    model = embedded(kind)
    requests = [*model.requests(), *(replace(r, prefix_ids=(20, 21, 22)) for r in model.requests())]
    for request, completion in zip(requests, model.engine.generate(requests, GREEDY), strict=True):
        log_probs = trainer_log_probs(model.loaded, request, completion)
        assert log_probs.argmax(-1).tolist() == list(completion.token_ids)


def test_the_models_own_generation_config_does_not_bend_sampling(embedded):
    """Published models ship repetition penalties and top-k; rollouts must not inherit them."""
    model, sampling = embedded(), SamplingSettings(12)
    plain = model.engine.generate(model.requests(), sampling)
    config = model.loaded.model.generation_config
    config.repetition_penalty, config.top_k, config.temperature = 5.0, 1, 0.01
    config.no_repeat_ngram_size, config.do_sample = 1, True
    assert model.engine.generate(model.requests(), sampling) == plain


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
