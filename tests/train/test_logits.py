"""Families that scale or cap their logits are trained on the logits they sample from."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    GraniteConfig,
    Qwen2Config,
)

from care_train.models.batch import TokenSequence, collate
from care_train.models.policy import Policy
from care_train.models.prompts import EncodedPrompt

SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
}


@pytest.mark.parametrize(
    "config",
    [
        GraniteConfig(logits_scaling=0.125, **SIZES),
        CohereConfig(logit_scale=4.0, **SIZES),
        Gemma2Config(final_logit_softcapping=0.5, initializer_range=0.3, **SIZES),
    ],
    ids=["granite", "cohere", "gemma2"],
)
def test_log_probs_are_those_of_the_models_own_logits(config):
    """Granite divides by logits_scaling, Cohere multiplies by logit_scale, Gemma caps."""
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
    model = AutoModelForCausalLM.from_config(
        Qwen2Config(**{k: v for k, v in SIZES.items() if k != "head_dim"})
    )
    wrapped = SimpleNamespace(base_layer=model.lm_head)
    monkeypatch.setattr(model, "get_output_embeddings", lambda: wrapped)
    with pytest.raises(ValueError, match="Qwen2ForCausalLM with an adapter on its output head"):
        Policy(model)
