"""One step of training: rollouts in, an updated policy and metrics out. Reads like Algorithm 1."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from care_train.algorithm import baselines, care
from care_train.algorithm.types import GroupUpdate, Rollout, Subgroup
from care_train.config import Config
from care_train.data import Sample
from care_train.distributed import all_max
from care_train.rollout.engine import request_seed
from care_train.training.ahead import RolloutsAhead
from care_train.training.engine import PolicyEngine
from care_train.training.mismatch import Mismatch, check_parity
from care_train.training.reference import Reference
from care_train.training.sampling import GroupSampler, SampledGroup
from care_train.training.scoring import SequenceScorer
from care_train.training.statistics import StepStatistics
from care_train.training.timer import StepSeconds, timer
from care_train.training.update import PolicyUpdater


@dataclass(frozen=True)
class StepOutcome:
    """What a step leaves for people: metrics over all ranks, and this rank's groups."""

    metrics: dict[str, float]
    groups: list[SampledGroup]
    updates: list[GroupUpdate]


class TrainStep:
    """Holds what a step needs; `run` is the step."""

    def __init__(
        self,
        config: Config,
        engine: PolicyEngine,
        sampler: GroupSampler,
        reference: Reference | None,
        ahead: RolloutsAhead | None = None,
    ) -> None:
        self._config = config
        self._engine = engine
        self._sampler = sampler
        self._ahead = ahead
        self._scorer = SequenceScorer(engine, config)
        self._updater = PolicyUpdater(engine, config, self._scorer, reference)
        self._is_checked = config.rollout.engine == "transformers"

    def run(self, draw: Callable[[], Sequence[Sample]], step: int) -> StepOutcome:
        """Sample, score, select, reflect, weigh and update on this rank's prompts.

        Args:
            draw: deals this rank's next prompts; called again under dynamic sampling.
            step: counts from 0; part of every rollout's seed.
        """
        seconds = StepSeconds()
        if self._ahead is not None:
            self._sampler.wait()
        sync = self._sampler.sync(self._engine)
        groups, dropped = self._sample(draw, step)
        mismatch = Mismatch()
        reflected: list[Rollout | None] = [None] * len(groups)
        num_wanted = 0
        if self._config.algorithm == "care":
            with timer("old_forward"):
                scored = self._scorer.score_groups(groups, mismatch)
            with timer("select"):
                subgroups = [
                    care.select_subgroup(group, self._config.care, self._generator(sampled, step))
                    for sampled, group in zip(groups, scored, strict=True)
                ]
            num_wanted = sum(
                not isinstance(subgroup, str) and subgroup.reflect_on is not None
                for subgroup in subgroups
            )
            reflected = self._sampler.reflect(groups, subgroups, step)
            with timer("select"):
                updates = [
                    _care_update(subgroup, self._config, rollout)
                    for subgroup, rollout in zip(subgroups, reflected, strict=True)
                ]
        else:
            with timer("select"):
                updates = [self._baseline_update(group) for group in groups]
        self._sampler.rest()
        learning_rate = self._engine.learning_rate  # the first update's, which sets the next one's
        results = self._updater.update(groups, updates, mismatch, self._check_parity)
        gaps, _ = mismatch.reduce(self._engine.device)
        statistics = StepStatistics(groups, updates, reflected, num_wanted, results, dropped)
        values = statistics.reduce(self._engine.device)
        values |= seconds.values() | sync | gaps
        values["learning_rate"] = learning_rate
        values["tokens_per_second"] = values["decoded_tokens"] / max(values["seconds"], 1e-9)
        return StepOutcome(values, groups, updates)

    def _sample(
        self, draw: Callable[[], Sequence[Sample]], step: int
    ) -> tuple[list[SampledGroup], list[SampledGroup]]:
        """One batch of groups; under dynamic sampling, of groups with mixed outcomes, and those
        that were sampled but are not of the batch."""
        if self._ahead is not None:
            return self._ahead.take(step), []
        samples = draw()
        groups = self._sampler.sample_groups(samples, step)
        if not self._config.train.dynamic_sampling:
            return groups, []
        wanted = len(samples)
        for _ in range(self._config.train.max_resample_rounds):
            # All ranks draw as long as one needs to, so that they stay at the same position.
            mixed = sum(baselines.has_mixed_outcomes(group.rollouts) for group in groups)
            if not all_max(mixed < wanted, self._engine.device):
                break
            groups += self._sampler.sample_groups(draw(), step)
        # A stable sort: the mixed ones first, each kind in the order of sampling.
        groups.sort(key=lambda group: not baselines.has_mixed_outcomes(group.rollouts))
        return groups[:wanted], groups[wanted:]

    def _check_parity(self, mismatch: Mismatch) -> None:
        """The gate of this process's first measured step, before anything is updated."""
        if self._is_checked:
            return
        values, worst = mismatch.reduce(self._engine.device)
        check_parity(values, worst, self._config.rollout.max_log_prob_gap)
        self._is_checked = worst is not None

    def _baseline_update(self, group: SampledGroup) -> GroupUpdate:
        return baselines.group_update(
            group.rollouts,
            divide_by_std=self._config.algorithm != "dr_grpo",
            # A token mean or Dr. GRPO's constant divides by length itself.
            length_normalized=self._config.loss.aggregation == "sequence",
            keep_without_signal=self._config.loss.kl_coef > 0,
            norm_eps=self._config.care.norm_eps,
        )

    def _generator(self, group: SampledGroup, step: int) -> torch.Generator:
        # Beyond the rollouts' and the reflection's own indices.
        index = self._config.rollout.group_size + 1
        seed = request_seed(self._config.seed, step, group.sample.draw, index)
        return torch.Generator().manual_seed(seed)


def _care_update(
    subgroup: Subgroup | str, config: Config, reflected: Rollout | None
) -> GroupUpdate:
    if isinstance(subgroup, str):
        return care.skipped_update(subgroup)
    return care.subgroup_update(subgroup, config.care, reflected)
