"""Reinforcement learning: prompts in order, steps, and the evaluations and checkpoints between."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from care_train.config import Config
from care_train.data import PromptOrder, Sample, load_images
from care_train.distributed import is_main, own_share, world_size
from care_train.reporting import MetricsLogger, show_group
from care_train.reporting.archive import ArchiveWriter
from care_train.rollout.engine import RolloutEngine
from care_train.training.archiving import append_events, case_study
from care_train.training.checkpoint import Checkpoints
from care_train.training.empty_steps import EmptySteps
from care_train.training.engine import PolicyEngine
from care_train.training.guard import StopSignals
from care_train.training.log_probs import FrozenCopy, Reference, WithoutAdapters
from care_train.training.loop import StepLoop, is_due
from care_train.training.metrics import function_metrics
from care_train.training.optimizer import OptimizerSettings
from care_train.training.sampler import Sampler
from care_train.training.session import Session
from care_train.training.step import StepOutcome, TrainStep
from care_train.verifier import TrainerState

logger = logging.getLogger(__name__)

Evaluate = Callable[[RolloutEngine, int], dict[str, float]]
"""Takes the rollout engine and how many steps the policy was trained."""


def check_ranks(config: Config) -> None:
    """Prompts divide over the ranks.

    Raises:
        ValueError: they do not.
    """
    count, parts = config.train.prompts_per_step, config.train.mini_batches
    if count % (parts * world_size()):
        raise ValueError(
            f"train.prompts_per_step: got {count}, wanted a multiple of train.mini_batches x "
            f"ranks = {parts} x {world_size()}"
        )


class PromptSource:
    """Deals each rank its share of the next prompts; `position` is all a resume needs."""

    def __init__(self, samples: Sequence[Sample], config: Config) -> None:
        self._samples = samples
        self._order = PromptOrder(len(samples), config.seed)
        self.count = config.train.prompts_per_step
        self.position = 0

    def draw(self) -> list[Sample]:
        """The next `prompts_per_step` prompts, this rank's share of them."""
        first, self.position = self.position, self.position + self.count
        indices = self._order.take(first, self.count)
        own = own_share(list(enumerate(indices, start=first)))
        size = len(self._samples)
        return [replace(self._samples[i], visit=place // size) for place, i in own]


class RlLoop(StepLoop):
    """Algorithm 1's steps, with evaluations and what a checkpoint needs of them."""

    phase = "train"
    data_key = "data.path"

    def __init__(
        self,
        session: Session,
        samples: Sequence[Sample],
        run_dir: Path,
        metrics: MetricsLogger,
        device: torch.device,
        evaluate: Evaluate | None,
        archive: ArchiveWriter | None,
    ) -> None:
        """Ready to train on `samples`.

        `evaluate` is called every `train.eval_every` steps on all ranks.
        """
        session.scorer.verifier.check_columns(samples)
        config = session.config
        self.title = config.algorithm
        super().__init__(session, samples, run_dir, metrics, device)
        self.num_steps = config.train.steps
        self.checkpoints = open_checkpoints(config, run_dir)
        self._evaluate, self._archive = evaluate, archive
        self.engine, self._rollout, reference = open_policy(session, device)
        self._sampler = Sampler(self._rollout, session.encoder, config)
        self._source = PromptSource(samples, config)
        self._empty_steps = EmptySteps(config, len(samples), device)
        self._train_step = TrainStep(
            config, self.engine, self._sampler, session.scorer, reference, archive
        )
        counted = ("steps", "decoded_tokens", "trained_sequences", "sampled_sequences")
        self.totals = dict.fromkeys(counted, 0.0)

    def restore(self, state: Mapping[str, Any], own: Mapping[str, Any]) -> None:
        self.totals, self._source.position = state["totals"], state["position"]
        self.owes_evaluation = state["owes_evaluation"]
        self._sampler.restore(own["ahead"], self._source.draw)
        self._empty_steps.restore(state["empty_steps"])
        if self._train_step.fixability is not None:
            self._train_step.fixability.learn(state["fixability"])
        self._end_where_finished(self.first_step)

    def step(self, step: int) -> dict[str, float]:
        verifier, done = self.session.scorer.verifier, step + 1
        verifier.state = TrainerState(done, self.num_steps)
        verifier.take_metrics()  # of an evaluation before
        outcome = self._train_step.run(self._source.draw, step)
        self._empty_steps.add(outcome.groups, outcome.dropped, done)
        values = outcome.metrics
        if self.config.reward.functions:
            values = values | function_metrics(verifier.take_metrics())
        self.totals = {key: self.totals[key] + values.get(key, 0.0) for key in self.totals}
        self.totals["steps"] = float(done)
        every = self.config.train.eval_every
        self.owes_evaluation = self._evaluate is not None and is_due(done, every, self.num_steps)
        if is_main():
            self._show_group(outcome, done)
        if self.config.preset == "official" and self.config.algorithm == "care":
            append_events(self.run_dir, outcome.groups, self.config.care, done)
        return values

    def after_step(self, done: int, signals: StopSignals) -> None:
        scores = None
        stop = signals.requested(self.device)
        if self.owes_evaluation and not stop:
            scores = self._run_evaluation(done)
            stop = signals.requested(self.device)
        self._end_where_finished(done)
        is_last = done == self.num_steps
        is_best = scores is not None and self.checkpoints.is_best(scores)
        must_save = is_last or is_best or stop
        failure, has_trained = None, self._empty_steps.steps < done
        # A run that ends anyway and has trained before ends well.
        if self._empty_steps.ending == "failed" and not (is_last and has_trained):
            failure = self._empty_steps.error()
            must_save = must_save or has_trained
        if must_save or is_due(done, self.config.train.save_every, self.num_steps):
            if self._archive is not None:
                self._archive.flush()
            own = {"ahead": self._sampler.state()}
            self.save(done, self._state(), stop, scores, own)
        if failure:
            raise failure

    def _end_where_finished(self, done: int) -> None:
        """The last step is `done` where there is nothing left to learn."""
        if self._empty_steps.ending == "finished" and done < self.num_steps:
            self.num_steps = done
            if is_main():
                logger.warning("step %d: %s", done, self._empty_steps.finish_text())

    def _run_evaluation(self, done: int) -> dict[str, float]:
        assert self._evaluate is not None
        self._sampler.sync(self.engine)
        scores = self._evaluate(self._rollout, done)
        self._sampler.rest()
        self.metrics.log(done, scores, phase="eval")
        self.owes_evaluation = False
        return scores

    def _state(self) -> dict[str, Any]:
        # Before the prompts whose rollouts wait for the next step: a resume draws them again.
        position = self._source.position - self._source.count * self._sampler.has_next
        fixability = self._train_step.fixability
        return {
            "position": position,
            "totals": self.totals,
            "owes_evaluation": self.owes_evaluation,
            "empty_steps": self._empty_steps.state(),
            "fixability": [] if fixability is None else fixability.outcomes,
        }

    def _show_group(self, outcome: StepOutcome, done: int) -> None:
        """Now and then, show a group on the terminal and in the trackers."""
        every = self.config.logging.samples_every
        if not every or done % every:
            return
        group, title, records = case_study(outcome.groups, done, self.session.scorer.text)
        self.metrics.samples(records, lambda: load_images(group.sample))
        show_group(self.progress, title, records)


def open_checkpoints(config: Config, run_dir: Path) -> Checkpoints:
    """The run's checkpoints, under its settings.

    Raises:
        ValueError: the best one is to be kept by a number that evaluations do not have.
    """
    train = config.train
    if train.keep_best in ("greedy_accuracy", "greedy_format") and "greedy" not in config.eval.also:
        raise ValueError(f"train.keep_best: got {train.keep_best!r}, wanted greedy in eval.also")
    return Checkpoints(run_dir / "checkpoints", train.keep_checkpoints, train.keep_best)


def open_policy(
    session: Session, device: torch.device
) -> tuple[PolicyEngine, RolloutEngine, Reference | None]:
    """What trains the session's model, what samples from it, and pi_ref, None if nothing reads it.

    With LoRA the reference is the policy without its adapters; otherwise a copy made before.
    """
    config, reference = session.config, None
    train, has_lora = config.train, config.model.adapters is not None
    updates = train.steps * train.num_iterations * train.mini_batches
    if config.loss.kl_coef and not has_lora:
        reference = FrozenCopy(session.loaded.model)
    optimizer = OptimizerSettings(
        train.learning_rate,
        updates,
        train.warmup_steps,
        train.schedule,
        train.weight_decay,
        train.max_grad_norm,
        train.max_skipped_updates,
    )
    engine = PolicyEngine(
        session.loaded,
        optimizer,
        config,
        device,
        copy_for_rollouts=config.rollout.engine == "transformers",
    )
    if config.loss.kl_coef and has_lora:
        reference = WithoutAdapters(engine)
    return engine, session.new_engine(engine.rollout_copy), reference
