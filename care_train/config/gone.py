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
_PIXELS = "model.image_pixels is the largest area, or [smallest, largest]"
_TAGS = "prompt.tags=[think, answer] names both, prompt.tags=[think, boxed] reads \\boxed{}"
_ALSO = "eval.also lists greedy and blind"
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
    "care.reflection.enabled": (True, "care.reflection.negative=none turns reflection off"),
    "care.think_share": (None, "care.think_weight=50% is a share of 0.5"),
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
    "eval.blind": (False, _ALSO),
    "eval.greedy": (True, _ALSO),
    "eval.k": ([], "eval.samples above 1 reports pass@k and majority@k for powers of two"),
    "eval.max_questions": (None, "eval.max_samples limits the questions of benchmarks too"),
    "hub.private": (True, "it is private; CareTrainer.push_to_hub(private=False) makes others"),
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
    "logging.progress": (True, "logs have a line per step, and terminals with TERM=dumb"),
    "logging.tensorboard": (True, _TRACKERS),
    "logging.trackio": (False, _TRACKERS),
    "logging.wandb": (False, _TRACKERS),
    "loss.importance_beyond": ("truncate", "loss.importance_sampling=token_mask masks"),
    "loss.importance_cap": (2.0, "it is the second number of loss.importance_range"),
    "loss.importance_floor": (0.0, "it is the first number of loss.importance_range"),
    "loss.importance_over_cap": ("truncate", "loss.importance_sampling=token_mask masks"),
    "model.lora": (None, "model.lora.rank=0 is no adapters"),
    "model.lora.dropout": (0.0, "without it the policy that is trained is the one that sampled"),
    "model.lora.vision": (False, "model.train_vision=true gives the vision tower adapters too"),
    "model.max_pixels": (None, _PIXELS),
    "model.min_pixels": (None, _PIXELS),
    "prompt.answer_tag": ("answer", _TAGS),
    "prompt.think_tag": ("think", _TAGS),
    "prompt.max_image_pixels": (50_000_000, "images have 50,000,000 pixels at most"),
    "reward.answer": ("tags", _TAGS),
    "reward.judge": (None, "reward.judge.base_url=null is no judge"),
    "reward.judge.api_key_env": ("OPENAI_API_KEY", "set CARE_TRAIN_KEYS=MY_KEY@https://host"),
    "reward.judge.concurrency": (16, "16 requests are made at a time"),
    "reward.judge.max_tokens": (512, "a reply has 2,048 tokens at most"),
    "reward.judge.retries": (3, "a failed request is tried three times more"),
    "reward.judge.timeout": (60.0, "a request has 60 s"),
    "reward.timeout": (5.0, "a symbolic comparison has 5 s of a processor's time"),
    "reward.verifier_weight": (None, "give reward.functions.verifier=care_train:verifier a weight"),
    "reward.workers": (2, "symbolic answers are compared in two processes per rank"),
    "rollout.vllm.kv_cache_gib": (None, "gpu_memory_utilization, or $VLLM_CPU_KVCACHE_SPACE"),
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
    "sft.eval_every": (0, f"train.eval_every {_SHARED}"),
    "sft.max_grad_norm": (1.0, "gradients of the cold start have a norm of at most 1"),
    "sft.micro_batch_size": (64, f"train.micro_batch_size {_SHARED}"),
    "sft.micro_batch_tokens": (None, f"train.micro_batch_tokens {_SHARED}"),
    "sft.save_every": (0, f"train.save_every {_SHARED}"),
    "sft.schedule": ("cosine", "the cold start's learning rate falls as a cosine"),
    "sft.warmup_steps": (10, f"train.warmup_steps {_SHARED}"),
    "sft.weight_decay": (0.0, "the cold start has none"),
    "train.adam_betas": ([0.9, 0.999], "AdamW's betas are 0.9 and 0.999"),
    "train.freeze_vision": (False, "model.train_vision=false trains the language model alone"),
    "train.max_resample_rounds": (3, "more prompts are drawn three times at most"),
    "train.min_learning_rate": (0.0, "cosine and linear schedules end at 0"),
}
"""Keys of runs and of builds, with the value that is built in now and what to say of another."""
_LORA = {"alpha", "target_modules", "modules_to_save"}
"""Keys of `model.lora` that need a rank beside."""
_OFFICIAL = {"model.min_pixels": 262_144, "model.max_pixels": 4_194_304, "reward.answer": "boxed"}
"""Those that the preset `official` set."""


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
    trained_behind = "full" if decisions.repair == "rationale" else "x_only"
    kept["care.reflection.context"] = (trained_behind, _BY_PRESET)
    kept["loss.ratio_level"] = (
        loss.get("ratio_level", "token"),
        "algorithm=gspo has one ratio per sequence, the others one per token",
    )
    kept |= _CONSTANTS
    if values.get("preset") == "official":
        kept |= {key: (value, kept[key][1]) for key, value in _OFFICIAL.items()}
    faults: list[str] = []

    def left(section: Mapping[str, Any], prefix: str) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, value in section.items():
            key = f"{prefix}{name}"
            if key == "care.decisions":
                faults.append(f"{key}: got {value!r}, wanted no such key: preset sets them")
            elif key == "model.lora" and isinstance(value, Mapping) and value.keys() <= _LORA:
                # Any of them turned adapters on, of rank 16.
                faults.append(f"{key}: got {dict(value)!r}, wanted rank in it, or 0 is its value")
            elif key in kept and not isinstance(value, Mapping):
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
