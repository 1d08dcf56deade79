"""Why rows cannot be used."""

import math
from collections.abc import Sequence

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
    """A value's kind, as messages say what they got."""
    if value is None:
        return "nothing"
    if isinstance(value, str) and not value.strip():
        return "empty text"
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return f"a {type(value).__name__}"
