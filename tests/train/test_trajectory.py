"""ZeRO stages, ranks, micro-batches and LoRA move where numbers live, not what they are."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from care_train.cli import main as care_train
from tests.train.builders import load
from tests.train.runs import COLD_START, ROOT, SMALL, data_arguments
from tests.train.trajectory import STEPS, run_case

FP32, BF16, LORA = (), ("model.dtype=bfloat16",), ("model.lora.rank=4", "train.learning_rate=5e-3")

TOLERANCE = 1e-4
"""Largest distance of two runs' weights, relative to how far they have moved.

The same responses and gradients: what differs is the order of sums over micro-batches and ranks,
and in norms, 1e-7 each; AdamW's division by sqrt(v) enlarges that in the few elements whose
gradients are themselves rounding noise. Measured: 1e-5 and less. A lost micro-batch, a rank counted
twice or a bias correction off by one step gives 0.1 and more.
"""


def _stage(number: int, *more: str) -> list[str]:
    return [f"deepspeed.zero_stage={number}", *more]


@pytest.fixture(scope="module")
def start(tmp_path_factory, color_rows) -> Path:
    """A model that earns some rewards."""
    out = tmp_path_factory.mktemp("trajectory")
    common = [*SMALL, *data_arguments(color_rows), f"output_dir={out}", "name=cold"]
    assert care_train(["sft", *common, *COLD_START]) == 0
    return out / "cold" / "final"


def _distance(start: Path, one: Path, other: Path) -> float:
    """|W_one - W_other| / |W_one - W_start|."""
    first = dict(load(start).model.named_parameters())
    weights = [torch.load(path, weights_only=True)["weights"] for path in (one, other)]
    assert weights[0].keys() == weights[1].keys() == first.keys()
    apart = moved = 0.0
    for name, tensor in first.items():
        ours, theirs = (w[name].double() for w in weights)
        apart += float((ours - theirs).square().sum())
        moved += float((ours - tensor.detach().double()).square().sum())
    assert moved > 0.1
    return (apart / moved) ** 0.5


def _check_metrics(one: Path, other: Path) -> None:
    ours, theirs = (torch.load(path, weights_only=True)["metrics"] for path in (one, other))
    assert len(ours) == len(theirs) == STEPS and all(m["grad_norm"] > 0 for m in ours)
    for mine, its in zip(ours, theirs, strict=True):
        for key in ("loss", "kl", "grad_norm"):
            assert mine[key] == pytest.approx(its[key], rel=1e-3, abs=1e-4), key
        for key in ("trained_sequences", "decoded_tokens", "reward", "accuracy"):
            assert mine[key] == pytest.approx(its[key], abs=1e-9), key


def test_stages_and_micro_batches_take_one_trajectory(start, color_rows, tmp_path):
    """One rank, fp32: ZeRO 0, 1, 2 and 3; and a batch in micro-batches of 5 sequences.

    The latter without KL: where policy and reference are one, its gradient is rounding noise alone,
    and other for each way to pad, which AdamW makes full updates of.
    """
    no_kl = "loss.kl_coef=0"
    cases = {f"zero{n}": _stage(n) for n in range(4)}
    cases |= {"whole": [no_kl], "micro": [no_kl, "train.micro_batch_size=5"]}
    for name, overrides in cases.items():
        run_case(tmp_path, name, overrides, str(start), str(color_rows))
    for name in ("zero1", "zero2", "zero3"):
        files = tmp_path / "zero0.pt", tmp_path / f"{name}.pt"
        assert _distance(start, *files) < TOLERANCE, name
        _check_metrics(*files)
    assert _distance(start, tmp_path / "whole.pt", tmp_path / "micro.pt") < TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("more", [FP32, BF16, LORA], ids=["fp32", "bf16", "lora"])
def test_ranks_and_stages_take_one_trajectory(more, start, color_rows, tmp_path):
    """One and two ranks under ZeRO 0-3, in fp32, bfloat16 and with LoRA, as one rank under ZeRO-0.

    bfloat16 keeps the tolerance: every rank forwards the same rows in the same precision, and what
    is summed over ranks goes into fp32 master weights.
    """
    single = {f"zero{n}": _stage(n, *more) for n in range(4)}
    _launch(tmp_path, single, 1, start, color_rows)
    double = {f"two-zero{n}": _stage(n, *more) for n in range(4)}
    _launch(tmp_path, double, 2, start, color_rows)
    distances = {}
    for name in [*single, *double]:
        files = tmp_path / "zero0.pt", tmp_path / f"{name}.pt"
        distances[name] = _distance(start, *files)
        _check_metrics(*files)
    print({name: f"{distance:.1e}" for name, distance in distances.items()})
    assert max(distances.values()) < TOLERANCE, distances


def _launch(out: Path, cases: dict[str, list[str]], ranks: int, start: Path, rows: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    command = [sys.executable, "-m", "tests.train.trajectory", out, start, rows, json.dumps(cases)]
    processes = []
    for rank in range(ranks):
        place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
        processes.append(
            subprocess.Popen(
                [*map(str, command)],
                cwd=ROOT,
                env=os.environ | place | address,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    for process in processes:
        text, _ = process.communicate(timeout=400)
        assert process.returncode == 0, text
