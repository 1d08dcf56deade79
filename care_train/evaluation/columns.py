"""What a benchmark's columns must hold: a published schema may change under us."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image


@dataclass(frozen=True)
class Kind:
    """What the values of a column are."""

    wanted: str
    """For people."""
    accepts: Callable[[Any], bool]


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_texts(value: Any) -> bool:
    return isinstance(value, list) and all(map(_is_text, value))


def is_image(value: Any) -> bool:
    """Whether a value is an image as the datasets library stores one, a path, bytes or open."""
    if isinstance(value, Mapping):
        return bool(value.get("bytes") or value.get("path"))
    if isinstance(value, (str, Path)):
        return bool(str(value))
    return isinstance(value, (bytes, Image.Image))


TEXT = Kind("text", _is_text)
FILLED_TEXT = Kind("text that is not empty", lambda value: _is_text(value) and bool(value.strip()))
TEXTS = Kind("a list of texts", _is_texts)
ENCODED_TEXTS = Kind(
    "a list of texts, or text that spells one as Python does",
    lambda value: _is_texts(value) or _is_text(value),
)
IMAGE = Kind("an image (bytes or a path)", is_image)


def optional(kind: Kind) -> Kind:
    """`kind` or null."""
    return Kind(f"{kind.wanted}, or null", lambda value: value is None or kind.accepts(value))


NUMBER_OR_NULL = optional(Kind("a number", _is_number))


def check_row(
    benchmark: str, columns: Mapping[str, Kind], row: Mapping[str, Any], location: str
) -> None:
    """Check that a row holds what a benchmark's adapter reads.

    Args:
        benchmark: its name.
        columns: what it reads.
        row: values by column; those not read may be anything.
        location: file and row.

    Raises:
        ValueError: a column is missing or holds another type: benchmark, row, column, type got and
            type wanted.
    """
    for name, kind in columns.items():
        if name not in row:
            raise ValueError(
                f"{benchmark}: {location}: column {name!r}: got none (the columns are "
                f"{', '.join(map(repr, row))}), wanted {kind.wanted}: the published schema has "
                "changed, or these are other rows"
            )
        if not kind.accepts(row[name]):
            raise ValueError(
                f"{benchmark}: {location}: column {name!r}: got {describe(row[name])}, wanted "
                f"{kind.wanted}"
            )


def describe(value: Any) -> str:
    """A value's type in words, and for short ones the value."""
    if value is None:
        return "null"
    if isinstance(value, list):
        inner = sorted({type(item).__name__ for item in value})
        return f"a list of {' and '.join(inner) or 'nothing'}"
    if isinstance(value, Mapping):
        return f"an object with {', '.join(map(repr, value)) or 'nothing'}"
    name = type(value).__name__
    return (
        f"{name} {value!r}"
        if isinstance(value, (str, int, float)) and len(f"{value}") < 40
        else name
    )
