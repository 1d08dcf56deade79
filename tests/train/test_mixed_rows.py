"""Ranks with text beside ranks with images: no hang, and the numbers of one rank.

Started as ranks, this file runs cases itself: `python -m tests.train.test_mixed_rows OUT CASES`,
CASES being JSON: name -> arguments of `run_case`.
"""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from care_train.distributed import all_sum, gather, is_main, rank, world_size
from care_train.models.batch import TokenSequence
from care_train.models.load import LoadedModel
from care_train.models.lora import has_adapters
from care_train.models.policy import Policy
from care_train.training.engine import MicroBatch
from care_train.training.log_probs import WithoutAdapters
from tests.train.builders import (
    batch_of,
    encoder_of,
    image_sample,
    load,
    make_engine,
    text_sample,
)
from tests.train.runs import run_ranks

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
    engine = make_engine(loaded, settings, zero_stage=stage, learning_rate=1e-3)
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
    if has_adapters(loaded.model):
        reference = WithoutAdapters(engine)
        result["reference"] = _all([reference.log_probs(batch, 1.0)[0] for batch in batches])
    return result


def _advantages(batch: Any) -> torch.Tensor:
    return 1.0 - 1.5 * (batch.sequence_ids % 2)


def _all(rows: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat([row for part in gather(rows) for row in part]).float()


VISION_KINDS = ("tiny-qwen2.5-vl", "tiny-qwen3-vl")

FROZEN, LORA = {"model": {"train_vision": False}}, {"model": {"lora": {"rank": 4}}}
CHECKPOINTING = {"train": {"gradient_checkpointing": True}}

CASES = {
    "zero2": (2, {}),
    "zero3": (3, {}),
    "packed": (3, {"train": {"packing": True}}),
    "frozen": (3, FROZEN),
    "lora": (3, LORA | CHECKPOINTING),
}


@pytest.fixture(scope="module")
def together(tiny_folder, tmp_path_factory) -> Path:
    """What two ranks found in every case with every kind."""
    out = tmp_path_factory.mktemp("mixed")
    cases = {
        f"{kind}-{name}": (str(tiny_folder(kind)), *arguments)
        for kind in VISION_KINDS
        for name, arguments in CASES.items()
    }
    run_ranks("tests.train.test_mixed_rows", out, json.dumps(cases), ranks=2, seconds=240)
    return out


@pytest.mark.parametrize("kind", VISION_KINDS)
def test_two_ranks_take_the_step_of_one(kind, tiny_folder, together):
    """Rank 0 has text alone, rank 1 images: scoring, training and a reference, under ZeRO-2 and
    ZeRO-3, with packing, a frozen tower, gradient checkpointing and adapters."""
    folder = str(tiny_folder(kind))
    alone = {
        "full": run_case(folder, 0, {}),
        "frozen": run_case(folder, 0, FROZEN),
        "lora": run_case(folder, 0, LORA),
    }
    for name in CASES:
        _check(together / f"{kind}-{name}.pt", alone.get(name, alone["full"]))


def _check(path: Path, wanted: dict) -> None:
    found = torch.load(path, weights_only=True)
    assert found.keys() == wanted.keys()
    assert found["norms"] == pytest.approx(wanted["norms"], rel=1e-3), path.stem
    torch.testing.assert_close(found["before"], wanted["before"], rtol=1e-4, atol=1e-4)
    # AdamW makes full updates even of gradients that are rounding noise.
    torch.testing.assert_close(found["after"], wanted["after"], rtol=1e-2, atol=1e-2)
    assert (found["after"] - found["before"]).abs().max() > 0.05
    if "reference" in wanted:
        torch.testing.assert_close(found["reference"], found["before"], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("kind", VISION_KINDS)
def test_a_tower_that_sees_nothing_changes_nothing(kind, packed, tiny_folder):
    """Where no row has an image the tower runs, the log-probs are bit for bit those without it,
    and every gradient in it is there and exactly zero."""
    loaded = load(tiny_folder(kind))
    batch = batch_of(loaded, sequences_of(loaded, 0), packed=packed)
    blind, seeing = Policy(loaded.model), Policy(loaded.model, always_sees=True)
    log_probs = seeing(batch)[0]
    assert torch.equal(log_probs, blind(batch)[0])
    log_probs.sum().backward()
    for name, parameter in loaded.model.base_model.visual.named_parameters():
        assert parameter.grad is not None and not parameter.grad.any(), name


def run_cases(out: str, cases: str) -> None:
    for name, arguments in json.loads(cases).items():
        result = run_case(*arguments)
        if is_main():
            torch.save(result, Path(out) / f"{name}.pt")


if __name__ == "__main__":
    run_cases(*sys.argv[1:])
