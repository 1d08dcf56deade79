"""Evaluation: a single decode per question, no reflection (Sec. 8.3)."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from care_train.data import Sample
from care_train.distributed import all_sum, is_main, rank, world_size
from care_train.evaluation.decoding import EVAL_STEP, decoding, equal_batches
from care_train.reporting import track
from care_train.rollout.engine import Request, RolloutEngine, request_seed
from care_train.training.session import Session, rank_share
from care_train.training.timer import timer


@dataclass(frozen=True)
class EvalResult:
    """Means over `num_questions`, on all ranks."""

    accuracy: float
    format: float
    num_questions: int


def evaluate(
    session: Session,
    engine: RolloutEngine,
    samples: Sequence[Sample],
    device: torch.device,
    *,
    greedy: bool,
    description: str = "evaluate",
) -> EvalResult:
    """Decode every question once, at the training temperature or greedily, and verify."""
    config = session.config
    share = rank_share(samples, rank(), world_size())
    batches = equal_batches(share, config.eval.batch_size, device)
    sampling = decoding(config, greedy)
    correct = well_formed = 0.0
    enabled = config.logging.progress and is_main()
    for batch in track(batches, f"{description}{' (greedy)' if greedy else ''}", enabled):
        prompts = session.encoder.encode(batch)
        requests = [
            Request(prompt, request_seed(config.seed, EVAL_STEP, sample.id, 0))
            for sample, prompt in zip(batch, prompts, strict=True)
        ]
        with timer("generate"):
            completions = engine.generate(requests, sampling)
        answered = [(*pair, ()) for pair in zip(batch, completions, strict=True)]
        for rollout in session.scorer.score_all(answered):
            correct += rollout.accuracy
            well_formed += rollout.format_score
    correct, well_formed, count = all_sum([correct, well_formed, float(len(share))], device)
    return EvalResult(correct / count, well_formed / count, int(count))


def evaluate_both(
    session: Session,
    engine: RolloutEngine,
    samples: Sequence[Sample],
    device: torch.device,
    description: str = "evaluate",
) -> dict[str, float]:
    """`accuracy` and `format` at the training temperature, and greedily where `eval.greedy`."""
    sampled = evaluate(session, engine, samples, device, greedy=False, description=description)
    values = {"accuracy": sampled.accuracy, "format": sampled.format}
    if session.config.eval.greedy:
        greedy = evaluate(session, engine, samples, device, greedy=True, description=description)
        values |= {"greedy_accuracy": greedy.accuracy, "greedy_format": greedy.format}
    return values | {"num_questions": float(sampled.num_questions)}
