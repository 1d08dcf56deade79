"""The image-prompt-answer schema every source is brought to (Sec. 8.1)."""

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path
from typing import Any

from care_train.data.conversations import (
    IMAGE_PLACEHOLDER,
    Conversation,
    is_conversation,
    read_conversation,
    split_response,
)
from care_train.data.image_refs import ImageRef, image_digest, image_refs
from care_train.data.row_error import RowError, describe

PROMPT_COLUMNS = ("prompt", "problem", "question", "query", "messages", "conversations")
"""Columns a prompt is read from, as text or as chat messages; the first one present wins."""

ANSWER_COLUMNS = ("answer", "solution", "ground_truth")
"""Columns an answer is read from; the first one present wins, verl's `reward_model` comes last."""

IMAGE_COLUMNS = ("images", "image")
"""Columns images are read from; the first one present wins."""


@dataclass(frozen=True)
class Sample:
    """One prompt with its images and the answer a verifier compares with."""

    id: str
    """Stable over runs: seeds are derived from it (`draw`)."""
    prompt: str
    """The user's text. `<image>` marks where each image goes; without one, images come first."""
    answer: str
    images: tuple[ImageRef, ...] = field(default=(), repr=False)
    rationale: str | None = None
    """The right reasoning, for the cold start."""
    failed_rationale: str | None = None
    """A wrong reasoning that a cold-start repair starts from."""
    source: str = ""
    """The data set this row came from."""
    location: str = ""
    """File and row, as errors name them: `train.jsonl: row 12`."""
    columns: Mapping[str, Any] = field(default_factory=dict, repr=False, hash=False)
    """The row's other columns."""
    visit: int = 0
    """How often training had gone through all rows before it came to this one again."""

    @property
    def draw(self) -> str:
        """What seeds are made from: a prompt that a step shows twice gets other rollouts."""
        return f"{self.id}/{self.visit}" if self.visit else self.id

    def __post_init__(self) -> None:
        placeholders = self.prompt.count(IMAGE_PLACEHOLDER)
        if placeholders not in (0, len(self.images)):
            raise RowError(
                "placeholders",
                f"{self.location or self.id}: prompt: got {placeholders} {IMAGE_PLACEHOLDER} "
                f"placeholders for {len(self.images)} images, wanted one per image, or none to put "
                "the images first: add or remove placeholders",
            )


def sample_digest(sample: Sample, image_digests: dict[ImageRef, str] | None = None) -> str:
    """A checksum of what a run reads of a row: its texts and its images' encoded bytes.

    Args:
        sample: the row.
        image_digests: checksums of image files by path, filled: files shared by rows are read once.

    Raises:
        ValueError: a missing image file, naming the row.
    """
    known = {} if image_digests is None else image_digests
    digests = []
    for ref in sample.images:
        if isinstance(ref, (str, Path)) and ref in known:
            digests.append(known[ref])
            continue
        try:
            digests.append(image_digest(ref))
        except OSError as error:
            raise RowError(
                "image_missing", f"{sample.location or sample.id}: image {ref}: {error}"
            ) from None
        if isinstance(ref, (str, Path)):
            known[ref] = digests[-1]
    texts = (sample.id, sample.prompt, sample.answer, sample.rationale, sample.failed_rationale)
    content = json.dumps([*texts, digests]).encode()
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def sample_from_row(
    row: Mapping[str, Any], *, location: str, base_dir: Path, id: str, source: str = ""
) -> Sample:
    """Bring one row to the schema: a plain one, or one of EasyR1's, verl's or TRL's.

    Args:
        row: columns by name. The prompt is text, or chat messages of one user turn, whose
            assistant turn is a response with tags. The answer is text, a number, or a boolean
            (yes or no), stands in `reward_model.ground_truth`, or in that response. Optionally
            images, rationale and failed_rationale.
        location: file and row, for errors.
        base_dir: the folder that relative image paths start from.
        id: the sample's id.
        source: the data set's name.

    Raises:
        RowError: a column missing, empty or of the wrong type, naming row, field and fix.
    """
    prompt_column = _first_present(row, PROMPT_COLUMNS)
    if prompt_column is None:
        raise RowError(
            "no_prompt",
            f"{location}: prompt: got columns {', '.join(map(repr, row)) or 'none'}, wanted one of "
            f"{', '.join(PROMPT_COLUMNS)}: rename the column that holds the question",
        )
    talk = _conversation(row[prompt_column], column=prompt_column, location=location)
    answer_column, answer_value = _find_answer(row)
    rationale, answer = _response(row, talk)
    if answer is None or answer_value is not None:
        answer = _answer(answer_value, column=answer_column, location=location)
        tagged_rationale, tagged_answer = split_response(answer)
        answer = tagged_answer or answer
        rationale = rationale or tagged_rationale
    images_column = _first_present(row, IMAGE_COLUMNS)
    column = images_column or prompt_column
    held = row[images_column] if images_column else list(talk.images)
    read = {prompt_column, images_column, answer_column, "rationale", "failed_rationale"}
    columns = {name: value for name, value in row.items() if name not in read}
    if talk.system:
        columns["system"] = talk.system
    return Sample(
        id=id,
        prompt=_text(talk.prompt, field=prompt_column, location=location, reason="empty_prompt"),
        answer=_text(answer, field=answer_column, location=location, reason="empty_answer"),
        images=image_refs(held, column=column, base_dir=base_dir, at=location),
        rationale=_optional_text(row, "rationale", location=location) or rationale,
        failed_rationale=_optional_text(row, "failed_rationale", location=location),
        source=source,
        location=location,
        columns=columns,
    )


def _first_present(row: Mapping[str, Any], names: tuple[str, ...]) -> str | None:
    return next((name for name in names if row.get(name) is not None), None)


def _conversation(value: object, *, column: str, location: str) -> Conversation:
    if is_conversation(value):
        assert isinstance(value, (list, tuple))
        return read_conversation(value, column=column, at=location)
    if not isinstance(value, str):
        raise RowError(
            "prompt_type",
            f"{location}: {column}: got {describe(value)}, wanted text or chat messages: convert "
            "the column",
        )
    return Conversation(value)


def _find_answer(row: Mapping[str, Any]) -> tuple[str, object]:
    """(column, value) of the key; (answer, None) without any."""
    if column := _first_present(row, ANSWER_COLUMNS):
        return column, row[column]
    reward_model = row.get("reward_model")
    if not isinstance(reward_model, Mapping):
        return "answer", None
    value = reward_model.get("ground_truth")
    if isinstance(value, (list, tuple)) and len(value) == 1:
        value = value[0]
    return "reward_model.ground_truth", value


def _response(row: Mapping[str, Any], talk: Conversation) -> tuple[str | None, str | None]:
    """(rationale, answer) of the assistant's turn or of TRL's `completion`."""
    text, completion = talk.response, row.get("completion")
    if text is None and is_conversation(completion):
        last = completion[-1] if completion else {}
        completion = last.get("content")
    if text is None and isinstance(completion, str):
        text = completion
    return split_response(text) if text is not None else (None, None)


def _text(value: object, *, field: str, location: str, reason: str = "text_type") -> str:
    if not isinstance(value, str):
        raise RowError(
            "text_type",
            f"{location}: {field}: got {describe(value)}, wanted text: convert the column to "
            "strings",
        )
    if not value.strip():
        raise RowError(
            reason, f"{location}: {field}: got empty text, wanted some: fill or drop the row"
        )
    return value


def _optional_text(row: Mapping[str, Any], field: str, *, location: str) -> str | None:
    value = row.get(field)
    if value is None or (isinstance(value, str) and not value.strip()):
        return None
    return _text(value, field=field, location=location)


def _answer(value: object, *, column: str, location: str) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        if not math.isfinite(value):
            raise RowError(
                "answer_type",
                f"{location}: {column}: got {value}, wanted a finite number: correct or drop the "
                "row",
            )
        # Written out without an exponent: the verifier compares plain decimals.
        return format(Decimal(repr(value)), "f")
    if isinstance(value, int):
        return str(value)
    if not isinstance(value, str):
        raise RowError(
            "empty_answer" if value is None else "answer_type",
            f"{location}: {column}: got {describe(value)}, wanted text, a number or a boolean: "
            "keep one final answer per row",
        )
    return _text(value, field=column, location=location, reason="empty_answer")
