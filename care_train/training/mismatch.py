"""Trainer against rollout engine: how far their log-probs are apart, and what corrects for it.

An engine computes the policy with other kernels, other batches and other caches, and may have other
weights without anyone's intent. Engines that return log-probs (vLLM) are measured on every batch.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from care_train.algorithm.types import Rollout
from care_train.config import LossSettings
from care_train.distributed import all_sum, gather
from care_train.training.failures import EngineError
from care_train.training.sampling import SampledGroup


@dataclass(frozen=True)
class WorstToken:
    """Where trainer and engine differ most."""

    gap: float
    location: str
    place: int
    token_id: int
    trainer: float
    engine: float

    def __str__(self) -> str:
        return (
            f"{self.location}: response token {self.place} (id {self.token_id}): log-prob "
            f"{self.trainer:.4f} in the trainer, {self.engine:.4f} in the engine"
        )


class Mismatch:
    """The trainer's log-probs of one batch on this rank, and their gaps to the engine's."""

    def __init__(self) -> None:
        self._log_probs: dict[int, torch.Tensor] = {}
        self._log_normalizers: dict[int, torch.Tensor] = {}
        self._sums = [0.0, 0.0, 0.0]
        self._worst = WorstToken(-1.0, "", 0, 0, 0.0, 0.0)

    def add(
        self,
        group: SampledGroup,
        rollout: Rollout,
        log_probs: torch.Tensor,
        log_normalizer: torch.Tensor | None = None,
    ) -> None:
        """Keep a rollout's log-probs, and count the gap where its engine gave some, once.

        Args:
            group: the rollout's.
            rollout: a response of the batch.
            log_probs: [T] the trainer's, at the sampling temperature, in the sampled context.
            log_normalizer: [T] log sum exp of the same logits.
        """
        if id(rollout) in self._log_probs:
            return
        trainer = log_probs.detach().float().cpu()
        self._log_probs[id(rollout)] = trainer
        if log_normalizer is not None:
            self._log_normalizers[id(rollout)] = log_normalizer.detach().float().cpu()
        if rollout.log_probs is None:
            return
        engine = torch.tensor(rollout.log_probs)
        difference = trainer - engine
        gaps = difference.abs()
        for place, values in enumerate((gaps, difference.exp() - 1 - difference)):
            self._sums[place] += float(values.sum())
        self._sums[2] += len(gaps)
        worst = int(gaps.argmax())
        if not float(gaps[worst]) <= self._worst.gap:
            self._worst = WorstToken(
                float(gaps[worst]),
                group.sample.location or group.sample.id,
                worst,
                rollout.token_ids[worst],
                float(trainer[worst]),
                float(engine[worst]),
            )

    def trainer_log_probs(self, rollout: Rollout) -> torch.Tensor | None:
        """[T] fp32 on the CPU: what `add` got for a rollout; None where it got nothing."""
        return self._log_probs.get(id(rollout))

    def log_normalizer(self, rollout: Rollout) -> torch.Tensor | None:
        """[T] fp32 on the CPU: what `add` got beside the log-probs, if anything."""
        return self._log_normalizers.get(id(rollout))

    def reduce(self, device: torch.device) -> tuple[dict[str, float], WorstToken | None]:
        """Over all ranks: `gap_mean` and `gap_max` of |trainer - engine| in nats per token, and
        `gap_k3`, the k3 estimate of KL[engine || trainer]; nothing where nothing was measured."""
        gaps, k3, count = all_sum(self._sums, device)
        if not count:
            return {}, None
        worst = max(gather(self._worst), key=lambda token: token.gap)
        means = {"gap_mean": gaps / count, "gap_k3": k3 / count}
        return means | {"gap_max": worst.gap}, worst


def check_parity(values: dict[str, float], worst: WorstToken | None, limit: float | None) -> None:
    """Stop a run whose engine samples from another policy than the trainer's.

    Raises:
        EngineError: the mean gap is over `rollout.max_log_prob_gap`, or not finite.
    """
    if worst is None or limit is None or values["gap_mean"] <= limit:
        return
    raise EngineError(
        f"rollout.max_log_prob_gap: trainer and engine are {values['gap_mean']:.4g} nats per token "
        f"apart, wanted at most {limit:g}: they do not compute the same policy. Worst: {worst}"
    )


def importance_weights(
    trainer: torch.Tensor, engine: Sequence[float], loss: LossSettings
) -> torch.Tensor:
    """[T] pi_trainer / pi_engine, per token or the sequence's product, held below the cap.

    Args:
        trainer: [T] log-probs by the trainer, before the update.
        engine: T log-probs by the engine that sampled.
        loss: `importance_sampling`, `importance_cap`, `importance_over_cap`.
    """
    log_ratio = trainer.float().cpu() - torch.tensor(engine)
    if loss.importance_sampling == "sequence":
        log_ratio = log_ratio.sum().expand_as(log_ratio)
    ratio = log_ratio.exp()
    if loss.importance_over_cap == "mask":
        return ratio.where(ratio <= loss.importance_cap, 0.0)
    return ratio.clamp(max=loss.importance_cap)
