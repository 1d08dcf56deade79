"""pi_ref, the policy before training: what the KL of Eq. 13 pulls towards."""

import copy
from typing import Any, Protocol

import torch

from care_train.models.batch import ModelBatch
from care_train.models.policy import Policy
from care_train.training.engine import PolicyEngine


class Reference(Protocol):
    """Forwards of the reference; every rank runs the same number of them."""

    def log_probs(
        self, batch: ModelBatch, temperature: float, pool_spans: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Log-probs [N] of the batch's rows."""
        ...

    def exact_kl_arguments(self, batch: ModelBatch) -> dict[str, Any]:
        """What the fused loss needs for a KL over the whole vocabulary."""
        ...


class FrozenCopy:
    """A copy of the policy, made before it is trained."""

    def __init__(self, model: Any) -> None:
        """Copy a model of transformers."""
        self._policy = Policy(copy.deepcopy(model).eval().requires_grad_(False))

    @torch.no_grad()
    def log_probs(
        self, batch: ModelBatch, temperature: float, pool_spans: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        return self._policy(batch, temperature, pool_spans=pool_spans)

    @torch.no_grad()
    def exact_kl_arguments(self, batch: ModelBatch) -> dict[str, Any]:
        hidden, _ = self._policy(batch, rows_only=True)
        return {"ref_hidden": hidden, "ref_head_weight": self._policy.head.weight}


class WithoutAdapters:
    """The policy itself, its adapters set aside: no second model."""

    def __init__(self, engine: PolicyEngine) -> None:
        self._engine = engine

    def log_probs(
        self, batch: ModelBatch, temperature: float, pool_spans: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        with self._engine.without_adapters():
            return self._engine.log_probs(batch, temperature, pool_spans)

    def exact_kl_arguments(self, batch: ModelBatch) -> dict[str, Any]:
        with self._engine.without_adapters():
            hidden = self._engine.rows(batch)
        # The head is never adapted: the loss takes the policy's own.
        return {"ref_hidden": hidden}
