"""What a step leaves of its groups beside numbers: the archive's rows, a group to show, and the
released code's event files."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from care_train.algorithm.advantages import RESCUE_DELTA
from care_train.algorithm.baselines import has_mixed_outcomes
from care_train.algorithm.region_weights import split_advantages
from care_train.algorithm.types import Rollout, Spans, Subgroup
from care_train.config import CareSettings, Config
from care_train.data import Sample
from care_train.distributed import gather, is_main, rank, world_size
from care_train.reporting import SampleRecord
from care_train.reporting.archive import ArchiveWriter
from care_train.reporting.archive_schema import REGIONS
from care_train.reporting.files import JsonlWriter
from care_train.rollout.engine import Completion
from care_train.training.groups import (
    Group,
    outcome_of,
    reflected_place,
    reflection_outcome,
    roles_of,
    telling_rollouts,
)
from care_train.training.log_probs import TrainItem, known_old_log_probs, on_cpu, token_advantages

EVENT_FILES = ("care_events.jsonl", "rgr_events.jsonl")

_UPDATED = (
    *("raw_advantage", "sequence_advantage", "token_weights", "token_advantages"),
    *("ref_log_probs", "entropy", "clipped"),
)
_UNTRAINED = {"trained": False} | dict.fromkeys(_UPDATED)


def open_writer(config: Config, run_dir: Path) -> AbstractContextManager[ArchiveWriter | None]:
    """This rank's writer of the run's archive; None with `logging.archive_gib=0`."""
    if config.logging.archive_gib == 0:
        return nullcontext()
    return ArchiveWriter(run_dir, rank(), world_size(), config.logging.archive_gib)


def archive_step(
    archive: ArchiveWriter,
    step: int,
    groups: Sequence[Group],
    dropped: Sequence[Group],
    items: Sequence[TrainItem],
) -> None:
    """Hand a step's groups over to be written.

    `items` are the sequences the batch trained, `dropped` the groups that dynamic sampling sampled
    beside it.
    """
    trained = _trained(items)
    rows = [_group_row(group, trained) for group in groups]
    rows += [_group_row(group, {}, _dropped_reason(group)) for group in dropped]
    for place, row in enumerate(rows):
        row |= {"step": step, "rank": archive.rank, "group": place}
    archive.write_step(step, rows, [group.sample.images for group in [*groups, *dropped]])


def archive_evaluation(
    archive: ArchiveWriter,
    step: int,
    decoding: str,
    samples: Sequence[Sample],
    rollouts: Sequence[Rollout],
) -> None:
    """Hand an evaluation's answers over to be written."""
    rows = [
        _question(sample) | _answer(rollout) | {"step": step, "decoding": decoding}
        for sample, rollout in zip(samples, rollouts, strict=True)
    ]
    archive.write_evaluation(step, decoding, rows, [sample.images for sample in samples])


def case_study(
    groups: Sequence[Group], step: int, text_of: Callable[[Completion], str]
) -> tuple[Group, str, list[SampleRecord]]:
    """The first group of a step with a reflection, else the first that trained, else the first.

    `text_of` decodes a reflection's own tokens, without the rationale that it goes on from.

    Returns:
        The group, its outcome, and its `telling_rollouts`.
    """
    group = max(groups, key=lambda g: (g.reflected is not None, bool(g.update.sequences)))
    reflection, records = reflection_outcome(group), []
    parts = [*outcome_of(group.subgroup, group.update)]
    parts += [f"reflection {reflection}"] if reflection != "none" else []
    for role, rollout in telling_rollouts(group, group.update):
        sample, text = group.sample, rollout.text
        if rollout is group.reflected and group.repair is not None:
            text = text_of(group.repair.completion)
        record = SampleRecord(step, sample.prompt, text, sample.answer, rollout.reward, role)
        records.append(record)
    return group, " · ".join(filter(None, parts)), records


def append_events(run_dir: Path, groups: Sequence[Group], care: CareSettings, step: int) -> None:
    """Add a step to the run's event files, which `preset: official` has field by field as the
    released code does, for those who plot them. A collective call.

    Groups count over the whole batch, one rank's after another's; rollouts by group.

    Source: github.com/yongxinwang-ai/CARE at 8c6045c, verl/algorithms/adv_estimators/care.py,
    verl/trainer/ray_trainer.py (care_events.jsonl) and verl/hooks/rgr.py (rgr_events.jsonl).
    """
    found = gather([(_care_event(group, care), _rgr_event(group, care)) for group in groups])
    if not is_main():
        return
    events = [event for own in found for event in own]
    size = len(groups[0].rollouts)
    for place, (care_event, rgr_event) in enumerate(events):
        if care_event is not None:
            care_event |= {"group": float(place), "step": step}
            care_event["anchor_idx"] += float(place * size)
        if rgr_event is not None:
            rgr_event["group"] = place
    for name, records in zip(EVENT_FILES, zip(*events, strict=True), strict=True):
        with closing(JsonlWriter(run_dir / name)) as writer:
            for record in filter(None, records):
                writer.write(record)


def _question(sample: Sample) -> dict[str, Any]:
    names = ("visit", "location", "source", "prompt", "answer", "answer_type")
    own = {name: getattr(sample, name) for name in names}
    return own | {"row_id": sample.id, "options": list(sample.options)}


def _answer(rollout: Rollout) -> dict[str, Any]:
    names = ("text", "finished", "accuracy", "reward", "verdict", "format_verdict")
    return {name: getattr(rollout, name) for name in names} | {
        "token_ids": np.asarray(rollout.token_ids, np.int32),
        "format": rollout.format_score,
        "rewards": [{"name": name, "value": value} for name, value in rollout.rewards],
    }


def _group_row(
    group: Group, trained: Mapping[Rollout, dict[str, Any]], dropped: str = ""
) -> dict[str, Any]:
    update = group.update
    outcome, reason = ("dropped", dropped) if dropped else outcome_of(group.subgroup, update)
    return _question(group.sample) | {
        "outcome": outcome,
        "reason": reason,
        "num_correct": sum(rollout.accuracy == 1 for rollout in group.rollouts),
        "num_negatives": update.num_negatives,
        "equalize_factor": update.equalize_factor,
        "anchor_clamped": update.anchor_clamped,
        "reflection": reflection_outcome(group),
        "reflect_on": reflected_place(group),
        "pair_distances": None if group.distances is None else group.distances.flatten().numpy(),
        "rollouts": _rollout_rows(group, trained),
    }


def _rollout_rows(group: Group, trained: Mapping[Rollout, dict[str, Any]]) -> list[dict[str, Any]]:
    """The G rollouts, and the reflection behind them where there is one."""
    roles, subgroup, distances = roles_of(group), group.subgroup, None
    if isinstance(subgroup, Subgroup) and group.distances is not None:
        distances = group.distances[subgroup.anchor.index]
    rows = []
    for place, rollout in enumerate(group.responses):
        own = trained.get(rollout)
        role, nearness = roles.get(place, ("unused" if own is None else "trained", None))
        is_sampled = place < len(group.rollouts)
        row = _answer(rollout) | _spans(rollout.spans) | (_UNTRAINED if own is None else own)
        if rollout.old_log_probs is not None or own is None:
            row["old_log_probs"] = _array(rollout.old_log_probs)
        log_probs = rollout.log_probs
        row |= {
            "prefix_ids": np.asarray(rollout.prefix_ids, np.int32),
            "rollout_log_probs": None if log_probs is None else np.asarray(log_probs, np.float32),
            "role": role,
            "rank_of_negative": nearness,
            "distance": _item(distances, place) if is_sampled else None,
            "old_log_prob_sum": _item(group.log_prob_sums, place) if is_sampled else None,
            "reflected_from": None if is_sampled else reflected_place(group),
        }
        rows.append(row)
    return rows


def _spans(spans: Spans) -> dict[str, int | None]:
    found = {}
    for region in REGIONS:
        start, end = getattr(spans, region) or (None, None)
        found |= {f"{region}_start": start, f"{region}_end": end}
    return found


def _trained(items: Sequence[TrainItem]) -> dict[Rollout, dict[str, Any]]:
    """What each trained sequence was credited with, and the update's numbers, by its rollout.

    Tensors of all sequences are joined first: a GPU is waited for once.
    """
    if not items:
        return {}
    sequences = [item.sequence for item in items]
    outcomes = [item.outcome for item in items]
    # An advantage of 1 and weights that are not normalised: Eq. 11 of it is w itself.
    weighed = [
        replace(s, advantage=1.0, credit=replace(s.credit, normalize=False)) for s in sequences
    ]
    # -1 where the surrogate's lower bound took the gradient away, 1 where the upper one did.
    clipped = [o and o.clipped_high.to(torch.int8) - o.clipped_low.to(torch.int8) for o in outcomes]
    columns = {
        "token_advantages": token_advantages(items),
        "token_weights": split_advantages(weighed),
        "ref_log_probs": on_cpu([item.ref_log_probs for item in items]),
        "old_log_probs": known_old_log_probs(items),
        "entropy": on_cpu([o and o.entropy for o in outcomes]),
        "clipped": on_cpu(clipped),
    }
    return {
        sequence.rollout: {
            "trained": True,
            "raw_advantage": sequence.raw_advantage,
            "sequence_advantage": sequence.advantage,
            **{name: _array(values[place]) for name, values in columns.items()},
        }
        for place, sequence in enumerate(sequences)
    }


def _array(values: torch.Tensor | None) -> np.ndarray | None:
    return None if values is None else values.detach().numpy()


def _item(values: torch.Tensor | None, place: int) -> float | None:
    return None if values is None else float(values[place])


def _dropped_reason(group: Group) -> str:
    if has_mixed_outcomes(group.rollouts):
        return "beyond_batch"
    return "all_correct" if group.rollouts[0].accuracy == 1 else "all_wrong"


def _care_event(group: Group, care: CareSettings) -> dict[str, Any] | None:
    subgroup, update = group.subgroup, group.update
    if isinstance(subgroup, str):
        return None
    assert subgroup.anchor.index is not None
    return {
        "group": 0.0,
        "G": float(len(group.rollouts)),
        "K": float(care.max_negatives),
        "K_prime": float(update.num_negatives),
        "has_positive": float(not subgroup.rescued),
        "anchor_idx": float(subgroup.anchor.index),
        "neg_scale_s": float(care.neg_scale),
        "equalize_factor": float(update.equalize_factor),
        "rescue_triggered": float(subgroup.rescued),
        "rescue_delta": RESCUE_DELTA,
    }


def _rgr_event(group: Group, care: CareSettings) -> dict[str, Any] | None:
    reflected = group.reflected
    if reflected is None:
        return None
    return {
        "group": 0,
        "group_uid": group.sample.id,
        "triggered": True,
        "passed": reflected.reward > 0,
        "replaced_original_failure": True,
        "s_refl_used": care.reflect_scale,
        "template": "structured",
        "critique_len": _found_length(reflected.spans.think),
        "final_len": _found_length(reflected.spans.answer),
    }


def _found_length(span: tuple[int, int] | None) -> int:
    """0 where a span was missing: what `Spans` holds then begins with the response."""
    return 0 if span is None or span[0] == 0 else span[1] - span[0]
