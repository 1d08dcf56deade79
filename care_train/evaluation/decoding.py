"""How evaluation decodes: the sampling settings, the seeds' step, batches on every rank."""

from collections.abc import Sequence
from typing import TypeVar

import torch

from care_train.config import Config
from care_train.distributed import all_max
from care_train.rollout.engine import SamplingSettings

EVAL_STEP = -1
"""The step in evaluation seeds: one that training never has."""

T = TypeVar("T")


def decoding(config: Config, greedy: bool | None = None) -> SamplingSettings:
    """As rollouts are decoded (Sec. 8.2), or greedily; None: as `eval.decode` says."""
    rollout = config.rollout
    greedy = config.eval.decode == "greedy" if greedy is None else greedy
    return SamplingSettings(
        rollout.max_new_tokens, rollout.temperature, rollout.top_p, rollout.top_k, greedy
    )


def equal_batches(own: Sequence[T], size: int, device: torch.device) -> list[Sequence[T]]:
    """This rank's items in batches, and empty ones up to as many as any rank has.

    Ranks that share a vLLM by tensor parallelism generate together: one that had a batch fewer
    would leave the others waiting for ever.
    """
    batches: list[Sequence[T]] = [own[start : start + size] for start in range(0, len(own), size)]
    return batches + [()] * (all_max(len(batches), device) - len(batches))
