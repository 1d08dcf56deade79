"""Weights that correct for an engine that samples from a slightly other policy.

Truncated per token: https://fengyao.notion.site/off-policy-rl. IcePop's band: arXiv:2510.18855.
Products and geometric means over a response: verl's rollout correction.
"""

from collections.abc import Sequence

import torch

from care_train.config import LossSettings


def importance_weights(
    trainer: torch.Tensor, engine: Sequence[float], loss: LossSettings
) -> torch.Tensor:
    """[T] pi_trainer / pi_engine: each token's, or the sequence's product or geometric mean.

    Beyond the floor and the cap it is cut to them, or 0.

    An engine computes the policy with other kernels, batches and caches, or from weights that are
    one update old.

    Args:
        trainer: [T] log-probs by the trainer, before the update.
        engine: T log-probs by the engine that sampled.
        loss: the settings that begin with `importance`.
    """
    log_ratio = trainer.float().cpu() - torch.tensor(engine)
    if loss.importance_sampling == "sequence":
        log_ratio = log_ratio.sum().expand_as(log_ratio)
    elif loss.importance_sampling == "geometric":
        log_ratio = log_ratio.mean().expand_as(log_ratio)
    weights = log_ratio.exp()
    bounded = weights.clamp(loss.importance_floor, loss.importance_cap)
    if loss.importance_beyond == "truncate":
        return bounded
    return weights.where(weights == bounded, 0.0)
