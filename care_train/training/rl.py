"""The training loop: prompts in order, one step after the other, metrics, samples, checkpoints."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from care_train.algorithm.types import Rollout
from care_train.data import PromptOrder, Sample
from care_train.models.policy import Policy
from care_train.reporting import (
    MetricsLogger,
    SampleRecord,
    TrainProgress,
    append_sample,
    show_sample,
)
from care_train.rollout.types import RolloutEngine
from care_train.settings import Config
from care_train.training.distributed import is_main, rank, world_size
from care_train.training.engine import OptimizerSettings, PolicyEngine
from care_train.training.sampling import GroupSampler, SampledGroup
from care_train.training.saving import load_checkpoint, save_checkpoint, save_model
from care_train.training.session import Session, rank_share
from care_train.training.step import StepOutcome, TrainStep

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
        self._count = count
        self.position = 0

    def draw(self) -> list[Sample]:
        """The next `prompts_per_step` prompts, this rank's share of them."""
        indices = self._order.take(self.position, self._count)
        self.position += self._count
        return rank_share([self._samples[i] for i in indices], rank(), world_size())


def run_training(
    session: Session,
    samples: Sequence[Sample],
    run_dir: Path,
    metrics: MetricsLogger,
    device: torch.device,
    *,
    resume: bool = False,
    evaluate: Evaluate | None = None,
) -> dict[str, float]:
    """Train, save `final/`, and return the totals of the run.

    Args:
        session: the model to train, with its encoder and verifier.
        samples: the training prompts.
        run_dir: where checkpoints, samples and the final model go.
        metrics: the run's log.
        device: this rank's device.
        resume: go on from the newest checkpoint in `run_dir`.
        evaluate: called every `train.eval_every` steps on all ranks, with the rollout engine.
    """
    config = session.config
    reference = _reference(session)
    engine = _policy_engine(session, device)
    rollout = session.rollout_engine(engine.rollout, config.rollout.batch_size)
    sampler = GroupSampler(rollout, session.encoder, session.scorer, config)
    train_step = TrainStep(config, engine, sampler, reference)
    source = PromptSource(samples, config)
    totals = {"steps": 0.0, "decoded_tokens": 0.0, "trained_sequences": 0.0}
    totals["sampled_sequences"] = 0.0
    if resume:
        state = load_checkpoint(engine, run_dir / "checkpoints")
        totals, source.position = state["totals"], state["position"]
    first = int(totals["steps"])
    train = config.train
    enabled = config.logging.progress and is_main()
    with TrainProgress(train.steps, enabled, config.algorithm, start_step=first) as progress:
        for step in range(first, train.steps):
            outcome = train_step.run(source.draw, step)
            done = step + 1
            totals = {key: totals[key] + outcome.metrics.get(key, 0.0) for key in totals}
            totals["steps"] = float(done)
            metrics.log(done, outcome.metrics)
            progress.update(done, outcome.metrics)
            if is_main():
                _record_samples(outcome, done, run_dir, progress, config)
            if evaluate is not None and _is_due(done, train.eval_every, train.steps):
                engine.sync_rollout_model()
                metrics.log(done, evaluate(rollout), phase="eval")
            if _is_due(done, train.save_every, train.steps) or done == train.steps:
                state = {"step": done, "position": source.position, "totals": totals}
                save_checkpoint(engine, run_dir / "checkpoints", state, train.keep_checkpoints)
    save_model(engine, run_dir / "final")
    return totals


def _is_due(step: int, every: int, last: int) -> bool:
    """Whether step is one of every `every` before the last, which has its own turn."""
    return every > 0 and step % every == 0 and step != last


def _reference(session: Session) -> Policy | None:
    """pi_ref: a frozen copy of the policy before training; None where nothing reads it."""
    if session.config.loss.kl_coef == 0:
        return None
    model = copy.deepcopy(session.loaded.model).eval()
    return Policy(model.requires_grad_(False))


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
        ),
        session.config.deepspeed,
        device,
        bf16=session.config.model.dtype == "bfloat16",
        freeze_vision=train.freeze_vision,
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
    show_sample(progress, **asdict(record))


def _pick_sample(outcome: StepOutcome) -> tuple[SampledGroup, Rollout, str]:
    """The first trained sequence with its role, or where nothing trained, the first rollout."""
    for group, update in zip(outcome.groups, outcome.updates, strict=True):
        if update.sequences:
            return group, update.sequences[0].rollout, update.sequences[0].role
    return outcome.groups[0], outcome.groups[0].rollouts[0], "untrained"
