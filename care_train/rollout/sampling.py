"""Per-request seeded sampling as a logits processor for transformers' greedy decoding."""

from collections.abc import Sequence
from typing import Any

import torch
from transformers import LogitsProcessor, TopKLogitsWarper, TopPLogitsWarper

from care_train.rollout.errors import NotFiniteLogitsError
from care_train.rollout.types import SamplingSettings


class SeededSampler(LogitsProcessor):
    """Leaves one finite score per row: the token drawn with that row's own random numbers.

    `generate` then takes the argmax. Drawing by inverse CDF needs one uniform number per token, so
    a response depends on its seed and its logits, not on what it is batched with.
    """

    def __init__(
        self,
        seeds: Sequence[int],
        sampling: SamplingSettings,
        banned_ids: Sequence[int],
        prompt_width: int,
        device: torch.device,
    ) -> None:
        self._greedy = sampling.greedy
        self._temperature = sampling.temperature
        self._prompt_width = prompt_width
        self._banned = torch.tensor(list(banned_ids), dtype=torch.int64, device=device)
        self._filters: list[Any] = []
        if sampling.top_k:
            self._filters.append(TopKLogitsWarper(sampling.top_k))
        if sampling.top_p < 1:
            self._filters.append(TopPLogitsWarper(sampling.top_p))
        if not self._greedy:
            self._uniforms = _uniforms(seeds, sampling.max_new_tokens).to(device)

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        """[rows, V] scores: -inf but for the drawn token; untouched but for bans where greedy.

        Raises:
            NotFiniteLogitsError: a row has a NaN or +inf, or nothing but -inf.
        """
        place = input_ids.shape[1] - self._prompt_width
        if not bool(scores.amax(-1).isfinite().all()):
            raise NotFiniteLogitsError(f"the logits of response token {place} are not finite")
        scores = scores.float().index_fill(1, self._banned, -torch.inf)
        if self._greedy:
            return scores
        scores = scores / self._temperature
        for warp in self._filters:
            scores = warp(input_ids, scores)
        cumulative = scores.double().softmax(-1).cumsum(-1)
        uniform = self._uniforms[:, place, None]
        # Scaled by the total, which rounding keeps from being exactly 1: u < 1 cannot run past it.
        token = torch.searchsorted(cumulative, uniform * cumulative[:, -1:], right=True)
        return torch.full_like(scores, -torch.inf).scatter_(1, token, 0.0)


def _uniforms(seeds: Sequence[int], count: int) -> torch.Tensor:
    """[rows, count] fp64 in [0, 1), each row from its own seed."""
    rows = []
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        rows.append(torch.rand(count, dtype=torch.float64, generator=generator))
    return torch.stack(rows)
