"""The key of a row: its answer as text, which answers it accepts, and how they are compared.

Functions that read a value raise a ValueError of what was got and wanted; the caller adds the row.
"""

import ast
import json
import logging
import math
import re
from collections.abc import Mapping
from decimal import Decimal
from enum import StrEnum
from functools import cache
from typing import Any

from care_train.data.columns import describe

logger = logging.getLogger(__name__)

_MAX_SPELLED_CHARS = 100_000
_GROUPED = re.compile(r"[^\w,([{]*\d{1,3}(?:,\d{3})+(?![\d,])[^,]*")
"""A number with thousands separators, which may have a currency or unit."""
_NESTED = re.compile(r"\s*(?:\[\s*[\"'{]|\{\s*[\"'])")


class AnswerType(StrEnum):
    """How an answer is compared with its key; docs/verifier.md has examples of each."""

    CHOICE = "choice"
    """A letter, a letter with the option's text, or the text alone."""
    NUMBER = "number"
    """A number with or without unit, in any notation."""
    RELAXED = "relaxed"
    """ChartQA's measure: a number within 5 %, or else the same text."""
    MATH = "math"
    """An expression, equation, point or interval, compared symbolically."""
    SET = "set"
    """Several answers in any order."""
    LIST = "list"
    """Several answers in this order."""
    YES_NO = "yes_no"
    """Yes or no, true or false."""
    TEXT = "text"
    """Words."""
    FUNCTION = "function"
    """Not at all: only a reward function reads the key."""


def read_answer(value: object, kind: AnswerType | None) -> tuple[str, AnswerType | None]:
    """A key as text, and how it is compared.

    Booleans are yes and no, numbers decimals without an exponent, a list of texts the text that
    spells it (`accepted_answers`). Objects and other lists, which are JSON then, only a reward
    function reads.

    Args:
        value: the row's value.
        kind: its `answer_type`, which says of a list that all are wanted (`list`, `set`).
    """
    listed = nested(value) if isinstance(value, str) else value
    if isinstance(listed, (list, tuple)) and kind in (AnswerType.LIST, AnswerType.SET):
        # Between the elements too stands a comma.
        texts = [_answer_text(entry) for entry in listed]
        return ", ".join(t.replace(",", "") if _GROUPED.fullmatch(t) else t for t in texts), kind
    if isinstance(value, str):
        is_object = kind is None and _holds_object(listed)
        return value, AnswerType.FUNCTION if is_object else kind
    if isinstance(listed, (list, tuple, Mapping)):
        text = json.dumps(listed, default=str, ensure_ascii=False)
        return text, kind if _is_texts(listed) else AnswerType.FUNCTION
    return _answer_text(value), kind


def accepted_answers(key: str) -> tuple[str, ...]:
    """The answers that a key accepts: any of the texts of a list that it spells, as MMMU, VQA's
    data sets and verl's mean it, else itself alone."""
    listed = nested(key)
    return tuple(text.strip() for text in listed) if _is_texts(listed) else (key,)


def _answer_text(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError(f"got {value}, wanted a finite number: correct or drop the row")
        return format(Decimal(repr(value)), "f")
    if isinstance(value, (int, Decimal)):
        return format(value, "f" if isinstance(value, Decimal) else "d")
    if not isinstance(value, str):
        raise ValueError(f"got {describe(value)}, wanted text, a number or a boolean")
    return value


def _is_texts(value: object) -> bool:
    return isinstance(value, (list, tuple)) and all(
        isinstance(entry, str) and entry.strip() for entry in value
    )


def _holds_object(value: object) -> bool:
    return isinstance(value, Mapping) or (
        isinstance(value, (list, tuple)) and any(isinstance(entry, Mapping) for entry in value)
    )


def answer_type(value: object) -> AnswerType | None:
    """A row's `answer_type`; None where it has none, or a data set's own word for it, such as
    `Float`, of which a warning tells."""
    if value is None or value == "":
        return None
    if not isinstance(value, str):
        raise ValueError(f"got {describe(value)}, wanted one of {', '.join(AnswerType)}")
    if value not in list(AnswerType):
        _warn_of_type(value)
        return None
    return AnswerType(value)


@cache
def _warn_of_type(value: str) -> None:
    logger.warning(
        "warning: answer_type: got %r, none of %s: how such rows are compared is inferred from "
        "their keys",
        *(value[:60], ", ".join(AnswerType)),
    )


def tolerance(value: object) -> float | None:
    """A row's `tolerance`, relative to the key; None where it has none."""
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 1:
        raise ValueError(f"got {describe(value)}, wanted a number in [0, 1)")
    return float(value)


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
