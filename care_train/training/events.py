"""The released code's event files, field by field, for those who have its plots (`official`).

Source: github.com/yongxinwang-ai/CARE at 8c6045c, verl/algorithms/adv_estimators/care.py,
verl/trainer/ray_trainer.py (care_events.jsonl) and verl/hooks/rgr.py (rgr_events.jsonl).
"""

from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from care_train.algorithm.advantages import RESCUE_DELTA
from care_train.config import CareSettings
from care_train.distributed import gather, is_main
from care_train.reporting.files import JsonlWriter
from care_train.training.groups import Group

EVENT_FILES = ("care_events.jsonl", "rgr_events.jsonl")


def append_events(run_dir: Path, groups: Sequence[Group], care: CareSettings, step: int) -> None:
    """Add a step's events to the run's files. A collective call.

    Groups count over the whole batch, one rank's after another's; rollouts by group.

    Args:
        run_dir: the run's folder.
        groups: this rank's, with what they train.
        care: the run's settings.
        step: counted from 1.
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
            for record in records:
                if record is not None:
                    writer.write(record)


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
