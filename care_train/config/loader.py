"""Read a configuration: defaults, the algorithm's and the preset's, YAML, then `a.b=c`."""

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml
from pydantic import TypeAdapter, ValidationError

from care_train.config.build import BuildSettings
from care_train.config.care import PRESETS
from care_train.config.loss import TABLE_5
from care_train.config.run import Config

_ADAPTER = TypeAdapter(Config)
_BUILD_ADAPTER = TypeAdapter(BuildSettings)


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
    resume = [layer["resume"] for layer in layers if "resume" in layer]
    if resume and isinstance(resume[-1], str):
        run = Path(resume[-1])
        if run.name in ("", "..") or run.is_symlink():
            run = run.resolve()
        path = run / "config.yaml" if path is None else path
        if not (run / "config.yaml").is_file():
            raise ValueError(f"resume: {run}: no config.yaml there, so no run to go on with")
        layers.append({"resume": True, "output_dir": str(run.parent), "name": run.name})
    values = {} if path is None else _read_yaml(Path(path))
    for layer in layers:
        values = _lay(values, layer)
    return build_config(values, source=str(path) if path else "the command line")


def config_files(path: Path | None, overrides: Sequence[str] = ()) -> dict[str, Path]:
    """The user's files that `load_config` reads, by what names them."""
    files: dict[str, Path] = {}
    sections = [_layer(override) for override in overrides]
    key = "--config"
    while path is not None:
        files[key] = path
        values = _load_yaml(path)
        sections.append(values)
        base = values.get("extends")
        key, path = f"extends in {path}", None if base is None else path.parent / base
    for section in sections:
        if isinstance(name := section.get("deepspeed"), str):
            files[f"deepspeed={name}"] = _deepspeed_file(name)
    return files


def load_build_settings(path: str | Path, overrides: Sequence[str] = ()) -> BuildSettings:
    """The settings of `care-train data build`; arguments and errors as `load_config`'s.

    `sources.NAME.key=value` changes the source of that name.
    """
    values = _read_yaml(Path(path))
    for layer in map(_layer, overrides):
        changes = layer.get("sources")
        if isinstance(changes, Mapping):
            layer["sources"] = _lay_sources(values.get("sources", []), changes)
        values = merge(values, layer)
    known = [key for key, _, _ in describe_keys(_BUILD_ADAPTER)]
    try:
        return _BUILD_ADAPTER.validate_python(values)
    except ValidationError as error:
        lines = [_explain(item, known, "data build") for item in error.errors()]
        raise ValueError(f"{path}: " + "\n".join(lines)) from None


def names_run(overrides: Sequence[str]) -> bool:
    """Whether they say `resume=FOLDER`, whose config.yaml then is the configuration."""
    values = [o.partition("=")[2] for o in overrides if o.partition("=")[0].strip() == "resume"]
    return bool(values) and isinstance(_parse(values[-1]), str)


def build_config(values: Mapping[str, Any], source: str = "the configuration") -> Config:
    """A checked `Config` from nested mappings over the algorithm's and the preset's values."""
    known = _known_keys()
    algorithm = values.get("algorithm", "care")
    preset = values.get("preset", "default")
    layered = merge(TABLE_5.get(algorithm, {}), PRESETS.get(preset, {}))
    try:
        return _ADAPTER.validate_python(merge(layered, values))
    except ValidationError as error:
        lines = [_explain(item, known) for item in error.errors()]
        raise ValueError(f"{source}: " + "\n".join(lines)) from None


def config_to_yaml(config: Config) -> str:
    """The resolved configuration, readable by `load_config`."""
    return yaml.safe_dump(_ADAPTER.dump_python(config, mode="json"), sort_keys=False)


def config_to_dict(config: Config) -> dict[str, Any]:
    """The resolved configuration as nested plain values."""
    return asdict(config)


def describe_keys(adapter: TypeAdapter[Any] = _ADAPTER) -> list[tuple[str, str, str]]:
    """(key, default, description) of every setting, for `--help`."""
    schema = adapter.json_schema()
    return list(_walk(schema, schema, ""))


def describe_build_keys() -> list[tuple[str, str, str]]:
    """`describe_keys` of `care-train data build`."""
    return describe_keys(_BUILD_ADAPTER)


def merge(base: Mapping[str, Any], top: Mapping[str, Any]) -> dict[str, Any]:
    """`top` laid over `base`, mapping by mapping."""
    merged = dict(base)
    for key, value in top.items():
        below = merged.get(key)
        if isinstance(value, Mapping) and isinstance(below, Mapping):
            value = merge(below, value)
        merged[key] = value
    return merged


def _read_yaml(path: Path) -> dict[str, Any]:
    """A file's values over those of the file that it extends."""
    values = _load_yaml(path)
    base = values.pop("extends", None)
    return _lay({} if base is None else _read_yaml(path.parent / base), values)


def _load_yaml(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(f"config file {path}: not found")
    try:
        values = yaml.safe_load(path.read_text()) or {}
    except yaml.YAMLError as error:
        raise ValueError(f"config file {path}: not YAML: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(
            f"config file {path}: got {type(values).__name__}, wanted key: value lines"
        )
    return values


def _lay(base: Mapping[str, Any], top: Mapping[str, Any]) -> dict[str, Any]:
    """`merge`, where a `deepspeed` that is a name replaces the whole section by a file's."""
    name = top.get("deepspeed")
    if isinstance(name, str):
        base = {**base, "deepspeed": {}}
        top = {**top, "deepspeed": _read_yaml(_deepspeed_file(name))}
    return merge(base, top)


def _deepspeed_file(name: str) -> Path:
    """`configs/deepspeed/NAME.yaml`, or the user's own file."""
    shipped = {path.stem: path for path in (configs_folder() / "deepspeed").glob("*.yaml")}
    if name in shipped:
        return shipped[name]
    if not Path(name).is_file():
        known = ", ".join(sorted(shipped))
        raise ValueError(f"deepspeed: got {name!r}, wanted one of {known}, or a YAML file's path")
    return Path(name)


def configs_folder() -> Path:
    """Where the shipped configurations are."""
    package = Path(__file__).resolve().parents[1]
    # Wheels carry configs/ inside the package; a checkout has it beside.
    return next(r / "configs" for r in (package, package.parent) if (r / "configs").is_dir())


def _parse(text: str) -> Any:
    try:
        return yaml.safe_load(text) if text else ""
    except yaml.YAMLError:
        return text


def _nest(keys: Sequence[str], value: Any) -> dict[str, Any]:
    for key in reversed(keys):
        value = {key: value}
    return value


def _known_keys() -> list[str]:
    return [key for key, _, _ in describe_keys()]


def _layer(override: str) -> dict[str, Any]:
    """`a.b=c` as nested mappings."""
    key, separator, text = override.partition("=")
    if not separator or not key.strip():
        raise ValueError(f"override {override!r}: wanted the form section.key=value")
    return _nest(key.strip().split("."), _parse(text))


def _lay_sources(sources: Sequence[Any], changes: Mapping[str, Any]) -> list[Any]:
    """Each source with what `changes` says under its name."""
    names = [source.get("name") for source in sources]
    if unknown := [name for name in changes if name not in names]:
        raise ValueError(f"sources.{unknown[0]}: no such source, there are {', '.join(names)}")
    return [merge(source, changes.get(source.get("name"), {})) for source in sources]


def _explain(error: Any, known: Sequence[str], command: str = "train") -> str:
    key = ".".join(str(part) for part in error["loc"])
    if error["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        close = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        return f"unknown key {key!r}{hint} (`care-train {command} --help` lists all keys)"
    if error["type"] == "value_error":
        return str(error["ctx"]["error"])
    return f"{key}: got {error['input']!r}: {error['msg']}"


def _walk(schema: Any, root: Any, prefix: str) -> Any:
    for name, entry in schema.get("properties", {}).items():
        key = f"{prefix}{name}"
        reference = entry.get("$ref")
        for option in entry.get("anyOf", []):
            if "$ref" in option:  # a section that may be null
                yield key, str(entry.get("default", "")), entry.get("description", "")
                reference = option["$ref"]
        if item := entry.get("items", {}).get("$ref"):
            yield key, str(entry.get("default", "")), entry.get("description", "")
            yield from _walk(root["$defs"][item.rsplit("/", 1)[1]], root, f"{key}.NAME.")
        elif reference:
            yield from _walk(root["$defs"][reference.rsplit("/", 1)[1]], root, f"{key}.")
        else:
            yield key, str(entry.get("default", "")), entry.get("description", "")
