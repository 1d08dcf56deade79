"""Weights that are not finite."""

import torch


def first_broken_weight(model: torch.nn.Module) -> str | None:
    """The name of the first parameter that holds a NaN or an infinity, under ZeRO-3 in this rank's
    shard of it."""
    for name, parameter in model.named_parameters():
        own = getattr(parameter, "ds_tensor", parameter)
        if own.numel() and not bool(own.isfinite().all()):
            return name
    return None
