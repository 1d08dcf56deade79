"""What the archive keeps of a step's groups and of an evaluation's answers, as its rows."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from care_train.algorithm.baselines import has_mixed_outcomes
from care_train.algorithm.region_weights import spread_advantages
from care_train.algorithm.types import Rollout, Spans, Subgroup, TrainSequence
from care_train.config import Config
from care_train.data import Sample
from care_train.distributed import rank, world_size
from care_train.reporting.archive import ArchiveWriter
from care_train.reporting.archive_schema import REGIONS
from care_train.training.credit import outcome_of
from care_train.training.groups import Group
from care_train.training.log_probs import TokenOutcome, TrainItem
from care_train.training.roles import reflected_place, reflection_outcome, roles_of

_UNTRAINED = {
    "trained": False,
    "raw_advantage": None,
    "sequence_advantage": None,
    "token_weights": None,
    "token_advantages": None,
    "ref_log_probs": None,
    "entropy": None,
    "clipped": None,
}


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

    Args:
        archive: where to.
        step: counted from 1.
        groups: this rank's batch, updated.
        dropped: what dynamic sampling sampled beside it.
        items: the sequences the batch trained, with what the update said of them.
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
    """Hand an evaluation's answers over to be written.

    Args:
        archive: where to.
        step: how many steps the policy was trained.
        decoding: sampled | greedy.
        samples: this rank's questions.
        rollouts: the answer to each.
    """
    rows = [
        _question(sample) | _answer(rollout) | {"step": step, "decoding": decoding}
        for sample, rollout in zip(samples, rollouts, strict=True)
    ]
    archive.write_evaluation(step, decoding, rows, [sample.images for sample in samples])


def _question(sample: Sample) -> dict[str, Any]:
    return {
        "row_id": sample.id,
        "visit": sample.visit,
        "location": sample.location,
        "source": sample.source,
        "prompt": sample.prompt,
        "answer": sample.answer,
        "answer_type": sample.answer_type,
        "options": list(sample.options),
    }


def _answer(rollout: Rollout) -> dict[str, Any]:
    return {
        "text": rollout.text,
        "token_ids": np.asarray(rollout.token_ids, np.int32),
        "finished": rollout.finished,
        "accuracy": rollout.accuracy,
        "format": rollout.format_score,
        "reward": rollout.reward,
        "rewards": [{"name": name, "value": value} for name, value in rollout.rewards],
        "verdict": rollout.verdict,
        "format_verdict": rollout.format_verdict,
    }


def _group_row(
    group: Group, trained: Mapping[int, dict[str, Any]], dropped: str = ""
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


def _rollout_rows(group: Group, trained: Mapping[int, dict[str, Any]]) -> list[dict[str, Any]]:
    """The G rollouts, and the reflection behind them where there is one."""
    roles, subgroup = roles_of(group), group.subgroup
    distances = None
    if isinstance(subgroup, Subgroup) and group.distances is not None:
        distances = group.distances[subgroup.anchor.index]
    rows = []
    for place, rollout in enumerate(group.responses):
        role, nearness = roles.get(place, ("trained" if id(rollout) in trained else "unused", None))
        is_sampled = place < len(group.rollouts)
        rows.append(
            _rollout(rollout, trained)
            | {
                "role": role,
                "rank_of_negative": nearness,
                "distance": _item(distances, place) if is_sampled else None,
                "old_log_prob_sum": _item(group.log_prob_sums, place) if is_sampled else None,
                "reflected_from": None if is_sampled else reflected_place(group),
            }
        )
    return rows


def _rollout(rollout: Rollout, trained: Mapping[int, dict[str, Any]]) -> dict[str, Any]:
    own = trained.get(id(rollout))
    old = None if rollout.old_log_probs is None else rollout.old_log_probs.numpy()
    if own is None:
        own = _UNTRAINED | {"old_log_probs": old}
    elif old is not None:
        own = own | {"old_log_probs": old}
    return (
        _answer(rollout)
        | _spans(rollout.spans)
        | own
        | {
            "prefix_ids": np.asarray(rollout.prefix_ids, np.int32),
            "rollout_log_probs": (
                None if rollout.log_probs is None else np.asarray(rollout.log_probs, np.float32)
            ),
        }
    )


def _spans(spans: Spans) -> dict[str, int | None]:
    found = {}
    for region in REGIONS:
        start, end = getattr(spans, region) or (None, None)
        found |= {f"{region}_start": start, f"{region}_end": end}
    return found


def _trained(items: Sequence[TrainItem]) -> dict[int, dict[str, Any]]:
    """What each trained sequence was credited with, and the update's numbers, by its rollout's id.

    Tensors of all sequences are joined first: a GPU is waited for once.
    """
    if not items:
        return {}
    sequences = [item.sequence for item in items]
    lengths = [len(sequence.rollout.token_ids) for sequence in sequences]
    outcomes = [item.outcome for item in items]
    credited = spread_advantages(sequences).split(lengths)
    columns = {
        "token_advantages": credited,
        "token_weights": spread_advantages([_weighed(s) for s in sequences]).split(lengths),
        "ref_log_probs": _joined([item.ref_log_probs for item in items]),
        "old_log_probs": _joined(list(map(TrainItem.known_old_log_probs, items, credited))),
        "entropy": _joined([outcome and outcome.entropy for outcome in outcomes]),
        "clipped": _joined([outcome and _clipped(outcome) for outcome in outcomes]),
    }
    return {
        id(sequence.rollout): {
            "trained": True,
            "raw_advantage": sequence.raw_advantage,
            "sequence_advantage": sequence.advantage,
            **{name: _array(values[place]) for name, values in columns.items()},
        }
        for place, sequence in enumerate(sequences)
    }


def _clipped(outcome: TokenOutcome) -> torch.Tensor:
    """-1 where the surrogate's lower bound took the gradient away, 1 where the upper one did."""
    return outcome.clipped_high.to(torch.int8) - outcome.clipped_low.to(torch.int8)


def _weighed(sequence: TrainSequence) -> TrainSequence:
    """An advantage of 1 and weights that are not normalised: Eq. 11 of it is w itself."""
    return replace(sequence, advantage=1.0, credit=replace(sequence.credit, normalize=False))


def _joined(rows: Sequence[torch.Tensor | None]) -> Sequence[torch.Tensor | None]:
    """The rows on the CPU, fetched from their device at once."""
    present = [row.detach() for row in rows if row is not None]
    if not present:
        return rows
    parts = iter(torch.cat(present).cpu().split([len(row) for row in present]))
    return [None if row is None else next(parts) for row in rows]


def _array(values: torch.Tensor | None) -> np.ndarray | None:
    return None if values is None else values.numpy()


def _item(values: torch.Tensor | None, place: int) -> float | None:
    return None if values is None else float(values[place])


def _dropped_reason(group: Group) -> str:
    if has_mixed_outcomes(group.rollouts):
        return "beyond_batch"
    return "all_correct" if group.rollouts[0].accuracy == 1 else "all_wrong"
