"""What `--help` and `--help-all` say of the settings."""

import textwrap
from collections.abc import Sequence

from care_train.config.base import Role
from care_train.config.keys import find_key, list_keys
from care_train.config.run import Config

COMMON = (
    "name",
    "output_dir",
    "seed",
    "algorithm",
    "preset",
    "overwrite",
    "model.path",
    "model.dtype",
    "model.attention",
    "model.max_pixels",
    "model.lora.rank",
    "prompt.system",
    "prompt.think_tag",
    "prompt.max_prompt_tokens",
    "data.path",
    "data.max_samples",
    "rollout.engine",
    "rollout.group_size",
    "rollout.temperature",
    "rollout.top_p",
    "rollout.max_new_tokens",
    "rollout.batch_size",
    "rollout.vllm.server",
    "rollout.vllm.gpu_memory_utilization",
    "reward.format_weight",
    "reward.functions",
    "care.max_negatives",
    "care.selector",
    "care.neg_scale",
    "care.think_weight",
    "care.reflection.enabled",
    "care.reflection.cue",
    "care.rescue",
    "loss.clip_eps_low",
    "loss.clip_eps_high",
    "loss.kl_coef",
    "loss.kl_estimator",
    "loss.aggregation",
    "train.steps",
    "train.prompts_per_step",
    "train.micro_batch_size",
    "train.micro_batch_tokens",
    "train.gradient_checkpointing",
    "train.learning_rate",
    "train.warmup_steps",
    "train.save_every",
    "train.eval_every",
    "sft.data.path",
    "sft.steps",
    "sft.batch_size",
    "sft.learning_rate",
    "eval.data",
    "eval.benchmarks",
    "eval.seeds",
    "deepspeed.zero_stage",
    "logging.report_to",
)
"""What most runs set: the keys of the short help."""

_WIDTH, _COLUMN = 98, 44


def short_help(sections: Sequence[str]) -> str:
    """The common settings of these sections, one line each.

    Args:
        sections: names of `Config`'s sections; "" for the settings that stand in none.
    """
    lines = ["settings (key=default; --help-all shows all, with types, ranges and whole texts):"]
    for name in COMMON:
        if name.partition(".")[0] in sections or ("" in sections and "." not in name):
            key = find_key(name)
            assert key is not None, name
            default = key.default if len(key.default) <= 20 else key.default[:17] + "..."
            left = f"  {name}={default} ".ljust(_COLUMN)
            lines += textwrap.wrap(
                left + key.summary,
                _WIDTH,
                subsequent_indent=" " * _COLUMN,
                max_lines=2,
                placeholder=" ...",
                break_on_hyphens=False,
            )
    return "\n".join(lines)


def full_help(root: type = Config) -> str:
    """Every setting with default, type, bounds, role on resume and meaning."""
    lines = ["settings: key = default (type and range; what a resumed run may do), meaning:"]
    for key in list_keys(root):
        role = f"; on resume: {_ROLES[key.role]}" if root is Config else ""
        lines.append(f"{key.name} = {key.default}  ({key.wanted}{role})")
        lines += textwrap.wrap(key.meaning, _WIDTH, initial_indent="    ", subsequent_indent="    ")
    return "\n".join(lines)


_ROLES = {
    Role.DECIDES: "as it was, or named in allow_changes",
    Role.SPEED: "as it was, or named in allow_changes; an evaluation may change it",
    Role.FIXED: "as it was",
    Role.FREE: "free",
}
