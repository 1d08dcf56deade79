"""Read YAML as settings need it: no key twice, dotted keys, and 1e-3 as a number."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml


class _Loader(yaml.SafeLoader):
    """YAML 1.1, but with YAML 1.2's numbers: 1e-3 is one, not a text."""


_Loader.yaml_implicit_resolvers = {
    first: list(resolvers) for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(\d[\d_]*\.?[\d_]*|\.\d[\d_]*)[eE][-+]?\d+$"),
    list("-+.0123456789"),
)


def parse_value(text: str) -> Any:
    """The value of `key=value`: YAML where it is YAML, else the text itself."""
    try:
        # _Loader is a SafeLoader.
        return yaml.load(text, _Loader) if text else ""  # nosec B506
    except yaml.YAMLError:
        return text


def read_yaml(path: Path, is_section: Callable[[str], bool]) -> dict[str, Any]:
    """A file's settings as nested mappings.

    Args:
        path: the file.
        is_section: whether a dotted name, "" for the whole file, is a section: keys with dots are
            taken apart there, and left alone in free mappings.

    Raises:
        ValueError: no such file, no YAML, no mapping, or a key that is given twice.
    """
    if not path.is_file():
        raise ValueError(f"config file {path}: not found")
    values: dict[str, Any] = {}
    try:
        loader = _Loader(path.read_text())
        node = loader.get_single_node()
        if isinstance(node, yaml.MappingNode):
            _Reader(path, loader, is_section).lay(node, (), values)
        elif node is not None:
            got = type(loader.construct_object(node, deep=True)).__name__
            raise ValueError(f"config file {path}: got {got}, wanted key: value lines")
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"config file {path}: not YAML: {error}") from None
    return values


class _Reader:
    """One file on its way from nodes, which know their lines, to mappings."""

    def __init__(self, path: Path, loader: _Loader, is_section: Callable[[str], bool]) -> None:
        self._path = path
        self._loader = loader
        self._is_section = is_section
        self._given: dict[tuple[Any, ...], tuple[int, bool]] = {}
        """Of each key its line, and whether it holds a value, not a mapping."""

    def lay(self, node: yaml.MappingNode, above: tuple[Any, ...], values: dict[Any, Any]) -> None:
        """Put what a mapping below the keys `above` holds into `values`."""
        for key_node, value_node in node.value:
            if key_node.tag != "tag:yaml.org,2002:merge":
                is_value = not isinstance(value_node, yaml.MappingNode)
                self._note(self._parts(key_node, above), key_node.start_mark.line + 1, is_value)
        # Puts the keys of `<<: *anchor` first, so that the mapping's own replace them.
        self._loader.flatten_mapping(node)
        # Once each: an alias of this mapping brings it here again, its merges as keys of its own.
        node.value = list({self._parts(pair[0], above): pair for pair in node.value}.values())
        for key_node, value_node in node.value:
            parts = self._parts(key_node, above)
            below = values
            for part in parts[len(above) : -1]:
                below = _mapping_at(below, part)
            if isinstance(value_node, yaml.MappingNode):
                self.lay(value_node, parts, _mapping_at(below, parts[-1]))
            else:
                below[parts[-1]] = self._loader.construct_object(value_node, deep=True)

    def _parts(self, key_node: yaml.Node, above: tuple[Any, ...]) -> tuple[Any, ...]:
        key = self._loader.construct_object(key_node, deep=True)
        is_dotted = isinstance(key, str) and self._is_section(".".join(map(str, above)))
        return (*above, *(key.split(".") if is_dotted else (key,)))

    def _note(self, parts: tuple[Any, ...], line: int, is_value: bool) -> None:
        """Refuse a key that is given already, or whose value would replace one below it."""
        for other, (first, was_value) in self._given.items():
            replaces = is_value and other[: len(parts)] == parts
            is_replaced = was_value and parts[: len(other)] == other
            if other == parts or replaces or is_replaced:
                name = ".".join(map(str, parts))
                raise ValueError(
                    f"config file {self._path}: {name} is given twice, in lines "
                    f"{min(first, line)} and {max(first, line)}: remove one"
                )
        self._given[parts] = line, is_value


def _mapping_at(values: dict[Any, Any], key: Any) -> dict[Any, Any]:
    if not isinstance(values.get(key), dict):
        values[key] = {}
    return values[key]
