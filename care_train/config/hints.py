"""What is said of a key that is unknown, and of a value that is wrong."""

import difflib
from collections.abc import Mapping
from typing import Any

from care_train.config.keys import find_key, list_keys
from care_train.config.run import Config

_OTHERS = {
    "name": "run_name experiment_name",
    "output_dir": "output_path default_local_dir",
    "algorithm": "loss_type adv_estimator",
    "algorithm=gspo, whose ratio is one per sequence": "importance_sampling_level",
    "algorithm=dr_grpo, which does not divide by the standard deviation": (
        "scale_rewards norm_adv_by_std_in_grpo"
    ),
    "resume": "resume_mode",
    "model.path": "model_name_or_path model_path",
    "model.dtype=bfloat16": "bf16",
    "model.attention": "attn_implementation",
    "model.liger": "use_liger_kernel",
    "model.image_pixels": "max_pixels",
    "model.image_pixels, as [MIN, MAX]": "min_pixels",
    "model.train_vision=false": "freeze_vision_tower",
    "model.lora.rank": "use_peft lora_r lora_rank",
    "model.lora.alpha": "lora_alpha",
    "model.lora.target_modules": "lora_target_modules",
    "prompt.system": "system_prompt",
    "prompt.suffix": "format_prompt",
    "prompt.max_prompt_tokens": "max_prompt_length",
    "data.path": "dataset_name train_files",
    "data.path=PATH@SPLIT": "dataset_train_split",
    "data.path=ORG/NAME:CONFIG": "dataset_config",
    "rollout.engine=vllm": "use_vllm",
    "rollout.group_size": "num_generations rollout.n worker.rollout.n",
    "rollout.max_new_tokens": "max_completion_length max_response_length",
    "rollout.vllm.server": "vllm_mode",
    "rollout.vllm.gpu_memory_utilization": "vllm_gpu_memory_utilization",
    "rollout.vllm.tensor_parallel_size": "vllm_tensor_parallel_size",
    "reward.functions": "reward_funcs",
    "reward.functions.NAME.function": (
        "reward_manager.name reward_function custom_reward_function.path "
        "custom_reward_function.name"
    ),
    "reward.functions.NAME.weight": "reward_weights",
    "loss.clip_eps_low": "epsilon clip_ratio_low",
    "loss.clip_eps_low and loss.clip_eps_high": "clip_ratio",
    "loss.clip_eps_high": "epsilon_high clip_ratio_high",
    "loss.dual_clip": "delta clip_ratio_c clip_ratio_dual",
    "loss.kl_coef": "beta kl_loss_coef use_kl_loss",
    "loss.kl_coef=0": "disable_kl",
    "loss.kl_coef: the KL is in the loss, never in the reward": "use_kl_in_reward",
    "loss.kl_estimator": "kl_loss_type kl_penalty use_bias_correction_kl",
    "loss.entropy_coef": "entropy_coeff",
    "loss.aggregation": "loss_agg_mode",
    "loss.mask_truncated": "mask_truncated_completions",
    "loss.importance_sampling": (
        "vllm_importance_sampling_correction rollout_is vllm_importance_sampling_mode"
    ),
    "loss.importance_sampling, as token_mask, sequence_mask or geometric_mask": "rollout_rs",
    "loss.importance_range": (
        "vllm_importance_sampling_cap vllm_importance_sampling_clip_max rollout_is_threshold"
    ),
    "train.steps": "max_steps total_training_steps",
    "train.steps: there are no epochs": "num_train_epochs total_epochs",
    "train.learning_rate": "lr optim.lr",
    "train.warmup_steps": "warmup_ratio lr_warmup_steps",
    "train.save_every": "save_steps save_freq",
    "train.eval_every": "eval_steps test_freq val_freq",
    "train.schedule": "lr_scheduler_type",
    "train.max_grad_norm": "grad_clip",
    "train.prompts_per_step": "rollout_batch_size train_batch_size",
    "train.prompts_per_step: the step's sequences accumulate": "gradient_accumulation_steps",
    "train.num_iterations": "ppo_epochs",
    "train.mini_batches": "steps_per_generation",
    "train.mini_batches, which is how many there are": "ppo_mini_batch_size global_batch_size",
    "train.micro_batch_size": (
        "per_device_train_batch_size ppo_micro_batch_size_per_gpu "
        "micro_batch_size_per_device_for_update"
    ),
    "train.micro_batch_tokens": "ppo_max_token_len_per_gpu use_dynamic_bsz",
    "train.packing": "use_remove_padding padding_free",
    "train.gradient_checkpointing": "enable_gradient_checkpointing",
    "train.dynamic_sampling": "online_filtering filter_groups",
    "train.keep_checkpoints": "save_total_limit save_limit",
    "eval.data": "val_files",
    "eval.data=@SPLIT": "dataset_test_split",
    "eval.decode": "val_kwargs.temperature",
    "hub.push_to": "hub_model_id",
    "hub.push_to=ORG/NAME": "push_to_hub",
    "hub.push_to, whose repositories are made private": "hub_private_repo",
    "logging.report_to": "report_to logger",
    "logging.project": "project_name",
}
"""What TRL, transformers, verl and EasyR1 call a setting: the name alone, or with its section."""

FOREIGN = {name: ours for ours, names in _OTHERS.items() for name in names.split()}
"""The other way round: names that other trainers use, with what they are here."""


def explain(error: Any, root: type) -> str:
    """One of pydantic's errors as `key: got X, wanted Y`."""
    path, given = [str(part) for part in error["loc"]], error["input"]
    if error["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        return _unknown_keys(path, given, root)
    if error["type"] == "value_error":
        return str(error["ctx"]["error"])
    if error["type"].startswith("missing"):
        return f"{'.'.join(path)}: got nothing, wanted {_wanted(path, root)}"
    while len(path) > 1 and find_key(_schema_name(path), root) is None:
        # Behind the key pydantic names the branch of a union, or the place in a list.
        path.pop()
    key = find_key(_schema_name(path), root)
    if key and not key.is_section and key.wanted != "keys" and given and isinstance(given, Mapping):
        # verl has a section where there is a setting here: `algorithm.adv_estimator`.
        return _unknown_keys(path, given, root)
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


def _unknown_keys(path: list[str], value: object, root: type) -> str:
    """`unknown_key` of all that is set in an unknown section, or of the key itself."""
    if not isinstance(value, Mapping) or not value:
        return unknown_key(".".join(path), root)
    return "\n".join(_unknown_keys([*path, str(key)], value[key], root) for key in value)


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
