"""What a published schema's columns must hold: it may change, or a file may have another one."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from care_train.data.conversations import is_conversation
from care_train.data.errors import RowError


@dataclass(frozen=True)
class Kind:
    """What the values of a column are."""

    wanted: str
    """For people."""
    accepts: Callable[[Any], bool]
    required: bool = True
    """False: the column need not be there."""


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_texts(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and all(map(_is_text, value))


def _is_image(value: Any) -> bool:
    """An image as the datasets library stores one, a path, bytes or an open one."""
    if isinstance(value, Mapping):
        return bool(value.get("bytes") or value.get("path"))
    if isinstance(value, (str, Path)):
        return bool(str(value))
    return isinstance(value, (bytes, Image.Image))


TEXT = Kind("text", _is_text)
FILLED_TEXT = Kind("text that is not empty", lambda value: _is_text(value) and bool(value.strip()))
TEXTS = Kind("a list of texts", _is_texts)
TEXT_OR_TEXTS = Kind("text or a list of texts", lambda value: _is_text(value) or _is_texts(value))
ENCODED_TEXTS = Kind(
    "a list of texts, or text that spells one as Python does", TEXT_OR_TEXTS.accepts
)
NUMBER = Kind("a number", _is_number)
TEXT_OR_NUMBER = Kind("text or a number", lambda value: _is_text(value) or _is_number(value))
MESSAGES = Kind("chat messages", is_conversation)
IMAGE = Kind("an image (bytes or a path)", _is_image)
IMAGES = Kind(
    "an image (bytes or a path), or a list of them",
    lambda value: _is_image(value) or (isinstance(value, list) and all(map(_is_image, value))),
)


def optional(kind: Kind) -> Kind:
    """`kind` or null, in a column that must be there."""
    return Kind(f"{kind.wanted}, or null", lambda value: value is None or kind.accepts(value))


def maybe(kind: Kind) -> Kind:
    """`kind`, null, or no such column."""
    nullable = optional(kind)
    return Kind(nullable.wanted, nullable.accepts, required=False)


NUMBER_OR_NULL = optional(NUMBER)


def check_row(
    schema: str,
    columns: Mapping[str, Kind],
    row: Mapping[str, Any],
    location: str,
    *,
    nulls_pass: bool = False,
) -> None:
    """Check that a row holds what an adapter of a published schema reads.

    Args:
        schema: the benchmark's or data set's name.
        columns: what is read.
        row: values by column; those not read may be anything.
        location: file and row.
        nulls_pass: whether null is accepted anywhere, where a row stands for its whole file.

    Raises:
        RowError: a column is missing or holds another type: schema, row, column, type got and
            type wanted.
    """
    for name, kind in columns.items():
        if name not in row:
            if not kind.required:
                continue
            raise RowError(
                "missing_column",
                f"{schema}: {location}: column {name!r}: got none (the columns are "
                f"{', '.join(map(repr, row))}), wanted {kind.wanted}: the published schema has "
                "changed, or these are other rows",
            )
        if nulls_pass and row[name] is None:
            continue
        if not kind.accepts(row[name]):
            raise RowError(
                "missing_column" if row[name] is None else "column_type",
                f"{schema}: {location}: column {name!r}: got {describe_value(row[name])}, wanted "
                f"{kind.wanted}",
            )


def describe_value(value: Any) -> str:
    """A value's type in words, and for short ones the value."""
    if value is None:
        return "null"
    if isinstance(value, list):
        inner = sorted({type(item).__name__ for item in value})
        return f"a list of {' and '.join(inner) or 'nothing'}"
    if isinstance(value, Mapping):
        return f"an object with {', '.join(map(repr, value)) or 'nothing'}"
    name = type(value).__name__
    is_short = isinstance(value, (str, int, float)) and len(f"{value}") < 40
    return f"{name} {value!r}" if is_short else name
