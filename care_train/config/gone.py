"""Settings that earlier versions had: what replaced each, and which value still means the same."""

from collections.abc import Mapping, Sequence
from typing import Any

from care_train.config.care import PRESETS, Decisions

_DECISIONS = {
    "care.positive": "positive",
    "care.partial": "partial",
    "care.anchor_prefers_format": "anchor_prefers_format",
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

_BY_PRESET = "the preset decides it (default | literal | official)"

_CONSTANTS: dict[str, tuple[object, str]] = {
    "care.farthest_first_start": ("nearest", _BY_PRESET),
    "care.robust": (False, "mean and standard deviation (Eqs. 5-6) are used"),
    "care.robust_trim": (0.2, "mean and standard deviation (Eqs. 5-6) are used"),
    "care.weight_eps": (1e-8, "eps_w of Eq. 11 is 1e-8"),
    "care.norm_eps": (1e-6, "eps of Eq. 6 is 1e-6"),
    "train.min_learning_rate": (0.0, "cosine and linear schedules end at 0"),
    "train.adam_betas": ([0.9, 0.999], "AdamW's betas are 0.9 and 0.999"),
    "loss.importance_over_cap": ("truncate", "it is loss.importance_beyond now"),
    "rollout.vllm.log_level": ("error", "set VLLM_LOGGING_LEVEL in the environment"),
    "eval.batch_size": (256, "rollout.batch_size is that of evaluations too"),
    "rollout.vllm.server_timeout": (600.0, "an answer may take 600 s"),
    "train.max_resample_rounds": (3, "more prompts are drawn three times at most"),
    "care.rescue.delta": (0.1, "the z-score cancels it; care.rescue.scale weakens a rescue"),
}
"""Keys with the value that is built in now, and what to say of another."""

_OF_BUILDS: dict[str, tuple[object, str]] = {
    "file_name": ("train.parquet", "the data set's file is train.parquet"),
    "row_group": (32, "row groups have 32 rows"),
    "dedup.hash_size": (16, "hashes have 16 x 16 bits"),
}
"""The same of `care-train data build`."""

_TRACKERS = {"tensorboard": True, "wandb": False, "trackio": False}
"""Switches of `logging` that `logging.report_to` lists now, with their defaults."""


def without_gone(values: Mapping[str, Any], preset: str) -> dict[str, Any]:
    """`values` without keys that are gone, where they say what this version does anyway.

    A run's config.yaml names every setting, so that an older one stays readable. The switches of
    trackers become `logging.report_to`, `rollout.vllm.sleep` its level.

    Args:
        values: nested settings, as given.
        preset: the configuration's.

    Raises:
        ValueError: a key that is gone with another value; the message names what replaces it.
    """
    decisions = PRESETS.get(preset, PRESETS["default"])["care"]["decisions"]
    assert isinstance(decisions, Decisions)
    kept = {key: (getattr(decisions, name), _BY_PRESET) for key, name in _DECISIONS.items()}
    return _without(_renamed(values), kept | _CONSTANTS)


def without_gone_of_build(values: Mapping[str, Any]) -> dict[str, Any]:
    """`without_gone` for the settings of a build."""
    return _without(values, _OF_BUILDS)


def _without(values: Mapping[str, Any], kept: Mapping[str, tuple[object, str]]) -> dict[str, Any]:
    faults: list[str] = []
    left = _left(values, (), kept, faults)
    if faults:
        raise ValueError("\n".join(faults))
    return left


def _renamed(values: Mapping[str, Any]) -> dict[str, Any]:
    """`values` with old switches under the settings that have their meaning now.

    Raises:
        ValueError: an old and a new name of the same thing.
    """
    result = dict(values)
    logging = values.get("logging")
    if isinstance(logging, Mapping) and logging.keys() & _TRACKERS.keys():
        rest = {name: value for name, value in logging.items() if name not in _TRACKERS}
        switches = _TRACKERS | {n: v for n, v in logging.items() if n in _TRACKERS}
        listed = [name for name, value in switches.items() if value]
        result["logging"] = _with_new(rest, "report_to", listed, "logging")
    rollout = values.get("rollout")
    vllm = rollout.get("vllm") if isinstance(rollout, Mapping) else None
    if isinstance(rollout, Mapping) and isinstance(vllm, Mapping) and "sleep" in vllm:
        rest = {name: value for name, value in vllm.items() if name != "sleep"}
        level = 2 if vllm["sleep"] else 0
        section = _with_new(rest, "sleep_level", level, "rollout.vllm")
        result["rollout"] = {**rollout, "vllm": section}
    return result


def _with_new(section: dict[str, Any], name: str, value: Any, path: str) -> dict[str, Any]:
    if name in section and section[name] != value:
        raise ValueError(
            f"{path}.{name}: got {section[name]!r} beside an older setting that says {value!r}, "
            "wanted one of the two"
        )
    return {**section, name: value}


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
