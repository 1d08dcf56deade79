"""Every setting as a key: its type, bounds, default, meaning and role, and what help says of it."""

import re
import textwrap
import types
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from care_train.config.base import Role
from care_train.config.run import Config

_NAMES = {int: "an integer", float: "a number", bool: "true or false", str: "text", dict: "keys"}
_PLURALS = _NAMES | {int: "integers", float: "numbers"}
_BOUNDS = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}


@dataclass(frozen=True)
class Key:
    """One setting."""

    name: str
    """Dotted: `train.steps`."""
    wanted: str
    """Type and bounds in words, as help and errors show them."""
    default: str
    meaning: str
    role: Role
    is_nullable: bool
    is_section: bool
    """Whether it holds other keys; it is a setting of its own only where it may be null."""

    @property
    def summary(self) -> str:
        """The meaning's first sentence, without its full stop."""
        return re.split(r"\.(?: (?=[A-Z`])|$)", self.meaning, maxsplit=1)[0]


def list_keys(root: type = Config) -> list[Key]:
    """All settings below a section, in order; entries of a list stand under `NAME`."""
    return [key for key in _all_keys(root).values() if not key.is_section or key.default]


def find_key(name: str, root: type = Config) -> Key | None:
    """The setting or section of that name."""
    return _all_keys(root).get(name)


def role_of(name: str, root: type = Config) -> Role:
    """What a setting may do to a resumed run; a key below a free mapping has the mapping's role.

    Raises:
        ValueError: there is no such setting.
    """
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        if key := find_key(".".join(parts[:end]), root):
            return key.role
    raise ValueError(f"{name}: no such setting")


@cache
def _all_keys(root: type) -> dict[str, Key]:
    return {key.name: key for key in _walk(root, "", Role.DECIDES)}


def _walk(section: Any, prefix: str, role: Role) -> Iterator[Key]:
    for name, info in section.__pydantic_fields__.items():
        if info.exclude:
            continue
        own = next((m for m in info.metadata if isinstance(m, Role)), role)
        nested, is_list = _section_in(info.annotation)
        is_nullable = type(None) in get_args(info.annotation)
        value = info.get_default(call_default_factory=True)
        default = "required" if info.is_required() else _shown(value)
        yield Key(
            name=f"{prefix}{name}",
            wanted=_words(info.annotation) + _bounds(info.annotation, info.metadata),
            default="" if nested and not (is_list or is_nullable) else default,
            meaning=" ".join((info.description or "").split()),
            role=own,
            is_nullable=is_nullable,
            is_section=nested is not None,
        )
        if nested is not None:
            yield from _walk(nested, f"{prefix}{name}." + ("NAME." if is_list else ""), own)


def _shown(value: object) -> str:
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    return str(value) or "''"


def _section_in(annotation: Any) -> tuple[type | None, bool]:
    """The section that a field holds, and whether it is a list of them."""
    if isinstance(annotation, type) and hasattr(annotation, "__pydantic_fields__"):
        return annotation, False
    for part in get_args(annotation):
        nested, is_list = _section_in(part)
        if nested is not None:
            return nested, is_list or get_origin(annotation) is list
    return None, False


def _words(annotation: Any, names: Mapping[Any, str] = _NAMES) -> str:
    """A type in words: `an integer, at least 1, or null`."""
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        if parts[0] is str:
            return "a share such as 50%"
        return _words(parts[0], names) + _bounds(parts[0], parts[1:])
    if origin in (Union, types.UnionType):
        shown = [_words(part) for part in parts if part is not type(None)]
        return " or ".join(shown + ["null"] * (type(None) in parts))
    if origin is Literal:
        return " | ".join(str(part) for part in parts)
    if origin is list:
        return f"a list of {_words(parts[0], _PLURALS)}"
    return names.get(origin or annotation, "keys")


def _bounds(number: Any, metadata: Iterable[Any]) -> str:
    """`, above 0`, `, at least 1`, ` in [0, 0.5)`; of a list `, not empty`, `, 2 of them`."""
    found: dict[str, Any] = {}
    names = (*_BOUNDS, "min_length", "max_length")
    for entry in metadata:
        for item in (entry, *getattr(entry, "metadata", ())):
            found |= {name: getattr(item, name) for name in names if hasattr(item, name)}
    least, most = found.pop("min_length", 0), found.pop("max_length", None)
    if least:
        return f", {least} of them" if least == most else ", not empty"
    low, high = found.keys() & {"ge", "gt"}, found.keys() & {"le", "lt"}
    if low and high:
        opening, closing = "[" if "ge" in low else "(", "]" if "le" in high else ")"
        return f" in {opening}{found[low.pop()]:g}, {found[high.pop()]:g}{closing}"
    if number is int and "gt" in found:
        found = {"ge": found["gt"] + 1}
    return "".join(f", {_BOUNDS[name]} {value:g}" for name, value in found.items())


COMMON = """
name output_dir seed algorithm preset overwrite
model.path model.dtype model.attention model.image_pixels model.lora.rank
prompt.system prompt.tags prompt.max_prompt_tokens
data.path data.max_samples
rollout.engine rollout.group_size rollout.temperature rollout.top_p rollout.max_new_tokens
rollout.batch_size rollout.vllm.server rollout.vllm.gpu_memory_utilization
reward.format_weight reward.functions
care.max_negatives care.selector care.neg_scale care.think_weight
care.reflection.negative care.reflection.cue care.rescue
loss.clip_eps_low loss.clip_eps_high loss.kl_coef loss.kl_estimator loss.aggregation
train.steps train.prompts_per_step train.micro_batch_size train.micro_batch_tokens
train.gradient_checkpointing train.learning_rate train.warmup_steps
train.save_every train.eval_every
sft.data.path sft.steps sft.batch_size sft.learning_rate
eval.data eval.benchmarks eval.seeds
deepspeed.zero_stage
logging.report_to
""".split()
"""What most runs set: the keys of the short help."""

_WIDTH, _COLUMN = 98, 44


def short_help(sections: Sequence[str]) -> str:
    """The common settings of these sections, one line each.

    Args:
        sections: names of `Config`'s sections, "" for the settings that stand in none; or of single
            settings.
    """
    lines = ["settings (key=default; --help-all shows all, with types, ranges and whole texts):"]
    for name in COMMON:
        section = name.partition(".")[0] if "." in name else ""
        if section in sections or name in sections:
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
    """Every setting with default, type, bounds, meaning, and its role on resume where it is another
    than most."""
    lines = ["settings: key = default (type and range), meaning"]
    if root is Config:
        lines += textwrap.wrap(
            "A run that is resumed (--resume) takes another value only of the keys that "
            "allow_changes names, unless it says here what it may do:",
            _WIDTH,
        )
    for key in list_keys(root):
        role = _ROLES.get(key.role, "") if root is Config else ""
        lines.append(f"{key.name} = {key.default}  ({key.wanted}{role})")
        lines += textwrap.wrap(key.meaning, _WIDTH, initial_indent="    ", subsequent_indent="    ")
    return "\n".join(lines)


_ROLES = {
    Role.SPEED: "; on resume an evaluation may change it",
    Role.FIXED: "; on resume as it was",
    Role.FREE: "; on resume free",
}
