"""CARE inside other trainers: `integrations.trl`, `integrations.verl`."""

from care_train.config import CareSettings


def check_settings(care: CareSettings) -> None:
    """ValueError: a setting that our own trainer alone carries out."""
    decisions = care.decisions
    refused = {
        "care.selector=learned: it learns from the reflections of care-train's own trainer": (
            care.selector == "learned"
        ),
        "care.credit=steps: no reward function of theirs names a wrong step": (
            care.credit == "steps"
        ),
        "a preset literal or official: they average per group, or read tags by their token ids": (
            decisions.normalize_over == "group" or decisions.spans == "tokens"
        ),
    }
    for message, is_refused in refused.items():
        if is_refused:
            raise ValueError(f"got {message}; wanted another, or `care-train train`")
