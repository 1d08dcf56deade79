"""From a published schema to the plain columns that `sample_from_row` reads.

docs/data.md says where each schema was read.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from care_train.data.answer_types import chart_answer_type
from care_train.data.building.kinds import (
    BYTES,
    IMAGE,
    LABEL,
    MESSAGES,
    NUMBER,
    TEXT,
    Column,
    list_of,
)
from care_train.data.conversations import (
    is_conversation,
    read_conversation,
    split_response,
    strip_boxed,
)
from care_train.data.row_error import RowError

Row = dict[str, Any]

_ONE_IMAGE = (IMAGE, BYTES, TEXT)
_IMAGES = (*map(list_of, _ONE_IMAGE), *_ONE_IMAGE)


@dataclass(frozen=True)
class Adapter:
    """A published schema and its way to plain columns."""

    columns: tuple[Column, ...]
    convert: Callable[[Row, str], Row]
    """(row, file and row for errors) -> plain columns; raises RowError."""


def _plain(row: Row, at: str) -> Row:
    return row


def _chartqa(row: Row, at: str) -> Row:
    answers = row.pop("label")
    if not isinstance(answers, list):
        answers = [answers]
    if len(answers) != 1:
        raise RowError("several_answers", f"{at}: label: got {len(answers)} keys, wanted one")
    query, image = row.pop("query"), row.pop("image")
    kind = chart_answer_type(answers[0] or "")
    return row | {"prompt": query, "answer": answers[0], "images": image, "answer_type": kind}


def _virl39k(row: Row, at: str) -> Row:
    question, answer, image = row.pop("question"), row.pop("answer"), row.pop("image")
    answer = strip_boxed(answer) if isinstance(answer, str) else answer
    return row | {"prompt": question, "answer": answer, "images": image}


def _vision_r1_cold(row: Row, at: str) -> Row:
    messages = row.pop("conversations")
    if not is_conversation(messages):
        raise RowError("message", f"{at}: conversations: got no messages, wanted from and value")
    talk = read_conversation(messages, column="conversations", at=at)
    rationale, answer = split_response(talk.response or "")
    if rationale is None or answer is None:
        missing = "<think>" if rationale is None else "<answer>"
        raise RowError("no_tags", f"{at}: conversations: got a response without a {missing} span")
    # One file has `image`, the other `images`; either is a path.
    image = row.pop("image", None) or row.pop("images", None)
    system = row.pop("system", None) or talk.system
    plain = {"prompt": talk.prompt, "answer": answer, "rationale": rationale, "images": image}
    return row | plain | ({"system": system} if system else {})


ADAPTERS: Mapping[str, Adapter] = {
    "rows": Adapter((), _plain),
    "easy_vqa": Adapter((), _plain),
    "chartqa": Adapter(
        (
            Column("image", _ONE_IMAGE),
            Column("query", (TEXT,)),
            Column("label", (list_of(TEXT), TEXT)),
            Column("human_or_machine", (LABEL, TEXT), required=False),
        ),
        _chartqa,
    ),
    "geometry3k": Adapter(
        (
            Column("images", _IMAGES),
            Column("problem", (TEXT,)),
            Column("answer", (TEXT,)),
            Column("id", (NUMBER, TEXT), required=False),
            Column("choices", (list_of(TEXT),), required=False),
            Column("ground_truth", (TEXT,), required=False),
        ),
        _plain,
    ),
    "virl39k": Adapter(
        (
            Column("question", (TEXT,)),
            Column("answer", (TEXT,)),
            Column("image", _IMAGES),
            Column("qid", (TEXT,), required=False),
            Column("category", (TEXT,), required=False),
            Column("source", (TEXT,), required=False),
            Column("PassRate_32BTrained", (NUMBER,), required=False),
            Column("PassRate_7BBase", (NUMBER,), required=False),
        ),
        _virl39k,
    ),
    "vision_r1_cold": Adapter(
        (
            Column("conversations", (MESSAGES,)),
            Column("image", _IMAGES, required=False),
            Column("images", _IMAGES, required=False),
            Column("id", (TEXT, NUMBER), required=False),
            Column("system", (TEXT,), required=False),
        ),
        _vision_r1_cold,
    ),
}
"""By the name that `sources.adapter` gives."""
