"""Why one row cannot be used."""


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


def describe(value: object) -> str:
    """A value's kind, as messages say what they got."""
    if value is None:
        return "nothing"
    if value == "":
        return "empty text"
    return f"a {type(value).__name__}"
