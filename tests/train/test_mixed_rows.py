"""Ranks with text beside ranks with images: no hang, and the numbers of one rank."""

import json
from pathlib import Path

import pytest
import torch

from care_train.models.batch import collate, pack, packed_positions
from care_train.models.policy import Policy
from tests.train.builders import load
from tests.train.mixed_rows import run_case, sequences_of
from tests.train.runs import run_ranks

VISION_KINDS = ("tiny-qwen2.5-vl", "tiny-qwen3-vl")

FROZEN, LORA = {"train": {"freeze_vision": True}}, {"model": {"lora": {"rank": 4}}}
CHECKPOINTING = {"train": {"gradient_checkpointing": True}}

CASES = {
    "zero2": (2, {}),
    "zero3": (3, {}),
    "packed": (3, {"train": {"packing": True}}),
    "frozen": (3, FROZEN),
    "checkpointing": (3, CHECKPOINTING),
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
    run_ranks("tests.train.mixed_rows", out, json.dumps(cases), ranks=2, seconds=240)
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
    sequences = sequences_of(loaded, 0)
    if packed:
        batch = pack(sequences, packed_positions(loaded.model), loaded.image_token_id)
    else:
        batch = collate(sequences, loaded.pad_token_id, loaded.image_token_id)
    blind, seeing = Policy(loaded.model), Policy(loaded.model, always_sees=True)
    log_probs = seeing(batch)[0]
    assert torch.equal(log_probs, blind(batch)[0])
    log_probs.sum().backward()
    for name, parameter in loaded.model.base_model.visual.named_parameters():
        assert parameter.grad is not None and not parameter.grad.any(), name
