"""Replay an archive under other settings, and compare what trains with what the run trained."""

import csv
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import groupby
from pathlib import Path
from statistics import fmean, pstdev
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from care_train.algorithm.care import skip_before_forward
from care_train.algorithm.fixability import Fixability, outcomes_of
from care_train.algorithm.region_weights import split_advantages
from care_train.algorithm.types import GroupUpdate, RolloutGroup
from care_train.config import TABLE_5, Config, load_config
from care_train.replay.archived import ArchivedGroup, Credited, steps_of
from care_train.reporting.files import write_json
from care_train.training.groups import choose_subgroup, fixability_of, group_updates, outcome_of
from care_train.training.resume import settings_of

FORMATS = (".json", ".csv", ".png")
_REPLAYED = ("algorithm", "preset", "care.", "loss.")
_NO_DISTANCES = "the run had no distances and log-probs of the group"
_OTHER_REFLECTION = "another negative would have been repaired, whose repair was never sampled"


@dataclass(frozen=True)
class GroupDifference:
    """One group under both."""

    step: int
    rank: int
    group: int
    row_id: str
    recorded_outcome: str
    replayed_outcome: str
    recorded_chosen: tuple[int, ...]
    """Places of the rollouts with an advantage; the group's size is the reflection's."""
    replayed_chosen: tuple[int, ...]
    overlap: float
    """Of the two sets: their common members over all their members; 1 where both are empty."""
    advantage_difference: float
    """Largest |difference| of a rollout's advantage; 0 is that of one that does not train."""
    token_difference: float
    """Largest |difference| of a token's advantage."""


@dataclass
class Side:
    """Totals over the compared groups under one configuration."""

    outcomes: Counter[str] = field(default_factory=Counter)
    advantages: list[float] = field(default_factory=list)
    """Of the sequences that have one: under `preset=official` the KL pulls at others too."""
    signal_tokens: int = 0
    """Tokens with an advantage that is not 0."""
    tokens: int = 0
    """All sampled ones."""

    def add(self, credited: Credited, num_tokens: int) -> None:
        """Count one group."""
        reason = f" ({credited.reason})" if credited.reason else ""
        self.outcomes[f"{credited.outcome}{reason}"] += 1
        self.advantages += filter(None, credited.advantages.values())
        found = credited.token_advantages.values()
        self.signal_tokens += sum(int(np.count_nonzero(values)) for values in found)
        self.tokens += num_tokens

    def summary(self) -> dict[str, Any]:
        """Numbers in JSON's types; null where there is nothing to say."""
        values = self.advantages
        return {
            "outcomes": dict(self.outcomes.most_common()),
            "trained_sequences": len(values),
            "advantage_mean": fmean(values) if values else None,
            "advantage_std": pstdev(values) if values else None,
            "advantage_min": min(values, default=None),
            "advantage_max": max(values, default=None),
            "positive_share": fmean(value > 0 for value in values) if values else None,
            "signal_share": self.signal_tokens / self.tokens if self.tokens else None,
        }


@dataclass(frozen=True)
class Replay:
    """A replay, group by group and in total."""

    run: Path
    changes: dict[str, tuple[Any, Any]]
    """The settings that differ: the run's value and the replay's."""
    groups: list[GroupDifference]
    recorded: Side
    replayed: Side
    unknown: Counter[str]
    """Groups that could not be replayed, by reason; they are in no other number."""

    def summary(self) -> dict[str, Any]:
        """All but the groups, in JSON's types."""
        chosen = [group for group in self.groups if group.recorded_chosen or group.replayed_chosen]
        return {
            "run": str(self.run),
            "changes": {key: list(values) for key, values in self.changes.items()},
            "groups": len(self.groups),
            "unknown": dict(self.unknown),
            "groups_with_same_chosen": sum(g.overlap == 1 for g in self.groups),
            "mean_overlap": fmean(group.overlap for group in chosen) if chosen else None,
            "max_advantage_difference": max(g.advantage_difference for g in self.groups),
            "max_token_difference": max(g.token_difference for g in self.groups),
            "recorded": self.recorded.summary(),
            "replayed": self.replayed.summary(),
        }


def replay(run: Path, overrides: Sequence[str] = ()) -> Replay:
    """What settings would have chosen and credited of what a run sampled.

    Args:
        run: the run's folder, with its archive.
        overrides: `key=value` over the run's own: `algorithm`, `preset`, `care.*` but for what
            decides how a reflection is sampled, and `loss.*`. Another algorithm brings its loss.

    Raises:
        ValueError: no archive, a setting that decides what is sampled, or no group that has what
            the replay needs, with the reason.
    """
    config, changes = _configs(run, overrides)
    found: list[GroupDifference] = []
    recorded, replayed, unknown = Side(), Side(), Counter[str]()
    fixability = fixability_of(config)
    for groups in steps_of(run):
        for group, credited in zip(groups, credit(groups, config, fixability), strict=True):
            if isinstance(credited, str):
                unknown[credited] += 1
                continue
            found.append(_difference(group, credited))
            recorded.add(group.recorded, group.num_tokens)
            replayed.add(credited, group.num_tokens)
    if not found:
        reasons = "; ".join(f"{count} groups: {reason}" for reason, count in unknown.items())
        raise ValueError(f"{run}: nothing to replay: {reasons or 'the archive has no groups'}")
    return Replay(run, changes, found, recorded, replayed, unknown)


def credit(
    groups: Sequence[ArchivedGroup], config: Config, fixability: Fixability | None = None
) -> list[Credited | str]:
    """What a configuration makes of a step's groups, or why that cannot be known.

    Tokens are credited for a rank's whole batch at once, as in the step: sums in another order
    would differ in last bits. `fixability` is what the steps before have taught; this one's
    reflections are added.
    """
    chosen = [_chosen(group, config, fixability) for group in groups]
    known = [one for one in chosen if not isinstance(one, str)]
    ranks = [g.rank for g, one in zip(groups, chosen, strict=True) if not isinstance(one, str)]
    if fixability is not None:
        fixability.learn(outcomes_of(known))
    updates = group_updates(known, config, lambda values: values)
    credited: list[Credited] = []
    for _, found in groupby(zip(ranks, known, updates, strict=True), lambda one: one[0]):
        batch = list(found)
        tokens = iter(split_advantages([s for *_, update in batch for s in update.sequences]))
        credited += [_credited(group, update, tokens) for _, group, update in batch]
    in_order = iter(credited)
    return [one if isinstance(one, str) else next(in_order) for one in chosen]


def _chosen(
    group: ArchivedGroup, config: Config, fixability: Fixability | None
) -> RolloutGroup | str:
    """The group with what this configuration chooses of it; or why that cannot be known."""
    sampled = group.sampled
    if config.algorithm != "care":
        return sampled
    is_needed = skip_before_forward(sampled.rollouts, config.care) is None
    if is_needed and (sampled.distances is None or sampled.log_prob_sums is None):
        return _NO_DISTANCES
    subgroup = choose_subgroup(sampled, config, group.step - 1, group.draw, fixability)
    if isinstance(subgroup, str) or subgroup.reflect_on is None:
        return replace(sampled, subgroup=subgroup)
    if subgroup.others[subgroup.reflect_on].index != group.reflect_on:
        return _OTHER_REFLECTION
    return replace(sampled, subgroup=subgroup, reflected=group.reflected)


def _credited(group: RolloutGroup, update: GroupUpdate, tokens: Iterator[torch.Tensor]) -> Credited:
    """`tokens` has the token advantages of the update's sequences, and of later groups'."""
    place_of = {rollout: place for place, rollout in enumerate(group.responses)}
    places = [place_of[sequence.rollout] for sequence in update.sequences]
    return Credited(
        *outcome_of(group.subgroup, update),
        {i: s.advantage for i, s in zip(places, update.sequences, strict=True)},
        {place: next(tokens).numpy() for place in places},
    )


def _difference(group: ArchivedGroup, credited: Credited) -> GroupDifference:
    one, other = group.recorded, credited
    chosen = [{i for i, a in side.advantages.items() if a} for side in (one, other)]
    union, common = chosen[0] | chosen[1], chosen[0] & chosen[1]
    gaps = [abs(one.advantages.get(i, 0.0) - other.advantages.get(i, 0.0)) for i in union]
    zero = np.zeros(1, np.float32)
    tokens = [
        np.abs(one.token_advantages.get(i, zero) - other.token_advantages.get(i, zero)).max()
        for i in union
    ]
    return GroupDifference(
        step=group.step,
        rank=group.rank,
        group=group.group,
        row_id=group.row_id,
        recorded_outcome=one.outcome,
        replayed_outcome=other.outcome,
        recorded_chosen=tuple(sorted(chosen[0])),
        replayed_chosen=tuple(sorted(chosen[1])),
        overlap=len(common) / len(union) if union else 1.0,
        advantage_difference=max(gaps, default=0.0),
        token_difference=float(max(tokens, default=0.0)),
    )


def _configs(run: Path, overrides: Sequence[str]) -> tuple[Config, dict[str, tuple[Any, Any]]]:
    path = run / "config.yaml"
    if not path.is_file():
        raise ValueError(f"{run}: no config.yaml: it is no run's folder")
    before, now = load_config(path), load_config(path, overrides)
    if now.algorithm != before.algorithm:
        brought: Mapping[str, Any] = TABLE_5[now.algorithm]["loss"]
        now = load_config(path, [*(f"loss.{k}={v}" for k, v in brought.items()), *overrides])
    old, new = settings_of(before), settings_of(now)
    changes = {key: (old.get(key), value) for key, value in new.items() if old.get(key) != value}
    refused = [
        key for key in changes if not key.startswith(_REPLAYED) or key == "care.reflection.cue"
    ]
    if refused:
        raise ValueError(
            f"{refused[0]}: got {changes[refused[0]][1]!r}: it decides what is sampled, and the "
            "archive has the run's own samples; a replay changes algorithm, preset, care.*, loss.*"
        )
    decisions = before.care.decisions, now.care.decisions
    for name in ("spans", "repair"):
        if getattr(decisions[0], name) != getattr(decisions[1], name):
            raise ValueError(
                f"preset: got {now.preset!r}, under which responses are read or repaired in "
                f"another way ({name}) than in the run: train with it"
            )
    return now, changes


def show_replay(replayed: Replay) -> None:
    """Print the totals beside the run's own."""
    console = Console()
    summary = replayed.summary()
    changes = ", ".join(f"{key}={new}" for key, (_, new) in replayed.changes.items())
    console.print(Text(f"{replayed.run}: {changes or 'its own settings'}"), soft_wrap=True)
    table = Table("", "the run", "replayed")
    sides = summary["recorded"], summary["replayed"]
    for name in dict.fromkeys([*sides[0]["outcomes"], *sides[1]["outcomes"]]):
        table.add_row(f"groups {name}", *(f"{s['outcomes'].get(name, 0):,}" for s in sides))
    table.add_row("sequences trained", *(f"{s['trained_sequences']:,}" for s in sides))
    for name in ("advantage_mean", "advantage_std", "advantage_min", "advantage_max"):
        table.add_row(name.replace("_", " "), *(_number(s[name], "{:+.4f}") for s in sides))
    table.add_row("advantages above 0", *(_number(s["positive_share"], "{:.1%}") for s in sides))
    shares = (_number(side["signal_share"], "{:.1%}") for side in sides)
    table.add_row("sampled tokens with an advantage", *shares)
    console.print(table)
    console.print(
        f"{summary['groups']:,} groups compared: the same rollouts train in "
        f"{summary['groups_with_same_chosen']:,}, the sets overlap by "
        f"{_number(summary['mean_overlap'], '{:.1%}')} on average; advantages differ by at most "
        f"{summary['max_advantage_difference']:.4g} per sequence, "
        f"{summary['max_token_difference']:.4g} per token",
        soft_wrap=True,
    )
    for reason, count in replayed.unknown.items():
        console.print(f"{count:,} groups left out: {reason}", soft_wrap=True)


def check_outputs(paths: Sequence[Path]) -> None:
    """Refuse, before the work, what `write_replay` cannot write.

    Raises:
        ValueError: another ending than `FORMATS`.
    """
    for path in paths:
        if path.suffix not in FORMATS:
            raise ValueError(f"--out: got {path}, wanted a name that ends in {', '.join(FORMATS)}")


def write_replay(replayed: Replay, path: Path) -> None:
    """Write totals and groups (.json), the groups (.csv) or a picture (.png)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [asdict(group) for group in replayed.groups]
    if path.suffix == ".json":
        write_json(path, replayed.summary() | {"per_group": rows})
    elif path.suffix == ".csv":
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(map(_flat, rows))
    else:
        from care_train.reporting.plots import plot_replay

        overlaps = [group.overlap for group in replayed.groups]
        plot_replay(replayed.recorded.advantages, replayed.replayed.advantages, overlaps, path)


def _flat(row: dict[str, Any]) -> dict[str, Any]:
    """Sets of places as text: `0 3 5`."""
    return {k: " ".join(map(str, v)) if isinstance(v, tuple) else v for k, v in row.items()}


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)
