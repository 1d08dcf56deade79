"""Updates that are not finite: which number was the first, and how many may be left out."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from care_train.distributed import gather, is_main
from care_train.models.policy import first_broken_weight
from care_train.training.failures import CHANGES, NotFiniteError

logger = logging.getLogger(__name__)

_INPUTS = (
    *("advantages", "old_log_probs", "ref_log_probs", "importance_weights"),
    *("kl_weights", "entropy_weights"),
)
_OUTPUTS = ("log_probs", "ratio", "entropy", "kl")


class LeftOut:
    """Counts the updates that were not made."""

    def __init__(self, allowed: int) -> None:
        """None yet.

        Args:
            allowed: how many may be left out, before one ends the run.
        """
        self._allowed = allowed
        self._count = 0

    def add(self, cause: str | None, loss: float, grad_norm: float) -> None:
        """One more, on all ranks.

        Args:
            cause: what this rank found, if anything.
            loss: this rank's.
            grad_norm: of all ranks.

        Raises:
            NotFiniteError: too many; the message is the same on all ranks.
        """
        found = gather((cause, loss))
        rank = next((rank for rank, (first, _) in enumerate(found) if first is not None), 0)
        first, loss = found[rank]
        where = "in the gradient" if first is None else f"first: {first}, on rank {rank}"
        text = f"loss {loss}, gradient norm {grad_norm}: not finite, so no update was made"
        self._count += 1
        if self._count > self._allowed:
            raise NotFiniteError(
                f"{text} ({where}); let train.max_skipped_updates (now {self._allowed}) leave such "
                f"updates out, or lower train.learning_rate: {CHANGES}"
            )
        if is_main():
            logger.warning(
                "warning: %s (%s); %d of %d allowed", text, where, self._count, self._allowed
            )


def cause_of(
    model: torch.nn.Module,
    arguments: Mapping[str, Any],
    output: Any,
    sequence_ids: torch.Tensor,
    labels: Sequence[str],
) -> str:
    """What made a micro-batch's loss one that is not finite; arguments as below."""
    broken = first_broken_weight(model)
    if broken is not None:
        return f"the weight {broken} is not finite already"
    return first_not_finite(arguments, output, sequence_ids, labels) or "the loss"


def first_not_finite(
    arguments: Mapping[str, Any], output: Any, sequence_ids: torch.Tensor, labels: Sequence[str]
) -> str | None:
    """The first row quantity that is not finite, in the order they are computed, and whose it is.

    Args:
        arguments: the loss's, of which [N] tensors count.
        output: its `PolicyLoss`.
        sequence_ids: [N] which sequence each row belongs to.
        labels: a name for each sequence; may be empty.
    """
    found = [(name, arguments.get(name)) for name in _INPUTS]
    found += [(name, getattr(output, name)) for name in _OUTPUTS]
    for name, values in found:
        if values is None or bool(values.isfinite().all()):
            continue
        row = int((~values.isfinite()).nonzero()[0])
        sequence = int(sequence_ids[row])
        start = int((sequence_ids == sequence).nonzero()[0])
        label = labels[sequence] if labels else f"sequence {sequence} of the micro-batch"
        return f"{name} is {float(values[row])} at response token {row - start} of {label}"
    return None
