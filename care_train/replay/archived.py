"""The groups of an archive as the algorithm takes them, and what a run made of them."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from care_train.algorithm.types import Rollout, RolloutGroup, Spans
from care_train.data import Sample
from care_train.reporting.archive import archive_steps, check_archive, read_files
from care_train.reporting.archive_schema import REGIONS, SPAN_COLUMNS

_GROUP_COLUMNS = (
    *("step", "rank", "group", "row_id", "visit", "outcome", "reason"),
    *("reflect_on", "pair_distances"),
)
_ROLLOUT_COLUMNS = (
    *("finished", "accuracy", "format", "reward", "reflected_from", "old_log_prob_sum"),
    *("trained", "sequence_advantage", "token_ids", "prefix_ids", "token_advantages"),
    *SPAN_COLUMNS,
)


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
    check_archive(run)
    columns = [*_GROUP_COLUMNS, *(f"rollouts.{name}" for name in _ROLLOUT_COLUMNS)]
    for files in archive_steps(run, "step"):
        groups = map(_group, read_files(files, columns=columns).to_pylist())
        # What dynamic sampling dropped was no part of the batch.
        yield [group for group in groups if group.recorded.outcome != "dropped"]


def _group(row: dict[str, Any]) -> ArchivedGroup:
    records = row["rollouts"]
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
            {i: record["sequence_advantage"] for i, record in trained.items()},
            {
                place: np.array(record["token_advantages"], np.float32)
                for place, record in trained.items()
            },
        ),
    )


def _rollout(record: dict[str, Any], *, reflected: bool = False) -> Rollout:
    spans = []
    for region in REGIONS:
        start, end = record[f"{region}_start"], record[f"{region}_end"]
        spans.append(None if start is None else (start, end))
    return Rollout(
        token_ids=tuple(record["token_ids"]),
        text="",
        spans=Spans(*spans),
        accuracy=record["accuracy"],
        format_score=record["format"],
        reward=record["reward"],
        finished=record["finished"],
        prefix_ids=tuple(record["prefix_ids"]),
        reflected=reflected,
    )
