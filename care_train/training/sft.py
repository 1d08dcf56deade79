"""Cold start (Sec. 4.1): supervised fine-tuning on rationale and answer in Sec. 3.1's format."""

import random
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from care_train.algorithm.reflection import repair_prefix
from care_train.data import PromptOrder, Sample, require_rationales
from care_train.models.batch import TokenSequence
from care_train.reporting import MetricsLogger, TrainProgress
from care_train.settings import Config
from care_train.training.distributed import all_sum, is_main, rank, world_size
from care_train.training.engine import MicroBatch, OptimizerSettings, PolicyEngine
from care_train.training.saving import save_model
from care_train.training.scoring import length_sorted_batches
from care_train.training.session import Session, rank_share


def run_sft(
    session: Session,
    samples: Sequence[Sample],
    folder: Path,
    metrics: MetricsLogger,
    device: torch.device,
) -> dict[str, float]:
    """Fine-tune on rows with a rationale and write the model to `folder`.

    Returns:
        The last step's metrics.

    Raises:
        ValueError: no row has a rationale.
    """
    config, sft = session.config, session.config.sft
    require_rationales(samples)
    rows = [sample for sample in samples if sample.rationale is not None]
    engine = PolicyEngine(
        session.loaded,
        OptimizerSettings(
            learning_rate=sft.learning_rate,
            total_steps=sft.steps,
            warmup_steps=sft.warmup_steps,
            schedule=sft.schedule,
            weight_decay=sft.weight_decay,
            max_grad_norm=sft.max_grad_norm,
        ),
        config.deepspeed,
        device,
        bf16=config.model.dtype == "bfloat16",
    )
    order = PromptOrder(len(rows), config.seed)
    values: dict[str, float] = {}
    enabled = config.logging.progress and is_main()
    with TrainProgress(sft.steps, enabled, "cold start") as progress:
        for step in range(sft.steps):
            indices = order.take(step * sft.batch_size, sft.batch_size)
            batch = rank_share([rows[i] for i in indices], rank(), world_size())
            values = _sft_step(session, engine, batch, step)
            metrics.log(step + 1, values, phase="sft")
            progress.update(step + 1, values)
    save_model(engine, folder)
    return values


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
    size = session.config.sft.micro_batch_size
    for places in length_sorted_batches(sequences, size):
        batch = engine.collate([sequences[i] for i in places])
        weights = torch.full((len(batch.rows),), 1.0 / tokens, device=engine.device)
        micro_batches.append(MicroBatch(batch, {"advantages": weights}))
    result = engine.step(micro_batches, temperature=1.0)
    own_loss = -sum(float(output.log_probs.sum()) for output in result.outputs)
    return {
        "loss": all_sum([own_loss], engine.device)[0] / tokens,
        "grad_norm": result.grad_norm,
        "learning_rate": engine.learning_rate,
        "tokens_per_second": tokens / (time.perf_counter() - start),
    }


def _target_sequences(
    session: Session, samples: Sequence[Sample], step: int
) -> list[TokenSequence]:
    """Prompt, and the response to learn; a repair row's failed rationale and cue are only read."""
    prompts = session.encoder.encode(samples)
    sequences = []
    for sample, prompt in zip(samples, prompts, strict=True):
        prefix, response = sft_target(session.config, sample, step)
        ids = session.encoder.encode_text(response) + session.loaded.eos_token_ids[:1]
        sequences.append(TokenSequence(prompt, session.encoder.encode_text(prefix), ids))
    return sequences


def sft_target(config: Config, sample: Sample, step: int) -> tuple[str, str]:
    """(read only, learned) text after the prompt: Sec. 3.1's format, or a repair of it."""
    think, answer = config.prompt.think_tag, config.prompt.answer_tag
    response = f"{sample.rationale}</{think}> <{answer}>{sample.answer}</{answer}>"
    draw = random.Random(f"{config.seed}/{step}/{sample.id}").random()
    if sample.failed_rationale is None or draw >= config.sft.repair_share:
        return "", f"<{think}>{response}"
    return repair_prefix(sample.failed_rationale, config.care.reflection.cue, think), response
