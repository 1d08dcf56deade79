"""The key of a row: which column holds it, what of it is the final answer, and how it is compared.

Functions that read a value raise a ValueError of what was got and wanted; the caller adds the row.
"""

import json
import logging
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal
from enum import StrEnum
from functools import cache
from typing import Any

from care_train.data.columns import (
    Conversation,
    RowError,
    describe,
    filled_column,
    is_conversation,
    is_empty,
    message_text,
    missing_columns,
    nested,
    plain,
)
from care_train.data.options import Options, option_key

logger = logging.getLogger(__name__)

_VERL = "reward_model.ground_truth"
# Of each tuple the first column that holds something is read.
ANSWER_COLUMNS = ("answer", "solution", "ground_truth", _VERL, "final_answer", "expected_answer")
"""A key's; verl's is inside another column."""

RESPONSE_COLUMNS = ("completion", "response")
"""Those of a response with tags, where the messages hold none."""

_MAX_UNMARKED_CHARS = 300
"""A longer solution that does not mark its one final answer is no key."""

_GROUPED = re.compile(r"[^\w,([{]*\d{1,3}(?:,\d{3})+(?![\d,])[^,]*")
"""A number with thousands separators, which may have a currency or unit."""

_THINK = re.compile(r"<(think|thinking|reasoning)>(.*?)</\1>", re.DOTALL)
_ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
_FINAL = re.compile(r"^\s*\**\s*(?:the\s+)?final\s+answer\s*\**\s*:\s*\**\s*", re.IGNORECASE)
_BOX = re.compile(r"\\boxed\s*\{")
# GSM8K: the reasoning with its calculator's notes, then the key.
_HASHES = re.compile(r"^(.*?)(?:^|\s)####\s*(\S[^\n]*?)\s*$", re.DOTALL)
_CALCULATION = re.compile(r"<<[^<>]*>>")


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


@dataclass(frozen=True)
class Found:
    """What stands in a row as its key."""

    column: str
    value: Any
    rationale: str | None = None
    """Of a response or a solution: what stands before the answer."""
    is_derivation: bool = False
    """The value is a long text that does not say which part of it is the answer."""


def verl_answer(row: Mapping[str, Any]) -> Any:
    """verl's key; its mapping may be JSON text."""
    model = row.get("reward_model")
    model = nested(model) if isinstance(model, str) else model
    return plain(model.get("ground_truth")) if isinstance(model, Mapping) else None


def find_key(row: Mapping[str, Any], talk: Conversation, at: str) -> Found:
    """The key of an answer column, or of a response with tags.

    Raises:
        RowError: there is none.
    """
    response: Any = talk.response
    if response is None and (name := filled_column(row, RESPONSE_COLUMNS)):
        response = row[name]
        last = response[-1] if is_conversation(response) else None
        if isinstance(last, Mapping) and last.get("content"):
            response = message_text(last, [], f"{at}: {name}")
    rationale, answered = split_response(response if isinstance(response, str) else "")
    row = {**row, _VERL: verl_answer(row)}
    column = filled_column(row, ANSWER_COLUMNS) or "answer"
    value = row.get(column)
    if is_empty(value):
        if answered is None:
            row.pop(_VERL)
            got = missing_columns(row, ANSWER_COLUMNS) if value is None else describe(value)
            raise RowError(
                "empty_answer",
                f"{at}: {column}: got {got}, wanted text, a number or a boolean in one of "
                f"{', '.join(ANSWER_COLUMNS)}, or a response (an assistant turn, "
                f"{' or '.join(RESPONSE_COLUMNS)}) with an <answer> span: rename the column that "
                "holds the final answer, or drop the row",
            )
        return Found("response", answered, rationale)
    # A list of one, or text that spells one: `["34"]`.
    listed = accepted_answers(value) if isinstance(value, str) else value
    if isinstance(listed, (list, tuple)) and len(listed) == 1:
        value = listed[0]
    if not isinstance(value, str):
        return Found(column, value, rationale)
    own_rationale, final = split_solution(value)
    is_derivation = (
        final == value
        and len(value) > _MAX_UNMARKED_CHARS
        and (column == "solution" or "\\boxed" in value)
    )
    return Found(column, final, rationale or own_rationale, is_derivation)


def read_key(
    found: Found, options: Options, kind: AnswerType | None, column: str | None, at: str
) -> tuple[str, AnswerType | None, Options]:
    """The key as text, how it is compared, and the options if it is one of them or need not be.

    Args:
        found: of `find_key`.
        options: those of the row, or those that its prompt lists.
        kind: the row's `answer_type`.
        column: that of the options; None: the key need not be one of them.
        at: file, row and column, for errors.

    Raises:
        RowError: an empty key, or one that is none of the options.
    """
    try:
        answer, kind = read_answer(found.value, kind)
    except ValueError as error:
        raise RowError("answer_type", f"{at}: {error}") from None
    answer = answer.strip()
    if not answer:
        raise RowError("empty_answer", f"{at}: got empty text, wanted some: fill or drop the row")
    accepted = accepted_answers(answer)
    are_letters = all(len(one) == 1 and one.isalpha() for one in accepted)
    # Of several options each alone is seldom right, and a list does not say that all are wanted.
    are_options = len(accepted) > 1 and (options.texts or are_letters)
    if kind is None and (are_options or found.is_derivation):
        return answer, AnswerType.FUNCTION, options
    if not options.texts or kind not in (None, AnswerType.CHOICE, AnswerType.TEXT):
        return answer, kind, options if column else Options()
    key = option_key(answer, options)
    if key is None and isinstance(found.value, bool):
        key = option_key(str(found.value), options)
    if key is not None:
        # MathVista calls options' texts `text`: their letters are right as well.
        return key, None if kind is AnswerType.TEXT else kind, options
    if column is None or kind is AnswerType.TEXT:
        return answer, kind, options if column else Options()
    shown = ", ".join(options.texts)
    raise RowError(
        "key_is_no_option",
        f"{at}: got {answer[:60]!r}, none of the {len(options.texts)} texts in {column} "
        f"({shown[:120]}) nor a letter from A to {options.last_letter}: write the letter or the "
        "option's text (an index counts only where the options have numbers as labels), or set "
        "answer_type to how it is compared",
    )


def split_response(text: str) -> tuple[str | None, str | None]:
    """(rationale, answer) of a response with tags; None for what it does not have.

    `<think>`, `<thinking>` or `<reasoning>` holds the rationale. The answer is the last `<answer>`
    span, without a leading "Final Answer:".
    """
    think, answers = _THINK.search(text), _ANSWER.findall(text)
    rationale = think[2].strip() if think else None
    answer = _FINAL.sub("", answers[-1]).strip() if answers else None
    return rationale or None, answer or None


def split_solution(text: str) -> tuple[str | None, str]:
    """(rationale, answer) of an answer column, which may hold more than the final answer.

    Read are a response with tags, GSM8K's `reasoning #### answer`, and a solution whose one
    `\\boxed{...}` is the answer; any other text is the answer itself.
    """
    rationale, answer = split_response(text)
    if answer is not None:
        return rationale, answer
    if match := _HASHES.fullmatch(text):
        return _CALCULATION.sub("", match[1]).strip() or None, match[2]
    boxes = list(_BOX.finditer(text))
    if len(boxes) == 1 and (boxed := _box_content(text[boxes[0].end() :])):
        return None, boxed
    return None, text


def _box_content(text: str) -> str:
    """What stands before the brace that closes a box; empty without one."""
    depth = 1
    for place, char in enumerate(text):
        depth += {"{": 1, "}": -1}.get(char, 0)
        if depth == 0:
            return text[:place].strip()
    return ""
