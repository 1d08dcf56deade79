"""A real `care-train serve` beside the trainer: tokens, log-probs, weights, errors."""

import pytest

from care_train.rollout.transformers_engine import TransformersEngine
from care_train.rollout.types import SamplingSettings
from tests.rollout.test_vllm_engine import GREEDY, largest_gap, tokens


def test_greedy_outputs_equal_transformers_after_every_sync(served):
    """Images and text, before and after three changes of all weights; log-probs agree too."""
    model = served()
    transformers = TransformersEngine(model.loaded, 64)
    requests, seen = model.requests(), set()
    for seed in range(4):
        completions = model.engine.generate(requests, GREEDY)
        assert tokens(completions) == tokens(transformers.generate(requests, GREEDY))
        assert largest_gap(model, requests, completions) < 1e-3
        seen.add(tuple(tokens(completions)))
        model.change_weights(seed)
        model.sync()
    assert len(seen) == 4, "the changes of weights were too small to see"
