"""The ban on special tokens inside vLLM's sampler: exact, and one masked write per step.

vLLM's own means fall short: `logit_bias` is bounded, so a determined model still gets through;
`bad_words` and `allowed_token_ids` are lists per request, as long as the vocabulary.
"""

from typing import Any

import torch
from vllm.v1.sample.logits_processor import LogitsProcessor

BANNED_KEY = "care_banned_token_ids"
"""Where in vLLM's `additional_config` the ids are."""


class BannedTokens(LogitsProcessor):
    """Sets the logits of banned ids to -inf for every request."""

    def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool) -> None:
        banned = torch.tensor(vllm_config.additional_config[BANNED_KEY], dtype=torch.int64)
        # vLLM cuts the head's padding off itself.
        banned = banned[banned < vllm_config.model_config.get_vocab_size()]
        self._banned = banned.to(device)

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        """[rows, V] logits, changed in place."""
        return logits.index_fill_(1, self._banned, -torch.inf)

    def is_argmax_invariant(self) -> bool:
        """False: the likeliest token may be banned."""
        return False

    def update_state(self, batch_update: Any) -> None:
        """The same for every request: nothing to keep."""
