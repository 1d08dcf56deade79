"""What a row's columns hold: values, chat messages, and the error that names a bad one."""

import ast
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

IMAGE_PLACEHOLDER = "<image>"
"""Where an image goes in a prompt's text."""

IMAGE_KEYS = ("bytes", "image", "url", "image_url", "path", "base64")
"""Under which the datasets library and chat messages hold an image, the first that holds one."""

_ROLES = {
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "system": "system",
}
"""What the roles that data sets write stand for."""

_NUM_SHOWN = 5
_MAX_SPELLED_CHARS = 100_000
_NESTED = re.compile(r"\s*(?:\[\s*[\"'{]|\{\s*[\"'])")


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


def plain(value: Any) -> Any:
    """A row's value as JSON would hold it: pandas has arrays for lists, and NaN for null."""
    value = value.tolist() if hasattr(value, "tolist") else value
    return None if isinstance(value, float) and math.isnan(value) else value


def is_empty(value: object) -> bool:
    """Whether a column holds nothing: null, NaN, blank text, or a list or mapping of nothing."""
    if value is None or isinstance(value, str):
        return not value or not value.strip()
    value = plain(value)
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        return all(is_empty(entry) for entry in value)
    return value is None or value == b""


def spelled(value: Any) -> Any:
    """A list or mapping from a text that spells it as JSON or Python does."""
    if not isinstance(value, str) or len(value) > _MAX_SPELLED_CHARS:
        return value
    for parse in (json.loads, ast.literal_eval):
        try:
            parsed = parse(value)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
        if isinstance(parsed, (list, tuple, Mapping)):
            return parsed
    return value


def filled_column(row: Mapping[str, Any], names: tuple[str, ...]) -> str | None:
    """The first column that holds something; else the first that is there, for errors to name."""
    filled = (name for name in names if not is_empty(row.get(name)))
    return next(filled, next((name for name in names if row.get(name) is not None), None))


def missing_columns(row: Mapping[str, Any], names: tuple[str, ...]) -> str:
    """What there is in place of some columns, as messages say it."""
    empty = " and ".join(repr(name) for name in names if name in row)
    none = f"nothing in {empty}, and " if empty else ""
    have = f"the columns {', '.join(map(repr, row))}" if row else "no columns"
    return none + have


def nested(text: str) -> Any:
    """The list or mapping of texts or of further ones that a text spells; else the text."""
    return spelled(text) if _NESTED.match(text) else text


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
    "spelled": ("text that spells one as Python does", _KINDS["text"][1]),
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


@dataclass(frozen=True)
class Conversation:
    """A question and, where there is one, its answer."""

    prompt: str
    """The user's text; `<image>` where a part held an image."""
    images: tuple[object, ...] = ()
    """What the parts' images held, in order; none where an images column has them."""
    system: str | None = None
    response: str | None = None
    """The assistant's text."""


def read_conversation(messages: Sequence[Any], *, column: str, at: str) -> Conversation:
    """One user turn, a system turn before it and an assistant turn after it, if any.

    Messages have `role` and `content`, or `from` and `value`; contents are text or lists of parts.

    Raises:
        RowError: another shape, an unknown role, or more than one question.
    """
    texts: dict[str, list[str]] = {"system": [], "user": [], "assistant": []}
    images: list[object] = []
    for number, message in enumerate(messages, 1):
        where = f"{at}: {column}: message {number}"
        if not isinstance(message, Mapping):
            raise RowError("message", f"{where}: got {describe(message)}, wanted role and content")
        written = message.get("role") or message.get("from")
        role = _ROLES.get(written) if isinstance(written, str) else None
        if role is None:
            wanted = f"wanted one of {', '.join(_ROLES)}"
            raise RowError("message", f"{where}: role: got {written!r}, {wanted}")
        texts[role].append(message_text(message, images, where))
    if len(texts["user"]) != 1 or len(texts["assistant"]) > 1:
        raise RowError(
            "several_turns",
            f"{at}: {column}: got {len(texts['user'])} user and {len(texts['assistant'])} "
            "assistant turns, wanted one question with at most one response: split the "
            "conversation",
        )
    return Conversation(
        texts["user"][0],
        tuple(images),
        "\n".join(texts["system"]) or None,
        texts["assistant"][0] if texts["assistant"] else None,
    )


def message_text(message: Mapping[str, Any], images: list[object], where: str) -> str:
    """A message's text, `<image>` where a part holds an image; that is added to `images`.

    Raises:
        RowError: neither text nor a list of parts; `where` names it.
    """
    content = message.get("content")
    content = message.get("value") if content is None else content
    if isinstance(content, str):
        return content
    if not isinstance(content, (list, tuple)):
        raise RowError(
            "message", f"{where}: content: got {describe(content)}, wanted text or a list of parts"
        )
    return "".join(_part(part, images, where) for part in content)


def _part(part: object, images: list[object], where: str) -> str:
    kind = part.get("type") if isinstance(part, Mapping) else None
    if isinstance(part, Mapping) and kind == "text" and isinstance(part.get("text"), str):
        return part["text"]
    if isinstance(part, Mapping) and kind in ("image", "image_url"):
        if any(part.get(key) for key in IMAGE_KEYS):
            images.append(part)
        return IMAGE_PLACEHOLDER
    got = repr(kind) if isinstance(part, Mapping) else describe(part)
    raise RowError("message", f"{where}: content: got a part of type {got}, wanted text or image")
