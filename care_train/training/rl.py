"""The training loop: prompts in order, one step after the other, metrics, samples, checkpoints."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from care_train.algorithm.types import Rollout
from care_train.config import Config
from care_train.data import PromptOrder, Sample
from care_train.distributed import is_main, rank, world_size
from care_train.models.policy import Policy
from care_train.reporting import (
    MetricsLogger,
    SampleRecord,
    TrainProgress,
    append_sample,
    show_sample,
)
from care_train.rollout.engine import RolloutEngine
from care_train.training.ahead import RolloutsAhead
from care_train.training.checkpoint import Checkpoint, Checkpoints, save_model
from care_train.training.engine import PolicyEngine
from care_train.training.failures import Stopped
from care_train.training.guard import StopSignals
from care_train.training.optimizer import OptimizerSettings
from care_train.training.reference import FrozenCopy, Reference, WithoutAdapters
from care_train.training.resume import check_identity, identity, log_sizes
from care_train.training.sampling import GroupSampler, SampledGroup
from care_train.training.session import Session, rank_share
from care_train.training.step import StepOutcome, TrainStep
from care_train.training.timer import at_step

Evaluate = Callable[[RolloutEngine], dict[str, float]]


class PromptSource:
    """Deals each rank its share of the next prompts; `position` is all a resume needs."""

    def __init__(self, samples: Sequence[Sample], config: Config) -> None:
        count = config.train.prompts_per_step
        if count % (config.train.mini_batches * world_size()):
            raise ValueError(
                f"train.prompts_per_step: got {count}, wanted a multiple of train.mini_batches x "
                f"ranks = {config.train.mini_batches} x {world_size()}"
            )
        self._samples = samples
        self._order = PromptOrder(len(samples), config.seed)
        self.count = count
        self.position = 0

    def draw(self) -> list[Sample]:
        """The next `prompts_per_step` prompts, this rank's share of them."""
        first, self.position = self.position, self.position + self.count
        indices = self._order.take(first, self.count)
        own = rank_share(list(enumerate(indices, start=first)), rank(), world_size())
        size = len(self._samples)
        return [replace(self._samples[i], visit=place // size) for place, i in own]


def run_training(
    session: Session,
    samples: Sequence[Sample],
    run_dir: Path,
    metrics: MetricsLogger,
    device: torch.device,
    *,
    checkpoint: Checkpoint | None = None,
    evaluate: Evaluate | None = None,
    started: Callable[[], None],
) -> dict[str, float]:
    """Train, save `final/`, and return the totals of the run.

    Args:
        session: the model to train, with its encoder and verifier.
        samples: the training prompts.
        run_dir: where checkpoints, samples and the final model go.
        metrics: the run's log.
        device: this rank's device.
        checkpoint: where to go on from; its log lines must be cut already.
        evaluate: called every `train.eval_every` steps on all ranks, with the rollout engine.
        started: called before the first step.

    Raises:
        Stopped: a signal asked for it; a checkpoint is saved.
    """
    loop = _Loop(session, samples, run_dir, metrics, device, evaluate)
    if checkpoint is not None:
        loop.restore(checkpoint)
    started()
    loop.run()
    steps = session.config.train.steps
    with at_step(steps, steps, run_dir):
        save_model(loop.engine, run_dir / "final")
    return loop.totals


class _Loop:
    """The run's moving parts; what `state` returns and `engine` hold decides its future."""

    def __init__(
        self,
        session: Session,
        samples: Sequence[Sample],
        run_dir: Path,
        metrics: MetricsLogger,
        device: torch.device,
        evaluate: Evaluate | None,
    ) -> None:
        config = session.config
        self._config, self._run_dir, self._metrics = config, run_dir, metrics
        self._device, self._evaluate = device, evaluate
        self._identity = identity(config, samples, session.loaded.model)
        self.engine, self._rollout, reference = open_policy(session, device)
        self._sampler = GroupSampler(self._rollout, session.encoder, session.scorer, config)
        self._source = PromptSource(samples, config)
        self._ahead = RolloutsAhead(self._sampler, self._source.draw, config.train.steps)
        ahead = self._ahead if config.train.rollouts_ahead else None
        self._train_step = TrainStep(config, self.engine, self._sampler, reference, ahead)
        self._checkpoints = open_checkpoints(config, run_dir)
        self._owes_evaluation = False
        self.totals = {"steps": 0.0, "decoded_tokens": 0.0, "trained_sequences": 0.0}
        self.totals["sampled_sequences"] = 0.0

    def restore(self, checkpoint: Checkpoint) -> None:
        """Be where the run was when it saved `checkpoint`."""
        check_identity(checkpoint, self._identity, "data.path", self._config)
        state = checkpoint.state
        self.totals, self._source.position = state["totals"], state["position"]
        self._owes_evaluation = state["owes_evaluation"]
        own = checkpoint.restore(self.engine)
        if self._config.train.rollouts_ahead:
            self._ahead.restore(own.get("ahead", {}))

    def run(self) -> None:
        """The steps that are left, each with what is due after it."""
        config = self._config
        first, last = int(self.totals["steps"]), config.train.steps
        enabled = config.logging.progress and is_main()
        display = TrainProgress(last, enabled, config.algorithm, start_step=first)
        with StopSignals() as signals, display as progress:
            if self._owes_evaluation:
                with at_step(first, last, self._run_dir):
                    self._after_step(first, signals)
            for step in range(first, last):
                with at_step(step + 1, last, self._run_dir):
                    outcome = self._train_step.run(self._source.draw, step)
                    self._record(outcome, step + 1, progress)
                    self._owes_evaluation = self._is_evaluation_due(step + 1)
                    self._after_step(step + 1, signals)

    def _record(self, outcome: StepOutcome, done: int, progress: TrainProgress) -> None:
        values = outcome.metrics
        self.totals = {key: self.totals[key] + values.get(key, 0.0) for key in self.totals}
        self.totals["steps"] = float(done)
        self._metrics.log(done, values)
        progress.update(done, values)
        if is_main():
            _record_samples(outcome, done, self._run_dir, progress, self._config)

    def _after_step(self, done: int, signals: StopSignals) -> None:
        """Evaluate and save where that is due; stop where it was asked for."""
        train, scores = self._config.train, None
        stop = signals.requested(self._device)
        if self._owes_evaluation and not stop:
            scores = self._run_evaluation(done)
            stop = signals.requested(self._device)
        is_due = _is_due(done, train.save_every, train.steps) or done == train.steps
        is_best = scores is not None and self._checkpoints.is_best(scores)
        if is_due or is_best or stop:
            own = {"ahead": self._ahead.state()}
            saved = self._checkpoints.save(self.engine, self._state(done), scores, own)
            if stop:
                raise Stopped(stop, done, train.steps, self._run_dir, saved)

    def _is_evaluation_due(self, done: int) -> bool:
        train = self._config.train
        return self._evaluate is not None and _is_due(done, train.eval_every, train.steps)

    def _run_evaluation(self, done: int) -> dict[str, float]:
        assert self._evaluate is not None
        self._sampler.sync(self.engine)
        scores = self._evaluate(self._rollout)
        self._sampler.rest()
        self._metrics.log(done, scores, phase="eval")
        self._owes_evaluation = False
        return scores

    def _state(self, done: int) -> dict[str, Any]:
        return self._identity | {
            "step": done,
            # Before the prompts whose rollouts wait for the next step: a resume draws them again.
            "position": self._source.position - self._source.count * self._ahead.has_next,
            "totals": self.totals,
            "owes_evaluation": self._owes_evaluation,
            "logs": log_sizes(self._run_dir),
        }


def open_checkpoints(config: Config, run_dir: Path) -> Checkpoints:
    """The run's checkpoints, under its settings.

    Raises:
        ValueError: the best one is to be kept by a number that evaluations do not have.
    """
    train = config.train
    if train.keep_best in ("greedy_accuracy", "greedy_format") and not config.eval.greedy:
        raise ValueError(f"train.keep_best: got {train.keep_best!r}, which needs eval.greedy=true")
    return Checkpoints(run_dir / "checkpoints", train.keep_checkpoints, train.keep_best)


def _is_due(step: int, every: int, last: int) -> bool:
    """Whether step is one of every `every` before the last, which has its own turn."""
    return every > 0 and step % every == 0 and step != last


def open_policy(
    session: Session, device: torch.device
) -> tuple[PolicyEngine, RolloutEngine, Reference | None]:
    """What trains the session's model, what samples from it, and pi_ref, None if nothing reads it.

    With LoRA the reference is the policy without its adapters; otherwise a copy made before.
    """
    config, reference = session.config, None
    has_lora = config.model.lora is not None
    if config.loss.kl_coef and not has_lora:
        model = copy.deepcopy(session.loaded.model).eval()
        reference = FrozenCopy(Policy(model.requires_grad_(False)))
    engine = _policy_engine(session, device)
    if config.loss.kl_coef and has_lora:
        reference = WithoutAdapters(engine)
    rollout = session.new_engine(
        engine.rollout, config.rollout.batch_size, is_copy=engine.rollout_is_copy
    )
    return engine, rollout, reference


def _policy_engine(session: Session, device: torch.device) -> PolicyEngine:
    train = session.config.train
    return PolicyEngine(
        session.loaded,
        OptimizerSettings(
            learning_rate=train.learning_rate,
            total_steps=train.steps * train.num_iterations * train.mini_batches,
            warmup_steps=train.warmup_steps,
            schedule=train.schedule,
            min_learning_rate=train.min_learning_rate,
            weight_decay=train.weight_decay,
            betas=train.adam_betas,
            max_grad_norm=train.max_grad_norm,
            max_skipped_updates=train.max_skipped_updates,
        ),
        session.config.deepspeed,
        device,
        bf16=session.config.model.dtype == "bfloat16",
        freeze_vision=train.freeze_vision,
        lora=session.config.model.lora,
        seed=session.config.seed,
        packing=train.packing,
        gradient_checkpointing=train.gradient_checkpointing,
        copy_for_rollouts=session.config.rollout.engine == "transformers",
    )


def _record_samples(
    outcome: StepOutcome, step: int, run_dir: Path, progress: TrainProgress, config: Config
) -> None:
    """Now and then, show one completion and keep it in samples.jsonl."""
    every = config.logging.samples_every
    if not every or step % every:
        return
    group, rollout, role = _pick_sample(outcome)
    record = SampleRecord(
        step=step,
        prompt=group.sample.prompt,
        completion=rollout.text,
        answer=group.sample.answer,
        reward=rollout.reward,
        role=role,
    )
    append_sample(run_dir, record)
    show_sample(progress, record)


def _pick_sample(outcome: StepOutcome) -> tuple[SampledGroup, Rollout, str]:
    """The first trained sequence with its role, or where nothing trained, the first rollout."""
    for group, update in zip(outcome.groups, outcome.updates, strict=True):
        if update.sequences:
            return group, update.sequences[0].rollout, update.sequences[0].role
    return outcome.groups[0], outcome.groups[0].rollouts[0], "untrained"
