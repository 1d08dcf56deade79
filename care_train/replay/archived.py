"""The groups of an archive as the algorithm takes them, and what a run made of them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch

from care_train.algorithm.types import Rollout, RolloutGroup, Spans
from care_train.data import Sample
from care_train.reporting.archive import archive_files, read_archive
from care_train.reporting.archive_schema import REGIONS, SPAN_COLUMNS

_GROUP_COLUMNS = (
    *("step", "rank", "group", "row_id", "visit", "outcome", "reason"),
    *("reflect_on", "pair_distances"),
)
_SCALARS = (
    *("finished", "accuracy", "format", "reward", "reflected_from", "old_log_prob_sum"),
    *("trained", "sequence_advantage"),
    *SPAN_COLUMNS,
)
_LISTS = ("token_ids", "prefix_ids", "token_advantages")


@dataclass(frozen=True)
class Credited:
    """What a configuration makes of one group, by the places of its rollouts; G is the
    reflection's."""

    outcome: str
    """anchored | rescued | trained | skipped."""
    reason: str = ""
    """Why it is skipped."""
    advantages: dict[int, float] = field(default_factory=dict)
    """A of each trained rollout."""
    token_advantages: dict[int, np.ndarray] = field(default_factory=dict)
    """a_it of each, [T] float32."""


@dataclass(frozen=True)
class ArchivedGroup:
    """One group as it was sampled and judged, and what the run made of it."""

    step: int
    rank: int
    group: int
    row_id: str
    draw: str
    """`Sample.draw` of its prompt."""
    sampled: RolloutGroup
    reflected: Rollout | None
    reflect_on: int | None
    """The negative that the run had repaired."""
    recorded: Credited

    @property
    def num_tokens(self) -> int:
        """Sampled tokens of all its responses."""
        responses = [*self.sampled.rollouts, *([self.reflected] if self.reflected else [])]
        return sum(len(rollout.token_ids) for rollout in responses)


def steps_of(run: Path) -> Iterator[list[ArchivedGroup]]:
    """The groups of each step that the run trained or skipped, rank after rank.

    Raises:
        ValueError: as `read_archive`.
    """
    columns = [*_GROUP_COLUMNS, *(f"rollouts.{name}" for name in (*_SCALARS, *_LISTS))]
    steps = dict.fromkeys(file.step for file in archive_files(run, "step"))
    for step in steps:
        table = read_archive(run, columns=columns, steps=range(step, step + 1))
        rows = table.select(_GROUP_COLUMNS).to_pylist()
        found = [_group(row, one) for row, one in zip(rows, _rollouts(table), strict=True)]
        # What dynamic sampling dropped was no part of the batch.
        yield [group for group in found if group.recorded.outcome != "dropped"]


def _rollouts(table: Any) -> Iterator[list[dict[str, Any]]]:
    """The rollouts of each group; their lists of numbers as arrays."""
    column = table["rollouts"].combine_chunks()
    flat = column.flatten()
    # Archives of before a reward function could name a wrong step have no such column.
    known = {field.name for field in flat.type}
    fields = {n: flat.field(n).to_pylist() if n in known else [None] * len(flat) for n in _SCALARS}
    fields |= {name: _arrays(flat.field(name)) for name in _LISTS}
    records = [
        dict(zip(fields, values, strict=True)) for values in zip(*fields.values(), strict=True)
    ]
    offsets = np.cumsum([0, *column.value_lengths().to_pylist()])
    for start, end in pairwise(offsets):
        yield records[start:end]


def _arrays(lists: Any) -> list[np.ndarray | None]:
    values = lists.flatten().to_numpy(zero_copy_only=False)
    lengths = lists.value_lengths().to_pylist()
    ends = np.cumsum([length or 0 for length in lengths])
    return [
        None if length is None else values[end - length : end]
        for length, end in zip(lengths, ends, strict=True)
    ]


def _group(row: dict[str, Any], records: Sequence[dict[str, Any]]) -> ArchivedGroup:
    sampled = [record for record in records if record["reflected_from"] is None]
    repair = next((r for r in records if r["reflected_from"] is not None), None)
    distances, sums = row["pair_distances"], [r["old_log_prob_sum"] for r in sampled]
    size = len(sampled)
    trained = {place: record for place, record in enumerate(records) if record["trained"]}
    return ArchivedGroup(
        step=row["step"],
        rank=row["rank"],
        group=row["group"],
        row_id=row["row_id"],
        draw=Sample(row["row_id"], "", "", visit=row["visit"]).draw,
        sampled=RolloutGroup(
            tuple(_rollout(record) for record in sampled),
            None if distances is None else torch.tensor(distances).double().reshape(size, size),
            None if None in sums else torch.tensor(sums),
        ),
        reflected=None if repair is None else _rollout(repair, reflected=True),
        reflect_on=row["reflect_on"],
        recorded=Credited(
            row["outcome"],
            row["reason"],
            {place: record["sequence_advantage"] for place, record in trained.items()},
            {place: record["token_advantages"] for place, record in trained.items()},
        ),
    )


def _rollout(record: dict[str, Any], *, reflected: bool = False) -> Rollout:
    spans = []
    for region in REGIONS:
        start, end = record[f"{region}_start"], record[f"{region}_end"]
        spans.append(None if start is None else (start, end))
    return Rollout(
        token_ids=tuple(record["token_ids"].tolist()),
        text="",
        spans=Spans(*spans),
        accuracy=record["accuracy"],
        format_score=record["format"],
        reward=record["reward"],
        finished=record["finished"],
        prefix_ids=tuple(record["prefix_ids"].tolist()),
        reflected=reflected,
    )
