"""Evaluation: a single decode per question, no reflection (Sec. 8.3)."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import TypeVar

import torch
from PIL import Image

from care_train.algorithm.types import Rollout
from care_train.config import Config
from care_train.data import Sample
from care_train.data.images import image_sizes
from care_train.distributed import all_max, all_sum, is_main, rank, world_size
from care_train.reporting import track
from care_train.reporting.archive import ArchiveWriter
from care_train.rollout.engine import Request, RolloutEngine, SamplingSettings, request_seed
from care_train.training.archiving import archive_evaluation
from care_train.training.groups import Answer
from care_train.training.session import Session, rank_share
from care_train.training.timer import timer

EVAL_STEP = -1
"""Stands for the step in the seeds of evaluation requests: no training step has this number."""

T = TypeVar("T")


def evaluate(
    session: Session,
    engine: RolloutEngine,
    samples: Sequence[Sample],
    device: torch.device,
    *,
    greedy: bool = False,
    blind: bool = False,
    description: str = "evaluate",
    archive: ArchiveWriter | None = None,
    step: int = 0,
) -> dict[str, float]:
    """Decode every question once and verify: `accuracy`, `format` and `num_questions` of all ranks.

    Args:
        session: the model with its prompt encoder and verifier.
        engine: generates with it.
        samples: the questions of all ranks.
        device: this rank's.
        greedy: take the likeliest token each time, instead of sampling as in training.
        blind: show a blank image in the place of each.
        description: what the progress says.
        archive: where the answers go; None: nowhere.
        step: how many steps the policy was trained.
    """
    config = session.config
    share = rank_share(samples, rank(), world_size())
    batches = equal_batches(share, config.rollout.batch_size, device)
    sampling = decoding(config, greedy)
    rollouts: list[Rollout] = []
    enabled = config.logging.progress and is_main()
    for batch in track(batches, f"{description}{' (greedy)' if greedy else ''}", enabled):
        if blind:
            batch = [without_images(sample) for sample in batch]
        prompts = session.encoder.encode(batch)
        requests = [
            Request(prompt, request_seed(config.seed, EVAL_STEP, sample.id, 0))
            for sample, prompt in zip(batch, prompts, strict=True)
        ]
        with timer("generate"):
            completions = engine.generate(requests, sampling)
        answered = list(map(Answer, batch, completions))
        rollouts += session.scorer.score_all(answered)
    if archive is not None:
        archive_evaluation(archive, step, "greedy" if greedy else "sampled", share, rollouts)
    correct = sum(rollout.accuracy for rollout in rollouts)
    well_formed = sum(rollout.format_score for rollout in rollouts)
    correct, well_formed, count = all_sum([correct, well_formed, float(len(share))], device)
    return {"accuracy": correct / count, "format": well_formed / count, "num_questions": count}


def evaluate_both(
    session: Session,
    engine: RolloutEngine,
    samples: Sequence[Sample],
    device: torch.device,
    description: str = "evaluate",
    *,
    archive: ArchiveWriter | None = None,
    step: int = 0,
) -> dict[str, float]:
    """`accuracy` and `format` at the training temperature, and what `eval.greedy` and `eval.blind`
    ask for beside.

    Args:
        session, engine, samples, device, description, archive, step: `evaluate`'s.
    """
    ask = partial(evaluate, session, engine, samples, device, archive=archive, step=step)
    values = ask(description=description)
    if session.config.eval.greedy:
        greedy = ask(greedy=True, description=description)
        values |= {f"greedy_{name}": greedy[name] for name in ("accuracy", "format")}
    if session.config.eval.blind:
        blind = ask(blind=True, description=f"{description} (blind)", archive=None)
        values["blind_accuracy"] = blind["accuracy"]
    return values


def without_images(sample: Sample) -> Sample:
    """The sample with a white image of the same size in the place of each of its own.

    Raises:
        RowError: as `image_sizes`.
    """
    sizes = image_sizes(sample)
    return replace(sample, images=tuple(Image.new("RGB", size, "white") for size in sizes))


def decoding(config: Config, greedy: bool | None = None) -> SamplingSettings:
    """How responses are sampled: as in training (Sec. 8.2), or greedily.

    Args:
        config: its `rollout` section has the temperature, top-p, top-k and length.
        greedy: whether to take the likeliest token each time; None: as `eval.decode` says.
    """
    rollout = config.rollout
    greedy = config.eval.decode == "greedy" if greedy is None else greedy
    return SamplingSettings(
        rollout.max_new_tokens, rollout.temperature, rollout.top_p, rollout.top_k, greedy
    )


def equal_batches(own: Sequence[T], size: int, device: torch.device) -> list[Sequence[T]]:
    """This rank's items in batches, padded with empty batches so that all ranks have as many.

    Ranks that share one vLLM by tensor parallelism must call `generate` equally often: a rank with
    fewer batches would leave the others waiting in a collective.
    """
    batches: list[Sequence[T]] = [own[start : start + size] for start in range(0, len(own), size)]
    return batches + [()] * (all_max(len(batches), device) - len(batches))
