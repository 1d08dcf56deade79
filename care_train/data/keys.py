"""A row's key: which column holds it, what of it is the final answer, and which option it names."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from care_train.data.answers import (
    AnswerType,
    accepted_answers,
    filled_column,
    is_empty,
    missing_columns,
    nested,
    plain,
    read_answer,
)
from care_train.data.columns import (
    Conversation,
    RowError,
    describe,
    is_conversation,
    split_response,
    split_solution,
)
from care_train.data.options import Options, option_key

_VERL = "reward_model.ground_truth"
# Of each tuple the first column that holds something is read.
ANSWER_COLUMNS = ("answer", "solution", "ground_truth", _VERL, "final_answer", "expected_answer")
"""A key's; verl's is inside another column."""

RESPONSE_COLUMNS = ("completion", "response")
"""Those of a response with tags, where the messages hold none."""

_MAX_UNMARKED_CHARS = 300
"""A longer solution that does not mark its one final answer is no key."""


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
    response = talk.response
    if response is None:
        response = row.get(filled_column(row, RESPONSE_COLUMNS) or "")
        if isinstance(response, (list, tuple)) and is_conversation(response):
            response = response[-1].get("content")
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
