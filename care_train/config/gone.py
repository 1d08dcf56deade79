"""Settings that earlier versions had: the value that still means the same, and what replaced it."""

from collections.abc import Mapping
from typing import Any

from care_train.config.care import PRESETS, TABLE_5

_DECISIONS = {
    "care.positive": "positive",
    "care.partial": "partial",
    "care.anchor_prefers_format": "anchor_prefers_format",
    "care.reflection.on_failure": "failed_reflection",
    "care.reflection.success_advantage": "repaired_advantage",
    "care.reflection.temperature": "repair_temperature",
    "care.reflection.top_p": "repair_top_p",
    "care.reflection.max_new_tokens": "repair_max_tokens",
    "care.count_negatives_by": "count_negatives_by",
    "care.clamp_anchor": "clamp_anchor",
    "care.tag_weight": "tag_weight",
    "care.malformed": "malformed",
    "care.normalize_over": "normalize_over",
}
"""Old keys of the fields of `Decisions`."""

_BY_PRESET = "the preset decides it (default | literal | official)"
_BY_STEP = "limits.step bounds each part of a step; all else has as long, and at least an hour"
_BEHIND = "append @SPLIT and #REVISION to "
_TRACKERS = "logging.report_to lists the trackers"
_RESCUE = "care.rescue is its scale, and 0 is off"
_SHARED = "is the cold start's too"

_CONSTANTS: dict[str, tuple[object, str]] = {
    "dedup.hash_size": (16, "hashes have 16 x 16 bits"),
    "file_name": ("train.parquet", "the data set's file is train.parquet"),
    "row_group": (32, "row groups have 32 rows"),
    "care.farthest_first_start": ("nearest", _BY_PRESET),
    "care.robust": (False, "mean and standard deviation (Eqs. 5-6) are used"),
    "care.robust_trim": (0.2, "mean and standard deviation (Eqs. 5-6) are used"),
    "care.weight_eps": (1e-8, "eps_w of Eq. 11 is 1e-8"),
    "care.norm_eps": (1e-6, "eps of Eq. 6 is 1e-6"),
    "care.rescue.enabled": (True, _RESCUE),
    "care.rescue.scale": (1.0, _RESCUE),
    "care.rescue.delta": (0.1, "the z-score cancels delta"),
    "data.split": (None, f"{_BEHIND}data.path"),
    "data.revision": (None, f"{_BEHIND}data.path"),
    "eval.batch_size": (256, "rollout.batch_size is that of evaluations too"),
    "eval.data.path": (None, "eval.data is the path itself"),
    "eval.data.split": ("test", f"{_BEHIND}eval.data"),
    "eval.data.revision": (None, f"{_BEHIND}eval.data"),
    "eval.data.max_samples": (None, "eval.max_samples limits the held-out rows"),
    "eval.k": ([], "eval.samples above 1 reports pass@k and majority@k for powers of two"),
    "eval.max_questions": (None, "eval.max_samples limits the questions of benchmarks too"),
    "hub.private": (
        True,
        "repositories are made private; CareTrainer.push_to_hub(private=False) makes others",
    ),
    "limits.collective": (7200.0, "the process group waits twice limits.step, at least two hours"),
    "limits.forward": (3600.0, _BY_STEP),
    "limits.generate": (3600.0, _BY_STEP),
    "limits.other": (3600.0, _BY_STEP),
    "limits.reward": (1800.0, _BY_STEP),
    "limits.save": (3600.0, _BY_STEP),
    "limits.start": (600.0, "ranks have 600 s to find each other"),
    "limits.sync": (1800.0, _BY_STEP),
    "limits.update": (3600.0, _BY_STEP),
    "logging.archive": (True, "logging.archive_gib=0 turns it off"),
    "logging.archive_max_gib": (20.0, "it is logging.archive_gib now"),
    "logging.tensorboard": (True, _TRACKERS),
    "logging.trackio": (False, _TRACKERS),
    "logging.wandb": (False, _TRACKERS),
    "loss.importance_beyond": ("truncate", "loss.importance_sampling=token_mask masks"),
    "loss.importance_cap": (2.0, "it is the second number of loss.importance_range"),
    "loss.importance_floor": (0.0, "it is the first number of loss.importance_range"),
    "loss.importance_over_cap": ("truncate", "loss.importance_sampling=token_mask masks"),
    "model.lora.dropout": (0.0, "without it the policy that is trained is the one that sampled"),
    "prompt.max_image_pixels": (50_000_000, "images have 50,000,000 pixels at most"),
    "reward.judge.concurrency": (16, "16 requests are made at a time"),
    "reward.judge.retries": (3, "a failed request is tried three times more"),
    "reward.judge.timeout": (60.0, "a request has 60 s"),
    "reward.timeout": (5.0, "a symbolic comparison has 5 s of a processor's time"),
    "reward.workers": (2, "symbolic answers are compared in two processes per rank"),
    "rollout.vllm.log_level": ("error", "set VLLM_LOGGING_LEVEL in the environment"),
    "rollout.vllm.server_timeout": (600.0, "an answer may take 600 s"),
    "rollout.vllm.server_token_file": (None, "set CARE_TRAIN_SERVER_TOKEN in the environment"),
    "rollout.vllm.sleep": (True, "vLLM frees its GPU memory while the policy trains"),
    "rollout.vllm.sleep_level": (2, "it is 1 under rollout.vllm.lora=adapter, else 2"),
    "rollout.vllm.sync_bucket_mib": (512, "512 MiB of weights are sent at once"),
    "sft.data.split": (None, f"{_BEHIND}sft.data.path"),
    "sft.data.revision": (None, f"{_BEHIND}sft.data.path"),
    "sft.eval_data.path": (None, "sft.eval_data is the path itself"),
    "sft.eval_data.max_samples": (None, "all rows of sft.eval_data are read"),
    "sft.max_grad_norm": (1.0, "gradients of the cold start have a norm of at most 1"),
    "sft.micro_batch_size": (64, f"train.micro_batch_size {_SHARED}"),
    "sft.micro_batch_tokens": (None, f"train.micro_batch_tokens {_SHARED}"),
    "sft.schedule": ("cosine", "the cold start's learning rate falls as a cosine"),
    "sft.weight_decay": (0.0, "the cold start has none"),
    "train.adam_betas": ([0.9, 0.999], "AdamW's betas are 0.9 and 0.999"),
    "train.max_resample_rounds": (3, "more prompts are drawn three times at most"),
    "train.min_learning_rate": (0.0, "cosine and linear schedules end at 0"),
}
"""Keys of runs and of builds, with the value that is built in now and what to say of another."""


def without_gone(values: Mapping[str, Any]) -> dict[str, Any]:
    """Nested settings without keys that are gone, where they say what this version does anyway.

    A run's config.yaml names every setting, so that an older one stays readable.

    Raises:
        ValueError: a key that is gone with another value; the message names what replaces it.
    """
    preset = PRESETS.get(str(values.get("preset")), PRESETS["default"])
    decisions = preset["care"]["decisions"]
    kept = {key: (getattr(decisions, name), _BY_PRESET) for key, name in _DECISIONS.items()}
    loss = TABLE_5.get(str(values.get("algorithm")), TABLE_5["care"])["loss"]
    kept["loss.surrogate"] = (
        loss.get("surrogate", "clip"),
        "algorithm=cispo and algorithm=sapo bring theirs",
    )
    kept |= _CONSTANTS
    faults: list[str] = []

    def left(section: Mapping[str, Any], prefix: str) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, value in section.items():
            key = f"{prefix}{name}"
            if key == "care.decisions":
                faults.append(f"{key}: got {value!r}, wanted no such key: preset sets them")
            elif key in kept:
                built_in, message = kept[key]
                if value != built_in:
                    faults.append(f"{key}: got {value!r}, but this setting is gone: {message}")
            elif isinstance(value, Mapping):
                below = left(value, f"{key}.")
                # What was a section is one value now: with all its keys gone it says nothing.
                if below or not value:
                    found[name] = below
            else:
                found[name] = value
        return found

    result = left(values, "")
    if faults:
        raise ValueError("\n".join(faults))
    return result
