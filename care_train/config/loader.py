"""Read a configuration: defaults, the algorithm's and the preset's, YAML, then `a.b=c`."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import TypeAdapter, ValidationError

from care_train.config.base import check
from care_train.config.care import PRESETS, TABLE_5
from care_train.config.data import BuildSettings
from care_train.config.hints import explain, unknown_key
from care_train.config.keys import find_key
from care_train.config.run import Config
from care_train.config.yaml_file import parse_value, read_yaml

T = TypeVar("T")

_ENTRY_NAMES: dict[str, Callable[[Mapping[str, Any]], str]] = {
    "sources": lambda entry: str(entry.get("name")),
    "reward.functions": lambda entry: str(entry.get("function")).rpartition(":")[2],
}
"""Lists of sections, and what an entry is called where `LIST.NAME.key=value` changes it."""


def load_config(path: str | Path | None = None, overrides: Sequence[str] = ()) -> Config:
    """The configuration of a run.

    Args:
        path: a YAML file, or None for the defaults. Its `extends` names a file it is laid over.
        overrides: `section.key=value` strings; values are read as YAML. `resume=FOLDER` goes on
            with the run there: it sets `output_dir` and `name`, and stands in for `path`.
            `deepspeed=NAME`, like `deepspeed: NAME` in a file, takes that section from a file.

    Raises:
        ValueError: an unreadable file, an unknown key, or a wrong value: key, got and wanted.
    """
    layers = [_layer(override) for override in overrides]
    if (run := _named_run(layers)) is not None:
        if run.name in ("", "..") or run.is_symlink():
            run = run.resolve()
        path = run / "config.yaml" if path is None else path
        if not (run / "config.yaml").is_file():
            raise ValueError(f"resume: {run}: no config.yaml there, so no run to go on with")
        layers.append({"resume": True, "output_dir": str(run.parent), "name": run.name})
    values = {} if path is None else _read(config_file(path))
    for layer in layers:
        values = _lay(values, layer)
    return build_config(values, source=_source(path, overrides))


def merge_config(path: str | Path | None, settings: Mapping[str, Any]) -> Config:
    """The configuration of a file with nested mappings laid over it; errors as `load_config`'s."""
    values = {} if path is None else _read(config_file(path))
    return build_config(_lay(values, settings), source=str(path or "settings"))


def config_files(path: Path | None, overrides: Sequence[str] = ()) -> dict[str, Path]:
    """The user's files that `load_config` reads, by what names them."""
    files: dict[str, Path] = {}
    layers = [_layer(override) for override in overrides]
    key = "--config"
    while path is not None:
        files[key] = path = config_file(path)
        layers.append(read_yaml(path, _is_section()))
        base = layers[-1].get("extends")
        key, path = f"extends in {path}", None if base is None else path.parent / base
    for section in layers:
        if isinstance(name := section.get("deepspeed"), str):
            files[f"deepspeed={name}"] = _deepspeed_file(name)
    return files


def load_build_settings(path: str | Path, overrides: Sequence[str] = ()) -> BuildSettings:
    """The settings of `care-train data build`; arguments and errors as `load_config`'s.

    `sources.NAME.key=value` changes the source of that name.
    """
    values = _read(config_file(path), BuildSettings)
    for override in overrides:
        values = _lay(values, _layer(override, BuildSettings))
    return _validated(BuildSettings, values, _source(path, overrides))


def _source(path: str | Path | None, overrides: Sequence[str]) -> str:
    """Where values come from, for errors."""
    if path is None:
        return "the command line"
    return f"{path} and the command line" if overrides else str(path)


def names_run(overrides: Sequence[str]) -> bool:
    """Whether they say `resume=FOLDER`, whose config.yaml then is the configuration."""
    return _named_run([_layer(override) for override in overrides]) is not None


def _named_run(layers: Sequence[Mapping[str, Any]]) -> Path | None:
    resume = [layer["resume"] for layer in layers if "resume" in layer]
    return Path(resume[-1]) if resume and isinstance(resume[-1], str) else None


def build_config(values: Mapping[str, Any], source: str = "the configuration") -> Config:
    """A checked `Config` from nested mappings over the algorithm's and the preset's values."""
    algorithm, preset = str(values.get("algorithm", "care")), str(values.get("preset", "default"))
    layered = merge(TABLE_5.get(algorithm, {}), PRESETS.get(preset, {}))
    return _validated(Config, values, source, layered)


def config_to_yaml(config: Config) -> str:
    """The resolved configuration, readable by `load_config`."""
    values = TypeAdapter(Config).dump_python(config, mode="json")
    return yaml.safe_dump(values, sort_keys=False)


def config_to_dict(config: Config) -> dict[str, Any]:
    """The resolved configuration as nested plain values."""
    return asdict(config)


def dotted(section: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested values by dotted key."""
    found: dict[str, Any] = {}
    for key, value in section.items():
        name = f"{prefix}{key}"
        found |= dotted(value, f"{name}.") if isinstance(value, Mapping) else {name: value}
    return found


def merge(base: Mapping[str, Any], top: Mapping[str, Any]) -> dict[str, Any]:
    """`top` laid over `base`, mapping by mapping."""
    merged = dict(base)
    for key, value in top.items():
        below = merged.get(key)
        if isinstance(value, Mapping) and isinstance(below, Mapping):
            value = merge(below, value)
        merged[key] = value
    return merged


def configs_folder() -> Path:
    """Where the shipped configurations are."""
    package = Path(__file__).resolve().parents[1]
    # Wheels carry configs/ inside the package; a checkout has it beside.
    return next(r / "configs" for r in (package, package.parent) if (r / "configs").is_dir())


def _validated(
    root: type[T], values: Mapping[str, Any], source: str, below: Mapping[str, Any] | None = None
) -> T:
    """`values` laid over those `below`, as settings; errors name where they come from."""
    try:
        for key in ("care.decisions", "model.lora.vision"):  # fields that other keys set
            if _at(values, key) is not None:
                raise ValueError(unknown_key(key, root))
        layered = _with_nulls(merge(below or {}, values), "", root)
        settings = TypeAdapter(root).validate_python(layered)
        lora = _at(values, "model.lora")
        check(not lora or "rank" in lora, "model.lora", lora, "rank in it: adapters, or 0 for none")
        return settings
    except ValidationError as error:
        # A union names its branches one by one.
        lines = dict.fromkeys(explain(item, root) for item in error.errors())
        raise ValueError(f"{source}: " + "\n".join(lines)) from None
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from None


def _read(path: Path, root: type = Config, above: tuple[Path, ...] = ()) -> dict[str, Any]:
    """A file's values over those of the file that it extends; `above` are those that extend it."""
    above = (*above, path.resolve())
    if above[-1] in above[:-1]:
        circle = " extends ".join(map(str, above[above.index(above[-1]) :]))
        raise ValueError(f"extends: {circle}: wanted files that end in one without it")
    values = read_yaml(path, _is_section(root))
    base = values.pop("extends", None)
    return _lay({} if base is None else _read(path.parent / base, root, above), values)


def config_file(path: str | Path) -> Path:
    """The file itself, or where there is none, the shipped one of this name: `care`, `data/rl`."""
    path, folder = Path(path), configs_folder()
    if path.exists() or path.suffix:
        return path
    shipped = {file.relative_to(folder).with_suffix(""): file for file in folder.rglob("*.yaml")}
    if path not in shipped:
        known = ", ".join(sorted(name.as_posix() for name in shipped))
        raise ValueError(f"--config: got {path}, wanted a YAML file or one of {known}")
    return shipped[path]


def _is_section(root: type = Config, prefix: str = "") -> Callable[[str], bool]:
    def is_section(name: str) -> bool:
        key = find_key(prefix + name, root) if name else None
        return not name or (key is not None and key.is_section)

    return is_section


def _lay(base: Mapping[str, Any], top: Mapping[str, Any]) -> dict[str, Any]:
    """`merge`, where a `deepspeed` that is a name replaces the whole section by a file's, and
    changes by name become a list's entries."""
    name = top.get("deepspeed")
    if isinstance(name, str):
        base = {**base, "deepspeed": {}}
        section = read_yaml(_deepspeed_file(name), _is_section(Config, "deepspeed."))
        top = {**top, "deepspeed": section}
    for path, name_of in _ENTRY_NAMES.items():
        changes = _at(top, path)
        if isinstance(changes, Mapping):
            entries = _lay_entries(path, _at(base, path) or [], changes, name_of)
            top = merge(top, _nest(path.split("."), entries))
    return merge(base, top)


def _at(values: Mapping[str, Any], path: str) -> Any:
    found: Any = values
    for part in path.split("."):
        found = found.get(part) if isinstance(found, Mapping) else None
    return found


def _lay_entries(
    path: str,
    entries: Sequence[Mapping[str, Any]],
    changes: Mapping[str, Any],
    name_of: Callable[[Mapping[str, Any]], str],
) -> list[dict[str, Any]]:
    """Each entry with what `changes` says under its name; new reward functions are added."""
    laid = {name_of(entry): dict(entry) for entry in entries}
    for name, change in changes.items():
        if path == "reward.functions" and isinstance(change, str):
            change = {"function": change}
        is_new = name not in laid and path == "reward.functions"
        if not isinstance(change, Mapping) or (is_new and "function" not in change):
            wanted = f"{path}.{name}.key=value"
            wanted += f" or {path}.{name}=file.py:function" if path == "reward.functions" else ""
            raise ValueError(f"{path}.{name}: got {change!r}, wanted {wanted}")
        if name not in laid and not is_new:
            raise ValueError(f"{path}.{name}: no such source, there are {', '.join(laid)}")
        laid[name] = merge(laid.get(name, {}), change)
    return list(laid.values())


def _with_nulls(values: Any, name: str, root: type) -> Any:
    """`None` and `none`, Python's spelling, as null where a setting may be null."""
    if isinstance(values, Mapping):
        prefix = f"{name}." if name else ""
        return {key: _with_nulls(value, f"{prefix}{key}", root) for key, value in values.items()}
    if values in ("None", "none"):
        key = find_key(name, root)
        # A name that is no key lies in a free mapping, which takes anything.
        return None if key is None or key.is_nullable else values
    return values


def _deepspeed_file(name: str) -> Path:
    """`configs/deepspeed/NAME.yaml`, or the user's own file."""
    shipped = {path.stem: path for path in (configs_folder() / "deepspeed").glob("*.yaml")}
    if name not in shipped and not Path(name).is_file():
        known = ", ".join(sorted(shipped))
        raise ValueError(f"deepspeed: got {name!r}, wanted one of {known}, or a YAML file's path")
    return shipped.get(name, Path(name))


def _nest(keys: Sequence[str], value: Any) -> dict[str, Any]:
    for key in reversed(keys):
        value = {key: value}
    return value


def _layer(override: str, root: type = Config) -> dict[str, Any]:
    """`a.b=c` as nested mappings."""
    key, separator, text = override.partition("=")
    if not separator or not key.strip():
        raise ValueError(f"override {override!r}: wanted the form section.key=value")
    known = find_key(key.strip(), root)
    is_text = known is not None and known.wanted in ("text", "text or null")
    # `care.reflection.cue=look again:` is no mapping, `name=7` no number.
    plain = is_text and not text.startswith(("'", '"')) and text not in ("null", "~")
    return _nest(key.strip().split("."), text if plain else parse_value(text))
