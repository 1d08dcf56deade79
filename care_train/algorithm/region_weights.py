"""Token credit: region weights and Eq. 11 (Sec. 3.5; Algorithm 1, lines 40-41)."""

import torch

from care_train.algorithm.settings import CareSettings
from care_train.algorithm.types import Rollout


def region_weights(
    rollout: Rollout, settings: CareSettings, *, is_negative: bool, earns_rationale: bool
) -> torch.Tensor:
    """w_{i,t}: [T] fp32 over the response's sampled tokens.

    Answer tokens weigh 1; rationale tokens gamma+ in a positive and 0 in a negative. Tags weigh
    like their region and EOS like the answer unless `tag_weight` is set. All else weighs 0.

    Args:
        rollout: the response.
        settings: think_weight, tag_weight, malformed, malformed_when.
        is_negative: whether it is a negative of its subgroup.
        earns_rationale: whether its rationale tokens weigh gamma+: acc = 1 (line 40), so neither a
            negative nor a pseudo-anchor.
    """
    num_tokens = len(rollout.token_ids)
    spans = rollout.spans
    broken = settings.malformed_when == "bad_format" and rollout.format_score < 1
    if not spans.well_formed or (broken and is_negative):
        return torch.full((num_tokens,), _malformed_weight(is_negative, settings))
    weights = torch.zeros(num_tokens)
    tag = settings.tag_weight
    think_weight = settings.think_weight if earns_rationale else 0.0
    if spans.think is not None:
        weights[slice(*spans.think)] = think_weight if tag is None else tag
    if spans.think_content is not None:
        weights[slice(*spans.think_content)] = think_weight
    assert spans.answer is not None
    weights[slice(*spans.answer)] = 1.0 if tag is None else tag
    if spans.answer_content is not None:
        weights[slice(*spans.answer_content)] = 1.0
    if rollout.finished:
        weights[-1] = 1.0 if tag is None else tag
    return weights


def normalize_weights(weights: torch.Tensor, weight_eps: float) -> torch.Tensor:
    """The second factor of Eq. 11: w_t / (sum_u w_u + eps_w), [T]."""
    return weights / (weights.sum() + weight_eps)


def token_advantages(advantage: float, normalized_weights: torch.Tensor) -> torch.Tensor:
    """Eq. 11: a_{i,t} = A[y_i] w_{i,t} / (sum_u w_{i,u} + eps_w), [T]."""
    return advantage * normalized_weights


def _malformed_weight(is_negative: bool, settings: CareSettings) -> float:
    if settings.malformed == "uniform":
        return 1.0
    return 1.0 if settings.malformed == "penalize" and is_negative else 0.0
