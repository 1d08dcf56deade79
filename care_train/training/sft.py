"""Cold start (Sec. 4.1): supervised fine-tuning on rationale and answer in Sec. 3.1's format."""

import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from care_train.config import Config
from care_train.data import PromptOrder, Sample
from care_train.distributed import all_sum, is_main, rank, world_size
from care_train.models.batch import TokenSequence
from care_train.reporting import MetricsLogger, TrainProgress
from care_train.training.checkpoint import Checkpoint, Checkpoints, save_model
from care_train.training.engine import MicroBatch, PolicyEngine
from care_train.training.failures import Stopped
from care_train.training.guard import StopSignals
from care_train.training.micro_batches import MicroBatchLimits, agreed_micro_batches
from care_train.training.optimizer import OptimizerSettings
from care_train.training.resume import check_identity, identity, log_sizes
from care_train.training.session import Session, rank_share
from care_train.training.sft_rows import (
    ColdStartRows,
    repair_texts,
    response_text,
    target_sequence,
)
from care_train.training.timer import at_step, timer


def run_sft(
    session: Session,
    cold_start: ColdStartRows,
    folder: Path,
    metrics: MetricsLogger,
    device: torch.device,
    checkpoint: Checkpoint | None,
    started: Callable[[], None],
) -> dict[str, float]:
    """Fine-tune on rows with a rationale and write the model to `folder`.

    Args:
        session: the model to fine-tune, with its encoder.
        cold_start: the rows.
        folder: where to; its parent is the run's folder.
        metrics: the run's log.
        device: this rank's device.
        checkpoint: where to go on from; its log lines must be cut already.
        started: called before the first step.

    Returns:
        The last step's metrics, `eval_loss` among them where `sft.eval_data` is set; `rows`, and of
        them `rows_without_rationale`, which are not learnt.

    Raises:
        Stopped: a signal asked for it; a checkpoint is saved.
    """
    config, sft = session.config, session.config.sft
    rows, held_out = cold_start.learnt, cold_start.held_out
    run_identity = identity(config, cold_start.all, session.loaded.model)
    engine = _policy_engine(session, device)
    checkpoints = cold_start_checkpoints(config, folder.parent)
    order = PromptOrder(len(rows), config.seed)
    values: dict[str, float] = {}
    first = 0
    if checkpoint is not None:
        check_identity(checkpoint, run_identity, "sft.data.path", config)
        first, values = checkpoint.step, checkpoint.state["values"]
        checkpoint.restore(engine)
    enabled = config.logging.progress and is_main()
    display = TrainProgress(sft.steps, enabled, "cold start", start_step=first)
    started()
    with StopSignals() as signals, display as progress:
        for step in range(first, sft.steps):
            with at_step(step + 1, sft.steps, folder.parent):
                indices = order.take(step * sft.batch_size, sft.batch_size)
                batch = rank_share([rows[i] for i in indices], rank(), world_size())
                values = _sft_step(session, engine, batch, step)
                done = step + 1
                is_due = done == sft.steps or (sft.eval_every and done % sft.eval_every == 0)
                if held_out is not None and is_due:
                    values["eval_loss"] = held_out.loss(engine)
                metrics.log(done, values, phase="sft")
                progress.update(done, values)
                stop = signals.requested(device)
                if stop or (sft.save_every and done % sft.save_every == 0 and done < sft.steps):
                    state = {"step": done, "values": values, "logs": log_sizes(folder.parent)}
                    saved = checkpoints.save(engine, run_identity | state)
                    if stop:
                        raise Stopped(stop, done, sft.steps, folder.parent, saved)
    with at_step(sft.steps, sft.steps, folder.parent):
        save_model(engine, folder)
    checkpoints.remove()
    return values | cold_start.counts


def cold_start_checkpoints(config: Config, run_dir: Path) -> Checkpoints:
    """The cold start's own checkpoints, there until it ends."""
    return Checkpoints(run_dir / "cold_start_checkpoints", config.train.keep_checkpoints)


def _policy_engine(session: Session, device: torch.device) -> PolicyEngine:
    sft = session.config.sft
    return PolicyEngine(
        session.loaded,
        OptimizerSettings(
            learning_rate=sft.learning_rate,
            total_steps=sft.steps,
            warmup_steps=sft.warmup_steps,
            schedule=sft.schedule,
            weight_decay=sft.weight_decay,
            max_grad_norm=sft.max_grad_norm,
        ),
        session.config.deepspeed,
        device,
        bf16=session.config.model.dtype == "bfloat16",
        lora=session.config.model.lora,
        seed=session.config.seed,
        packing=session.config.train.packing,
        gradient_checkpointing=session.config.train.gradient_checkpointing,
    )


def _sft_step(
    session: Session, engine: PolicyEngine, samples: Sequence[Sample], step: int
) -> dict[str, float]:
    """One optimiser step on the mean negative log-likelihood of the response tokens.

    With ratio 1 and advantage 1/N, the gradient of Eq. 12 is that of the mean log-likelihood, so
    the policy's own fused step serves.
    """
    start = time.perf_counter()
    sequences = _target_sequences(session, samples, step)
    own_tokens = sum(len(sequence.response_ids) for sequence in sequences)
    tokens = all_sum([float(own_tokens)], engine.device)[0]
    micro_batches = []
    limits = MicroBatchLimits.of_cold_start(session.config.sft, session.config.train)
    for places in agreed_micro_batches(sequences, limits, engine.device)[0]:
        batch = engine.collate([sequences[i] for i in places])
        weights = torch.full((len(batch.rows),), 1.0 / tokens, device=engine.device)
        labels = tuple(sequences[i].prompt.location or "a prompt" for i in places)
        micro_batches.append(MicroBatch(batch, {"advantages": weights}, labels))
    learning_rate = engine.learning_rate  # the one used here; the step sets the next one's
    with timer("update"):
        result = engine.step(micro_batches, temperature=1.0)
    own_loss = -sum(float(output.log_probs.sum()) for output in result.outputs)
    return {
        "loss": all_sum([own_loss], engine.device)[0] / tokens,
        "grad_norm": result.grad_norm,
        "learning_rate": learning_rate,
        "tokens_per_second": tokens / (time.perf_counter() - start),
    }


def _target_sequences(
    session: Session, samples: Sequence[Sample], step: int
) -> list[TokenSequence]:
    """Prompt, and the response to learn; a repair row's failed rationale and cue are only read."""
    prompts = session.encoder.encode(samples)
    return [
        target_sequence(session, prompt, *sft_target(session.config, sample, step))
        for sample, prompt in zip(samples, prompts, strict=True)
    ]


def sft_target(config: Config, sample: Sample, step: int) -> tuple[str, str]:
    """(read only, learned) text after the prompt: Sec. 3.1's format, or a repair of it."""
    draw = random.Random(f"{config.seed}/{step}/{sample.id}").random()
    if sample.failed_rationale is None or draw >= config.sft.repair_share:
        return "", response_text(config.prompt, sample)
    return repair_texts(config, sample, sample.failed_rationale)
