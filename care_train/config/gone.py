"""Settings that earlier versions had: what replaced each, and which value still means the same."""

from collections.abc import Mapping, Sequence
from typing import Any

from care_train.config.care import PRESETS, Decisions

_DECISIONS = {
    "care.positive": "positive",
    "care.partial": "partial",
    "care.anchor_prefers_format": "anchor_prefers_format",
    "care.farthest_first_start": "farthest_first_start",
    "care.reflection.on_failure": "failed_reflection",
    "care.reflection.success_advantage": "repaired_advantage",
    "care.count_negatives_by": "count_negatives_by",
    "care.clamp_anchor": "clamp_anchor",
    "care.tag_weight": "tag_weight",
    "care.malformed": "malformed",
    "care.normalize_over": "normalize_over",
    "care.rescue.score": "proxy_score",
    "care.rescue.require_format": "proxy_requires_format",
    "care.rescue.num_negatives": "rescue_size",
}
"""Old keys of the fields of `Decisions`."""

_CONSTANTS: dict[str, tuple[object, str]] = {
    "care.robust": (False, "mean and standard deviation (Eqs. 5-6) are used"),
    "care.robust_trim": (0.2, "mean and standard deviation (Eqs. 5-6) are used"),
    "care.weight_eps": (1e-8, "eps_w of Eq. 11 is 1e-8"),
    "care.norm_eps": (1e-6, "eps of Eq. 6 is 1e-6"),
    "train.min_learning_rate": (0.0, "cosine and linear schedules end at 0"),
    "train.adam_betas": ([0.9, 0.999], "AdamW's betas are 0.9 and 0.999"),
    "loss.importance_over_cap": ("truncate", "a weight above loss.importance_cap is the cap"),
    "rollout.vllm.log_level": ("error", "set VLLM_LOGGING_LEVEL in the environment"),
    "logging.tensorboard": (True, "logging.report_to lists where metrics go"),
    "logging.wandb": (False, "logging.report_to lists where metrics go"),
    "logging.trackio": (False, "logging.report_to lists where metrics go"),
    "care.rescue.delta": (0.1, "the z-score cancels it; care.rescue.scale weakens a rescue"),
}
"""Keys with the value that is built in now, and what to say of another."""


def without_gone(values: Mapping[str, Any], preset: str) -> dict[str, Any]:
    """`values` without keys that are gone, where they say what this version does anyway.

    A run's config.yaml names every setting, so that an older one stays readable.

    Args:
        values: nested settings, as given.
        preset: the configuration's.

    Raises:
        ValueError: a key that is gone with another value; the message names what replaces it.
    """
    decisions = PRESETS.get(preset, PRESETS["default"])["care"]["decisions"]
    assert isinstance(decisions, Decisions)
    kept = {key: (getattr(decisions, name), _BY_PRESET) for key, name in _DECISIONS.items()}
    kept |= _CONSTANTS
    faults: list[str] = []
    left = _left(values, (), kept, faults)
    if faults:
        raise ValueError("\n".join(faults))
    return left


_BY_PRESET = "the preset decides it (default | literal | official)"


def _left(
    values: Mapping[str, Any],
    above: Sequence[str],
    kept: Mapping[str, tuple[object, str]],
    faults: list[str],
) -> dict[str, Any]:
    left = {}
    for name, value in values.items():
        key = ".".join((*above, str(name)))
        if isinstance(value, Mapping) and key != "care.decisions":
            left[name] = _left(value, (*above, str(name)), kept, faults)
        elif key == "care.decisions":
            faults.append(f"{key}: got {value!r}, wanted no such key: preset sets them")
        elif key not in kept:
            left[name] = value
        elif value != kept[key][0]:
            faults.append(f"{key}: got {value!r}, but this setting is gone: {kept[key][1]}")
    return left
