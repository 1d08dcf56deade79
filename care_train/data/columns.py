"""What a row's columns must hold, and the error that names one that does not."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

_NUM_SHOWN = 5


class RowError(ValueError):
    """A row that cannot be used: the message names file, row, field, what it got and wanted."""

    def __init__(self, reason: str, message: str) -> None:
        """
        Args:
            reason: a short code, by which `care-train data build` counts rejected rows.
            message: for people.
        """
        super().__init__(message)
        self.reason = reason

    def __reduce__(self) -> tuple[type["RowError"], tuple[str, str]]:
        return type(self), (self.reason, str(self))


def join_errors(where: object, errors: Sequence[str]) -> str:
    """One message of several rows' errors, the first of them in full.

    Args:
        where: what holds the rows.
        errors: at least one; each names its row.
    """
    if len(errors) == 1:
        return errors[0]
    rest = len(errors) - _NUM_SHOWN
    tail = [f"and {rest} more"] if rest > 0 else []
    head = f"{where}: {len(errors)} rows cannot be used:"
    return "\n".join([head, *errors[:_NUM_SHOWN], *tail])


def describe(value: object) -> str:
    """What was got, as messages say it: a short value itself, else its kind."""
    if value is None:
        return "nothing"
    if isinstance(value, str) and not value.strip():
        return "empty text"
    if isinstance(value, Mapping):
        return f"an object with {', '.join(map(repr, value)) or 'nothing'}"
    is_long = isinstance(value, (str, bytes)) and len(value) > 60
    shown = "" if is_long else repr(value)
    return shown if 0 < len(shown) <= 60 else f"a {type(value).__name__}"


@dataclass(frozen=True)
class Kind:
    """What the values of a published schema's column are."""

    wanted: str
    """For people."""
    accepts: Callable[[Any], bool]
    required: bool = True
    """False: the column need not be there."""


def is_conversation(value: object) -> bool:
    """Whether a column's value is a list of chat messages."""
    return isinstance(value, (list, tuple)) and bool(value) and isinstance(value[0], Mapping)


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
    """Check that a row holds what is read of a published schema, which may change.

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
        at = f"{schema}: {location}: column {name!r}"
        if name not in row:
            if kind.required:
                raise RowError(
                    "missing_column",
                    f"{at}: got none (the columns are {', '.join(map(repr, row))}), wanted "
                    f"{kind.wanted}: the published schema has changed, or these are other rows",
                )
        elif not (kind.accepts(row[name]) or (nulls_pass and row[name] is None)):
            raise RowError(
                "missing_column" if row[name] is None else "column_type",
                f"{at}: got {describe(row[name])}, wanted {kind.wanted}",
            )
