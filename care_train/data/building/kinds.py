"""What a column holds, in words, and whether a published schema's columns hold it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

TEXT, NUMBER, BOOLEAN, BYTES, IMAGE = "text", "number", "boolean", "bytes", "image"
LABEL, MESSAGES, STRUCT, NULL = "class label", "chat messages", "struct", "nothing"


def list_of(kind: str) -> str:
    """The kind of a list."""
    return f"list of {kind}"


@dataclass(frozen=True)
class Column:
    """One column of a published schema."""

    name: str
    kinds: tuple[str, ...]
    """What it may hold."""
    required: bool = True


def check_columns(where: str, columns: tuple[Column, ...], found: Mapping[str, str]) -> None:
    """Compare a published schema with what a file holds.

    Args:
        where: source and file, for the error.
        columns: the published schema.
        found: each column's kind in the file.

    Raises:
        ValueError: a column missing, or of another kind, naming it, the kind got and wanted.
    """
    for column in columns:
        wanted = " or ".join(column.kinds)
        got = found.get(column.name)
        if got is None and column.required:
            have = ", ".join(f"{name} ({kind})" for name, kind in found.items())
            raise ValueError(
                f"{where}: column {column.name!r}: got none, wanted {wanted}; the file has {have}"
            )
        # A first row's empty list may be of anything.
        empty = got == list_of(NULL) and any(kind.startswith(list_of("")) for kind in column.kinds)
        absent = got in (None, NULL) and not column.required
        if not (empty or absent or got in column.kinds):
            raise ValueError(f"{where}: column {column.name!r}: got {got}, wanted {wanted}")


def kind_of_value(value: Any) -> str:
    """The kind of a JSON or Python value."""
    if value is None:
        return NULL
    if isinstance(value, bool):
        return BOOLEAN
    for kind, types in ((TEXT, str), (NUMBER, (int, float)), (BYTES, bytes)):
        if isinstance(value, types):
            return kind
    if isinstance(value, Mapping):
        return _kind_of_fields(value)
    if isinstance(value, (list, tuple)):
        return _kind_of_list(kind_of_value(value[0]) if value else NULL)
    return f"a {type(value).__name__}"


def kind_of_arrow(type: Any) -> str:
    """The kind of an Arrow type."""
    from pyarrow import types

    if types.is_dictionary(type):
        return kind_of_arrow(type.value_type)
    if types.is_list(type) or types.is_large_list(type) or types.is_fixed_size_list(type):
        return _kind_of_list(kind_of_arrow(type.value_type))
    if types.is_struct(type):
        return _kind_of_fields([type.field(i).name for i in range(type.num_fields)])
    checks = (
        (NULL, types.is_null),
        (BOOLEAN, types.is_boolean),
        (TEXT, lambda t: types.is_string(t) or types.is_large_string(t)),
        (NUMBER, lambda t: types.is_integer(t) or types.is_floating(t) or types.is_decimal(t)),
        (BYTES, lambda t: types.is_binary(t) or types.is_large_binary(t)),
    )
    return next((kind for kind, holds in checks if holds(type)), str(type))


_MESSAGE = "chat message"


def _kind_of_fields(names: Any) -> str:
    fields = set(names)
    if fields == {"bytes", "path"}:
        return IMAGE
    is_message = {"role", "content"} <= fields or {"from", "value"} <= fields
    return _MESSAGE if is_message else STRUCT


def _kind_of_list(element: str) -> str:
    return MESSAGES if element == _MESSAGE else list_of(element)
