"""What a row's columns must hold, and the error that names one that does not."""

from collections.abc import Callable, Mapping, Sequence
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


def is_conversation(value: object) -> bool:
    """Whether a column's value is a list of chat messages."""
    return isinstance(value, (list, tuple)) and bool(value) and isinstance(value[0], Mapping)


def _is_image(value: Any) -> bool:
    """An image as the datasets library stores one, a path, bytes or an open one."""
    if isinstance(value, Mapping):
        return bool(value.get("bytes") or value.get("path"))
    if isinstance(value, (str, Path)):
        return bool(str(value))
    return isinstance(value, (bytes, Image.Image))


def _is_list_of(kind: str) -> Callable[[Any], bool]:
    accepts = _KINDS[kind][1]
    return lambda value: isinstance(value, (list, tuple)) and all(map(accepts, value))


_KINDS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "null": ("null", lambda value: value is None),
    "text": ("text", lambda value: isinstance(value, str)),
    "filled": ("text that is not empty", lambda v: isinstance(v, str) and bool(v.strip())),
    "number": ("a number", lambda v: isinstance(v, (int, float)) and not isinstance(v, bool)),
    "image": ("an image (bytes or a path)", _is_image),
    "messages": ("chat messages", is_conversation),
}
"""What a published column's values may be: for people, and whether a value is one."""
_KINDS |= {
    "texts": ("a list of texts", _is_list_of("text")),
    "images": ("a list of images", _is_list_of("image")),
}


def describe_kinds(kinds: str) -> str:
    """What a column must hold, such as `texts or null`, as messages say it."""
    return ", or ".join(_KINDS[kind][0] for kind in kinds.split(" or "))


def check_row(
    schema: str,
    columns: Mapping[str, str],
    row: Mapping[str, Any],
    location: str,
    *,
    nulls_pass: bool = False,
) -> None:
    """Check that a row holds what is read of a published schema, which may change.

    Args:
        schema: the benchmark's or data set's name.
        columns: what is read, as `{"label": "text or texts", "id?": "text or null"}`: a column
            with `?` need not be there.
        row: values by column; those not read may be anything.
        location: file and row.
        nulls_pass: whether null is accepted anywhere, where a row stands for its whole file.

    Raises:
        RowError: a column is missing or holds another type: schema, row, column, type got and
            type wanted.
    """
    for column, kinds in columns.items():
        name, accepted = column.removesuffix("?"), [_KINDS[kind] for kind in kinds.split(" or ")]
        wanted = describe_kinds(kinds)
        at = f"{schema}: {location}: column {name!r}"
        if name not in row:
            if name == column:
                raise RowError(
                    "missing_column",
                    f"{at}: got none (the columns are {', '.join(map(repr, row))}), wanted "
                    f"{wanted}: the published schema has changed, or these are other rows",
                )
            continue
        value = row[name]
        if not any(accepts(value) for _, accepts in accepted) and not (
            nulls_pass and value is None
        ):
            raise RowError(
                "missing_column" if value is None else "column_type",
                f"{at}: got {describe(value)}, wanted {wanted}",
            )
