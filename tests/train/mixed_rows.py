"""Ranks of one test: rank 0 has text alone, every other rank has images.

`python -m tests.train.mixed_rows OUT CASES`, CASES being JSON: name -> arguments of `run_case`.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch

from care_train.distributed import (
    all_sum,
    gather,
    initialize_process_group,
    is_main,
    rank,
    world_size,
)
from care_train.models.batch import TokenSequence
from care_train.models.load import LoadedModel
from care_train.training.engine import MicroBatch, PolicyEngine
from care_train.training.log_probs import WithoutAdapters
from care_train.training.optimizer import OptimizerSettings
from tests.train.builders import encoder_of, image_sample, load, make_config, text_sample

STEPS = 2


def sequences_of(loaded: LoadedModel, place: int) -> list[TokenSequence]:
    """Two rows of text for rank 0, two of images for rank 1."""
    samples = [text_sample(0), text_sample(1, prompt="is it red?")]
    if place:
        samples = [image_sample("red", 2), image_sample("blue", 3, size=100)]
    generator = torch.Generator().manual_seed(place)
    return [
        TokenSequence(p, (), tuple(torch.randint(10, 60, (4 + i,), generator=generator).tolist()))
        for i, p in enumerate(encoder_of(loaded).encode(samples))
    ]


def run_case(model: str, stage: int, settings: dict[str, Any]) -> dict[str, Any]:
    """Score, train and score again; every rank's log-probs, in the order of ranks."""
    loaded = load(Path(model))
    config = make_config({"deepspeed": {"zero_stage": stage}, **settings})
    engine = PolicyEngine(
        loaded,
        OptimizerSettings(learning_rate=1e-3, total_steps=STEPS, max_grad_norm=1e9),
        config,
        initialize_process_group(),
        freeze_vision=config.train.freeze_vision,
    )
    # One rank does what two do together.
    places = [rank()] if world_size() > 1 else [0, 1]
    batches = [engine.collate(sequences_of(loaded, place)) for place in places]
    tokens = all_sum([float(sum(len(b.rows) for b in batches))], engine.device)[0]
    before = [engine.log_probs(batch, 1.0)[0] for batch in batches]
    norms = []
    for _ in range(STEPS):
        micro = [MicroBatch(b, {"advantages": _advantages(b) / tokens}) for b in batches]
        norms.append(engine.step(micro, 1.0).grad_norm)
    after = [engine.log_probs(batch, 1.0)[0] for batch in batches]
    result = {"before": _all(before), "norms": norms, "after": _all(after)}
    if config.model.lora is not None:
        reference = WithoutAdapters(engine)
        result["reference"] = _all([reference.log_probs(batch, 1.0)[0] for batch in batches])
    return result


def _advantages(batch: Any) -> torch.Tensor:
    return 1.0 - 1.5 * (batch.sequence_ids % 2)


def _all(rows: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat([row for part in gather(rows) for row in part]).float()


def main(out: str, cases: str) -> None:
    for name, arguments in json.loads(cases).items():
        result = run_case(*arguments)
        if is_main():
            torch.save(result, Path(out) / f"{name}.pt")


if __name__ == "__main__":
    main(*sys.argv[1:])
