"""Settings that earlier versions had: what replaced each, and which value still means the same."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from care_train.config.care import PRESETS, Decisions
from care_train.config.data import source_of

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
}
"""Old keys of the fields of `Decisions`."""

_BY_PRESET = "the preset decides it (default | literal | official)"

_BY_STEP = "limits.step bounds each part of a step"

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
    "data.split": (None, "append @SPLIT to data.path"),
    "data.revision": (None, "append #REVISION to data.path"),
    "sft.data.split": (None, "append @SPLIT to sft.data.path"),
    "sft.data.revision": (None, "append #REVISION to sft.data.path"),
    "sft.micro_batch_size": (64, "train.micro_batch_size is the cold start's too"),
    "sft.micro_batch_tokens": (None, "train.micro_batch_tokens is the cold start's too"),
    "prompt.max_image_pixels": (50_000_000, "images have 50,000,000 pixels at most"),
    "reward.workers": (2, "symbolic answers are compared in two processes per rank"),
    "reward.timeout": (5.0, "a symbolic comparison has 5 s of a processor's time"),
    "reward.judge.retries": (3, "a failed request is tried three times more"),
    "rollout.vllm.server_token_file": (None, "set CARE_TRAIN_SERVER_TOKEN in the environment"),
    "rollout.vllm.sync_bucket_mib": (512, "512 MiB of weights are sent at once"),
    "eval.k": ([], "eval.samples above 1 reports pass@k and majority@k for powers of two"),
    "limits.generate": (3600.0, _BY_STEP),
    "limits.reward": (1800.0, _BY_STEP),
    "limits.forward": (3600.0, _BY_STEP),
    "limits.update": (3600.0, _BY_STEP),
    "limits.sync": (1800.0, "limits.other bounds it"),
    "limits.save": (3600.0, "limits.other bounds it"),
    "limits.start": (600.0, "ranks have 600 s to find each other"),
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

_Section = dict[str, Any]


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
    return _without(_renamed(values, _RENAMES), kept | _CONSTANTS)


def without_gone_of_build(values: Mapping[str, Any]) -> dict[str, Any]:
    """`without_gone` for the settings of a build."""
    return _without(values, _OF_BUILDS)


def _without(values: Mapping[str, Any], kept: Mapping[str, tuple[object, str]]) -> dict[str, Any]:
    faults: list[str] = []
    left = _left(values, (), kept, faults)
    if faults:
        raise ValueError("\n".join(faults))
    return left


def without_old_sections(layer: Mapping[str, Any]) -> dict[str, Any]:
    """One layer of settings, where a number or path stands for what was a section: so the layers
    above may replace it."""
    return _renamed(layer, ("care", "data", "sft", "eval"))


def _renamed(values: Mapping[str, Any], sections: Iterable[str]) -> dict[str, Any]:
    """`values` with older settings under the names that have their meaning now.

    Raises:
        ValueError: an old and a new name of the same thing.
    """
    result = dict(values)
    for name in sections:
        if isinstance(section := values.get(name), Mapping):
            result[name] = _RENAMES[name](dict(section))
    return result


def _rename_logging(logging: _Section) -> _Section:
    """Switches of trackers are `report_to`; `archive` and its limit are `archive_gib`."""
    if logging.keys() & _TRACKERS.keys():
        switches = {name: logging.pop(name, default) for name, default in _TRACKERS.items()}
        listed = [name for name, value in switches.items() if value]
        _set(logging, "report_to", listed, "logging")
    if "archive_max_gib" in logging:
        _set(logging, "archive_gib", logging.pop("archive_max_gib"), "logging")
    if not logging.pop("archive", True):
        logging["archive_gib"] = 0.0
    return logging


def _rename_rollout(rollout: _Section) -> _Section:
    """`vllm.sleep` is its level."""
    vllm = rollout.get("vllm")
    if isinstance(vllm, Mapping) and "sleep" in vllm:
        rollout["vllm"] = vllm = dict(vllm)
        _set(vllm, "sleep_level", 2 if vllm.pop("sleep") else 0, "rollout.vllm")
    return rollout


def _rename_care(care: _Section) -> _Section:
    """A rescue's switch and scale are one number."""
    rescue = care.get("rescue")
    if isinstance(rescue, Mapping) and rescue and rescue.keys() <= {"enabled", "scale", "delta"}:
        care["rescue"] = rescue.get("scale", 1.0) if rescue.get("enabled", True) else 0.0
    return care


def _rename_data(data: _Section) -> _Section:
    """Split and revision stand behind the path."""
    if data.get("path") is not None:
        data["path"] = _source(data)
        data = {name: data[name] for name in data if name not in ("split", "revision")}
    return data


def _rename_sft(sft: _Section) -> _Section:
    if isinstance(data := sft.get("data"), Mapping):
        sft["data"] = _rename_data(dict(data))
    if isinstance(held_out := sft.get("eval_data"), Mapping):
        if held_out.get("max_samples") is not None:
            raise ValueError("sft.eval_data.max_samples: this setting is gone: all rows are read")
        sft["eval_data"] = _source(held_out)
    return sft


def _rename_eval(section: _Section) -> _Section:
    """Held-out rows are a path; how many there are is what `max_questions` was."""
    if isinstance(data := section.get("data"), Mapping):
        rows = dict(section.pop("data"))
        limit = rows.pop("max_samples", None)
        if limit is not None:
            _set(section, "max_samples", limit, "eval")
        if rows or limit is None:
            section["data"] = _source(data)
    if (limit := section.pop("max_questions", None)) is not None:
        _set(section, "max_samples", limit, "eval")
    return section


_RENAMES: dict[str, Callable[[_Section], _Section]] = {
    "logging": _rename_logging,
    "rollout": _rename_rollout,
    "care": _rename_care,
    "data": _rename_data,
    "sft": _rename_sft,
    "eval": _rename_eval,
}


def _source(rows: Mapping[str, Any]) -> str:
    """`PATH@SPLIT#REVISION` of a section; without a path `@SPLIT` of the training data's."""
    named = source_of(rows.get("path") or "")
    split = rows.get("split") or named.split or ("" if named.path else "test")
    revision = rows.get("revision") or named.revision
    return named.path + (f"@{split}" if split else "") + (f"#{revision}" if revision else "")


def _set(section: _Section, name: str, value: Any, path: str) -> None:
    if section.get(name, value) != value:
        raise ValueError(
            f"{path}.{name}: got {section[name]!r} beside an older setting that says {value!r}, "
            "wanted one of the two"
        )
    section[name] = value


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
