"""Published schemas, and what `sample_from_row` does not read of one by itself.

docs/data.md says where each schema was read.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from care_train.data.answers import AnswerType
from care_train.data.columns import (
    IMAGE,
    IMAGES,
    MESSAGES,
    NUMBER,
    TEXT,
    TEXT_OR_NUMBER,
    TEXT_OR_TEXTS,
    TEXTS,
    Kind,
    RowError,
    maybe,
)
from care_train.data.conversations import read_conversation, split_response

Row = dict[str, Any]

_NUMBER = re.compile(r"[-+]?[$€£]?(?:\d{1,3}(?:,\d{3})+|\d+)?(?:\.\d+)?\s*%?")
_YEAR = re.compile(r"(?:1[89]|20|21)\d\d")


@dataclass(frozen=True)
class Adapter:
    """A published schema."""

    columns: Mapping[str, Kind] = field(default_factory=dict)
    convert: Callable[[Row, str], Row] = lambda row, at: row
    """(row, file and row for errors) -> columns that `sample_from_row` reads; raises RowError."""
    uninterpreted: tuple[str, ...] = ()
    """Columns that are kept, but are not what `sample_from_row` takes such names for."""


def chart_answer_type(answer: str) -> AnswerType | None:
    """ChartQA's: its measure allows numbers 5 %, which no year should have."""
    text = answer.strip()
    is_number = any(char.isdigit() for char in text) and _NUMBER.fullmatch(text)
    return AnswerType.RELAXED if is_number and not _YEAR.fullmatch(text) else None


def _chartqa(row: Row, at: str) -> Row:
    answers = row.pop("label")
    if not isinstance(answers, list):
        answers = [answers]
    if len(answers) != 1:
        raise RowError("several_answers", f"{at}: label: got {len(answers)} keys, wanted one")
    return row | {"answer": answers[0], "answer_type": chart_answer_type(answers[0])}


def _vision_r1_cold(row: Row, at: str) -> Row:
    talk = read_conversation(row["conversations"], column="conversations", at=at)
    rationale, answer = split_response(talk.response or "")
    if rationale is None or answer is None:
        missing = "<think>" if rationale is None else "<answer>"
        raise RowError("no_tags", f"{at}: conversations: got a response without a {missing} span")
    return row


ADAPTERS: Mapping[str, Adapter] = {
    "rows": Adapter(),
    "chartqa": Adapter(
        {
            "image": IMAGE,
            "query": TEXT,
            "label": TEXT_OR_TEXTS,
            "human_or_machine": maybe(TEXT),
        },
        _chartqa,
    ),
    "geometry3k": Adapter(
        {
            "images": IMAGES,
            "problem": TEXT,
            "answer": TEXT,
            "id": maybe(TEXT_OR_NUMBER),
            "choices": maybe(TEXTS),
            "ground_truth": maybe(TEXT),
        },
        # The problem does not show the choices: its key is the value.
        uninterpreted=("choices", "ground_truth"),
    ),
    "virl39k": Adapter(
        {
            "question": TEXT,
            "answer": TEXT,
            "image": IMAGES,
            "qid": maybe(TEXT),
            "category": maybe(TEXT),
            "source": maybe(TEXT),
            "PassRate_32BTrained": maybe(NUMBER),
            "PassRate_7BBase": maybe(NUMBER),
        }
    ),
    "vision_r1_cold": Adapter(
        {
            "conversations": MESSAGES,
            "image": maybe(IMAGES),
            "images": maybe(IMAGES),
            "id": maybe(TEXT_OR_NUMBER),
            "system": maybe(TEXT),
        },
        _vision_r1_cold,
    ),
}
"""By the name that `sources.adapter` gives."""
