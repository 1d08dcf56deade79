"""Padding and time of a forward and backward: by count, by a token budget, and packed.

    python -m bench.batches
    python -m bench.batches --hidden 256 --repeats 9

One model, the same sequences, three ways to make micro-batches of them that need about the same
memory: `count` takes as many sequences as would fit if all were the longest allowed
(`train.micro_batch_size`), in the order they come; `budget` cuts them by tokens, sorted by length
(`train.micro_batch_tokens`); `packed` lays them end to end under the same budget
(`train.packing`). Runs are interleaved; times are medians. The last line is one JSON object.
"""

import argparse
import json
import math
import tempfile
from dataclasses import asdict, dataclass
from functools import partial
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from bench.measure import interleave
from care_train.cli import quiet_libraries
from care_train.config import ModelSettings, TrainSettings
from care_train.models.batch import ModelBatch, TokenSequence, collate, pack, packed_positions
from care_train.models.load import load_model
from care_train.models.policy import Policy
from care_train.models.prompts import EncodedPrompt
from care_train.models.tiny import build_tiny_model
from care_train.training.micro_batches import split

LONGEST = 256
"""Tokens a response may have; every prompt has `PROMPT`."""
PROMPT = 32
AT_ONCE = 4
"""Sequences of the longest length that fit: the budget."""
COUNT = 16
"""Sequences of a batch."""
WAYS = ("count", "budget", "packed")
SPREADS = ("equal", "uniform", "long-tailed")


@dataclass(frozen=True)
class Figures:
    """One way to make micro-batches of one spread of lengths."""

    micro_batches: int
    padding: float
    """Share of the positions that hold no token."""
    seconds: float
    time_ratio: float
    """To `count` in the same run."""


def responses(spread: str, generator: torch.Generator) -> list[int]:
    """Lengths of `COUNT` responses: all the longest, uniform, or log-normal around a tenth."""
    if spread == "equal":
        return [LONGEST] * COUNT
    if spread == "uniform":
        return torch.randint(8, LONGEST + 1, (COUNT,), generator=generator).tolist()
    drawn = torch.randn(COUNT, generator=generator).exp() * LONGEST / 10
    return drawn.long().clamp(8, LONGEST).tolist()


def sequences_of(lengths: list[int]) -> list[TokenSequence]:
    """Text sequences of the same prompt length."""
    prompt = EncodedPrompt(tuple(10 + i % 40 for i in range(PROMPT)))
    return [TokenSequence(prompt, (), tuple(10 + i % 50 for i in range(n))) for n in lengths]


def micro_batches(loaded: Any, sequences: list[TokenSequence], way: str) -> list[ModelBatch]:
    """The batch's micro-batches."""
    if way == "count":
        parts = [list(range(i, i + AT_ONCE)) for i in range(0, len(sequences), AT_ONCE)]
    else:
        budget = AT_ONCE * (PROMPT + LONGEST)
        limits = TrainSettings(micro_batch_tokens=budget, packing=way == "packed")
        parts = split([len(s.token_ids) for s in sequences], limits)
    chosen = [[sequences[i] for i in part] for part in parts]
    if way == "packed":
        positions = packed_positions(loaded.model)
        return [pack(part, positions, None) for part in chosen]
    return [collate(part, loaded.pad_token_id, None) for part in chosen]


def forward_and_backward(policy: Policy, batches: list[ModelBatch]) -> None:
    """Of all micro-batches."""
    for batch in batches:
        loss = policy(batch, 1.0, {"advantages": torch.full((len(batch.rows),), 1e-3)})[0].loss
        loss.backward()
    policy.zero_grad(set_to_none=True)


def compare(loaded: Any, spread: str, repeats: int) -> dict[str, Figures]:
    """All ways on one spread of lengths."""
    generator = torch.Generator().manual_seed(0)
    sequences = sequences_of(responses(spread, generator))
    policy = Policy(loaded.model.train())
    batches = {way: micro_batches(loaded, sequences, way) for way in WAYS}
    calls = {way: partial(forward_and_backward, policy, batches[way]) for way in WAYS}
    for warm_up in calls.values():
        warm_up()
    seconds = interleave(calls, repeats, math.inf, "cpu")
    tokens = sum(len(s.token_ids) for s in sequences)
    figures = {}
    for way in WAYS:
        positions = sum(batch.inputs["input_ids"].numel() for batch in batches[way])
        ratios = [own / base for own, base in zip(seconds[way], seconds["count"], strict=True)]
        figures[way] = Figures(
            len(batches[way]), 1 - tokens / positions, median(seconds[way]), median(ratios)
        )
    return figures


def main() -> int:
    """Measure every spread and print the table and one JSON line."""
    parser = argparse.ArgumentParser(description="Padding and time by how batches are made.")
    parser.add_argument("--hidden", type=int, default=128, help="the model's width")
    parser.add_argument("--repeats", type=int, default=5, help="timed runs of each")
    options = parser.parse_args()
    quiet_libraries()
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        path = build_tiny_model("tiny-qwen2", folder, hidden_size=options.hidden)
        loaded = load_model(ModelSettings(path=str(path)))
    table = Table("lengths", "way", "micro-batches", "padding", "seconds", "time ratio")
    found = {spread: compare(loaded, spread, options.repeats) for spread in SPREADS}
    for spread, ways in found.items():
        for way, own in ways.items():
            row = (f"{own.padding:.0%}", f"{own.seconds:.2f}", f"{own.time_ratio:.2f}")
            table.add_row(spread, way, str(own.micro_batches), *row)
    Console(width=100).print(table)
    cases = {s: {w: asdict(own) for w, own in ways.items()} for s, ways in found.items()}
    print(json.dumps({"hidden": options.hidden, "threads": torch.get_num_threads()} | cases))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
