"""What is said of a key that is unknown, and of a value that is wrong."""

import difflib
from collections.abc import Mapping
from typing import Any

from care_train.config.keys import find_key, list_keys
from care_train.config.run import Config

FOREIGN = {
    # TRL's GRPOConfig and transformers' TrainingArguments.
    "num_generations": "rollout.group_size",
    "max_completion_length": "rollout.max_new_tokens",
    "max_prompt_length": "prompt.max_prompt_tokens",
    "beta": "loss.kl_coef",
    "epsilon": "loss.clip_eps_low",
    "epsilon_high": "loss.clip_eps_high",
    "delta": "loss.dual_clip",
    "importance_sampling_level": "algorithm=gspo, whose ratio is one per sequence",
    "loss_type": "algorithm",
    "scale_rewards": "algorithm=dr_grpo, which does not divide by the standard deviation",
    "reward_funcs": "reward.functions",
    "reward_weights": "reward.functions.NAME.weight",
    "steps_per_generation": "train.mini_batches",
    "use_vllm": "rollout.engine=vllm",
    "vllm_mode": "rollout.vllm.server",
    "vllm_gpu_memory_utilization": "rollout.vllm.gpu_memory_utilization",
    "vllm_tensor_parallel_size": "rollout.vllm.tensor_parallel_size",
    "vllm_importance_sampling_correction": "loss.importance_sampling",
    "vllm_importance_sampling_cap": "loss.importance_range",
    "vllm_importance_sampling_clip_max": "loss.importance_range",
    "max_steps": "train.steps",
    "num_train_epochs": "train.steps: there are no epochs",
    "per_device_train_batch_size": "train.micro_batch_size",
    "gradient_accumulation_steps": "train.prompts_per_step: the step's sequences accumulate",
    "lr_scheduler_type": "train.schedule",
    "warmup_ratio": "train.warmup_steps",
    "system_prompt": "prompt.system",
    "use_peft": "model.lora.rank",
    "output_path": "output_dir",
    "save_steps": "train.save_every",
    "eval_steps": "train.eval_every",
    "save_total_limit": "train.keep_checkpoints",
    "report_to": "logging.report_to",
    "hub_model_id": "hub.push_to",
    "push_to_hub": "hub.push_to=ORG/NAME",
    "hub_private_repo": "hub.push_to, whose repositories are made private",
    "dataset_config": "data.path=ORG/NAME:CONFIG",
    "dataset_train_split": "data.path=PATH@SPLIT",
    "dataset_test_split": "eval.data=@SPLIT",
    "run_name": "name",
    "model_name_or_path": "model.path",
    "dataset_name": "data.path",
    "bf16": "model.dtype=bfloat16",
    "attn_implementation": "model.attention",
    "lora_r": "model.lora.rank",
    "lora_alpha": "model.lora.alpha",
    "lora_target_modules": "model.lora.target_modules",
    "use_liger_kernel": "model.liger",
    # verl and EasyR1, whose keys stand in sections: the last part, or the whole.
    "lr": "train.learning_rate",
    "optim.lr": "train.learning_rate",
    "lr_warmup_steps": "train.warmup_steps",
    "clip_ratio": "loss.clip_eps_low and loss.clip_eps_high",
    "clip_ratio_low": "loss.clip_eps_low",
    "clip_ratio_high": "loss.clip_eps_high",
    "clip_ratio_c": "loss.dual_clip",
    "clip_ratio_dual": "loss.dual_clip",
    "grad_clip": "train.max_grad_norm",
    "norm_adv_by_std_in_grpo": "algorithm=dr_grpo, which does not divide by the standard deviation",
    "use_kl_in_reward": "loss.kl_coef: the KL is in the loss, never in the reward",
    "rollout_is": "loss.importance_sampling",
    "rollout_is_threshold": "loss.importance_range",
    "rollout_rs": "loss.importance_sampling, as token_mask, sequence_mask or geometric_mask",
    "lora_rank": "model.lora.rank",
    "val_kwargs.temperature": "eval.decode",
    "reward_manager.name": "reward.functions.NAME.function",
    "default_local_dir": "output_dir",
    "resume_mode": "resume",
    "kl_loss_coef": "loss.kl_coef",
    "use_kl_loss": "loss.kl_coef",
    "disable_kl": "loss.kl_coef=0",
    "kl_loss_type": "loss.kl_estimator",
    "kl_penalty": "loss.kl_estimator",
    "entropy_coeff": "loss.entropy_coef",
    "loss_agg_mode": "loss.aggregation",
    "adv_estimator": "algorithm",
    "ppo_epochs": "train.num_iterations",
    "ppo_mini_batch_size": "train.mini_batches, which is how many there are",
    "global_batch_size": "train.mini_batches, which is how many there are",
    "ppo_micro_batch_size_per_gpu": "train.micro_batch_size",
    "micro_batch_size_per_device_for_update": "train.micro_batch_size",
    "ppo_max_token_len_per_gpu": "train.micro_batch_tokens",
    "use_dynamic_bsz": "train.micro_batch_tokens",
    "use_remove_padding": "train.packing",
    "padding_free": "train.packing",
    "enable_gradient_checkpointing": "train.gradient_checkpointing",
    "freeze_vision_tower": "model.train_vision=false",
    "max_pixels": "model.image_pixels",
    "min_pixels": "model.image_pixels, as [MIN, MAX]",
    "rollout_batch_size": "train.prompts_per_step",
    "train_batch_size": "train.prompts_per_step",
    "train_files": "data.path",
    "val_files": "eval.data",
    "max_response_length": "rollout.max_new_tokens",
    "rollout.n": "rollout.group_size",
    "worker.rollout.n": "rollout.group_size",
    "online_filtering": "train.dynamic_sampling",
    "filter_groups": "train.dynamic_sampling",
    "save_freq": "train.save_every",
    "test_freq": "train.eval_every",
    "val_freq": "train.eval_every",
    "save_limit": "train.keep_checkpoints",
    "total_training_steps": "train.steps",
    "total_epochs": "train.steps: there are no epochs",
    "logger": "logging.report_to",
    "project_name": "logging.project",
    "experiment_name": "name",
    "reward_function": "reward.functions.NAME.function",
    "custom_reward_function.path": "reward.functions.NAME.function",
    "custom_reward_function.name": "reward.functions.NAME.function",
    "model_path": "model.path",
    "mask_truncated_completions": "loss.mask_truncated",
    "use_bias_correction_kl": "loss.kl_estimator",
    "vllm_importance_sampling_mode": "loss.importance_sampling",
    "format_prompt": "prompt.suffix",
}
"""Names that other trainers use, with what they are here."""


def explain(error: Any, root: type) -> str:
    """One of pydantic's errors as `key: got X, wanted Y`."""
    path = [str(part) for part in error["loc"]]
    if error["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        names = _names_below(".".join(path), error["input"])
        return "\n".join(unknown_key(name, root) for name in names)
    if error["type"] == "value_error":
        return str(error["ctx"]["error"])
    if error["type"].startswith("missing"):
        return f"{'.'.join(path)}: got nothing, wanted {_wanted(path, root)}"
    while len(path) > 1 and find_key(_schema_name(path), root) is None:
        # Behind the key pydantic names the branch of a union, or the place in a list.
        path.pop()
    key = find_key(_schema_name(path), root)
    given = error["input"]
    if key and not key.is_section and key.wanted != "keys" and given and isinstance(given, Mapping):
        # verl has a section where there is a setting here: `algorithm.adv_estimator`.
        names = _names_below(".".join(path), given)
        return "\n".join(unknown_key(name, root) for name in names)
    return f"{'.'.join(path)}: got {given!r}, wanted {_wanted(path, root)}"


def _wanted(path: list[str], root: type) -> str:
    key = find_key(_schema_name(path), root)
    if key is None:
        return "another value"
    if key.is_section:
        below = next(k.name for k in list_keys(root) if k.name.startswith(f"{key.name}."))
        return f"{key.wanted}, such as {below.rpartition('.')[2]}: ..."
    return f"{key.wanted} ({key.summary})"


def _schema_name(path: list[str]) -> str:
    return ".".join("NAME" if part.isdigit() else part for part in path)


def _names_below(name: str, value: object) -> list[str]:
    """Of an unknown section all that is set in it."""
    if not isinstance(value, Mapping) or not value:
        return [name]
    return [below for key in value for below in _names_below(f"{name}.{key}", value[key])]


def unknown_key(key: str, root: type) -> str:
    """What is said of a key that there is none of: the one of this name here, or a close one."""
    command = "train" if root is Config else "data build"
    known = [entry.name for entry in list_keys(root)]
    parts = key.split(".")
    ends = [".".join(parts[start:]) for start in range(len(parts))]
    foreign = next((FOREIGN[end] for end in ends if end in FOREIGN), None)
    same = [name for name in known if name.split(".")[-1] == parts[-1]]
    same.sort(key=lambda name: not name.startswith("train."))
    close = same if len(parts) == 1 else []
    close = close or difflib.get_close_matches(key, known, n=1, cutoff=0.8)
    close = close or same or difflib.get_close_matches(key, known, n=1, cutoff=0.6)
    if foreign is not None and root is Config:
        hint = f"; here it is {foreign}"
    else:
        hint = f"; did you mean {close[0]!r}?" if close else ""
    return f"unknown key {key!r}{hint} (`care-train {command} --help-all` lists all keys)"
