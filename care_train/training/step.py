"""One step of training: rollouts in, an updated policy and metrics out. Reads like Algorithm 1."""

from dataclasses import dataclass, replace
from functools import partial

from care_train.algorithm import baselines
from care_train.algorithm.fixability import outcomes_of
from care_train.config import Config
from care_train.distributed import all_max, all_sum, gather
from care_train.reporting.archive import ArchiveWriter
from care_train.training.archiving import archive_step
from care_train.training.engine import PolicyEngine
from care_train.training.groups import (
    Group,
    RolloutScorer,
    choose_subgroup,
    fixability_of,
    group_updates,
)
from care_train.training.log_probs import LogProbs, Reference, TrainItem
from care_train.training.metrics import engine_gap, step_metrics
from care_train.training.sampler import Draw, Sampler
from care_train.training.timer import StepSeconds, timer
from care_train.training.update import PolicyUpdater

_MAX_RESAMPLE_ROUNDS = 3
"""Of dynamic sampling, before the batch is trained as it is."""


@dataclass(frozen=True)
class StepOutcome:
    """What a step leaves for people: metrics over all ranks, and this rank's groups."""

    metrics: dict[str, float]
    groups: list[Group]
    dropped: list[Group]
    """Sampled by dynamic sampling beside the batch."""


class TrainStep:
    """Holds what a step needs; `run` is the step."""

    def __init__(
        self,
        config: Config,
        engine: PolicyEngine,
        sampler: Sampler,
        scorer: RolloutScorer,
        reference: Reference | None,
        archive: ArchiveWriter | None = None,
    ) -> None:
        self._config = config
        self._archive = archive
        self._engine = engine
        self._sampler = sampler
        self._scorer = scorer
        self._log_probs = LogProbs(engine, config, reference)
        self._updater = PolicyUpdater(engine, config, reference)
        self._checked_start = 0
        self.fixability = fixability_of(config)
        """What `care.selector: learned` has learnt; None under another selector."""

    def run(self, draw: Draw, step: int) -> StepOutcome:
        """Algorithm 1 on this rank's prompts, each line of it for all groups at once.

        Args:
            draw: deals this rank's next prompts; called again under dynamic sampling.
            step: counts from 0; part of every rollout's seed.
        """
        seconds = StepSeconds()
        sync = self._sampler.sync(self._engine)  # pi_old = pi
        groups, dropped = self._sample(draw, step)  # lines 1-2, Eq. 1
        if self._config.algorithm == "care":
            with timer("old_forward"):  # log pi_old, rationale embeddings
                groups = self._log_probs.of_groups(groups)
            with timer("select"):  # lines 3-10 and 21-25, Eqs. 2-4 and 14
                choose = partial(choose_subgroup, config=self._config, step=step)
                groups = [
                    replace(g, subgroup=choose(g, draw=g.sample.draw, fixability=self.fixability))
                    for g in groups
                ]
            with timer("reflect"):  # lines 11-13
                groups = self._sampler.reflect(groups, step)
            with timer("score"):  # line 14
                groups = self._scorer.verify_reflections(groups)
            if self.fixability is not None:
                self.fixability.learn([o for own in gather(outcomes_of(groups)) for o in own])
        self._sampler.rest()
        with timer("select"):  # lines 15-19 and 26-41, Eqs. 5-8 and 11
            total = partial(all_sum, device=self._engine.device)
            updates = group_updates(groups, self._config, total)
            groups = [replace(g, update=u) for g, u in zip(groups, updates, strict=True)]
        items = self._log_probs.items(groups)  # log pi_old and log pi_ref where they are missing
        gap = self._checked_gap(groups, items)
        learning_rate = self._engine.learning_rate  # the first update's, which sets the next one's
        results = self._updater.update(groups, items)  # lines 42-43, Eqs. 12-13
        if self._archive is not None:
            with timer("archive"):
                archive_step(self._archive, step + 1, groups, dropped, items)

        values = step_metrics(groups, dropped, items, results, self._engine.device)
        values |= seconds.values() | sync | gap
        values["learning_rate"] = learning_rate
        values["tokens_per_second"] = values["decoded_tokens"] / max(values["seconds"], 1e-9)
        return StepOutcome(values, groups, dropped)

    def _sample(self, draw: Draw, step: int) -> tuple[list[Group], list[Group]]:
        """Lines 1-2: one batch of groups with verified rollouts.

        Under dynamic sampling it is one of groups with mixed outcomes, as far as there are enough;
        the second list has those that were sampled but are not of the batch.
        """
        groups = self._sample_once(draw, step)
        if not self._config.train.dynamic_sampling:
            return groups, []
        size = len(groups)
        for _ in range(_MAX_RESAMPLE_ROUNDS):
            # All ranks draw as long as one needs to, so that they stay at the same position.
            mixed = sum(baselines.has_mixed_outcomes(group.rollouts) for group in groups)
            if not all_max(mixed < size, self._engine.device):
                break
            groups += self._sample_once(draw, step)
        # A stable sort: the mixed ones first, each kind in the order of sampling.
        groups.sort(key=lambda group: not baselines.has_mixed_outcomes(group.rollouts))
        return groups[:size], groups[size:]

    def _sample_once(self, draw: Draw, step: int) -> list[Group]:
        with timer("generate"):
            groups = self._sampler.sample(draw, step)
        with timer("score"):
            return self._scorer.verify(groups)

    def _checked_gap(self, groups: list[Group], items: list[TrainItem]) -> dict[str, float]:
        """The trainer's gap to the rollout engine, held to its limit once for every start and
        wake-up of the engine, before the policy is updated."""
        start = self._sampler.num_starts
        is_checked = start == self._checked_start
        limit = None if is_checked else self._config.rollout.max_log_prob_gap
        values = engine_gap(groups, items, self._engine.device, limit)
        if values:
            self._checked_start = start
        return values
