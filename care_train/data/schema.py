"""The image-prompt-answer schema every source is brought to (Sec. 8.1)."""

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from care_train.data.answers import (
    AnswerType,
    Options,
    answer_text,
    answer_type,
    is_empty,
    option_key,
    options_in,
    plain,
    read_options,
    spelled,
    tolerance,
)
from care_train.data.columns import (
    IMAGE_PLACEHOLDER,
    Conversation,
    RowError,
    describe,
    is_conversation,
    read_conversation,
    split_response,
    split_solution,
)
from care_train.data.images import ImageRef, image_digest, image_refs, is_image

# Of each tuple the first column that holds something is read.
PROMPT_COLUMNS = ("prompt", "problem", "question", "query", "messages", "conversations")
"""A prompt's: text or chat messages."""

_VERL_ANSWER = "reward_model.ground_truth"
ANSWER_COLUMNS = ("answer", "solution", "ground_truth", _VERL_ANSWER)
"""A key's; the last is verl's, inside another column."""

RESPONSE_COLUMNS = ("completion", "response")
"""Those of a response with tags, where the messages hold none."""

IMAGE_COLUMNS = ("images", "image")
OPTION_COLUMNS = ("options", "choices")
_TEXT_COLUMNS = {*PROMPT_COLUMNS, *ANSWER_COLUMNS, *RESPONSE_COLUMNS, *OPTION_COLUMNS}

_LIST_OF_TEXT = re.compile(r"\s*\[\s*[\"']")
_Value = TypeVar("_Value")


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
    answer_type: AnswerType | None = None
    """How answers are compared with the key. None: inferred from the key and the options."""
    options: tuple[str, ...] = ()
    """The texts of a multiple-choice question, in the order of their letters."""
    tolerance: float | None = None
    """Largest distance of a number, relative to the key. None: the run's setting."""
    source: str = ""
    """The data set this row came from."""
    location: str = ""
    """File and row, as errors name them: `train.jsonl: row 12`."""
    is_conversation: bool = False
    """The row's prompt was chat messages: TRL's reward functions get them as such."""
    columns: Mapping[str, Any] = field(default_factory=dict, repr=False, hash=False)
    """The row's other columns, as reward functions get them."""
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
    """A checksum of what a run reads of a row: its texts, its options, its images' encoded bytes.

    Args:
        sample: the row.
        image_digests: checksums of image files by path, filled: files shared by rows are read once.

    Raises:
        RowError: an image file that is missing or too large, naming the row.
    """
    known = {} if image_digests is None else image_digests
    digests = []
    for ref in sample.images:
        is_file = isinstance(ref, (str, Path))
        try:
            digest = known.get(ref) if is_file else None
            digest = digest or image_digest(ref)
        except OSError as error:
            raise RowError(
                "image_missing", f"{sample.location or sample.id}: image {ref}: {error}"
            ) from None
        if is_file:
            known[ref] = digest
        digests.append(digest)
    parts: list[Any] = [sample.id, sample.prompt, sample.answer, sample.rationale]
    parts += [sample.failed_rationale, digests]
    compared = (sample.answer_type, sample.options, sample.tolerance)
    if any(compared):
        parts.append(compared)
    return hashlib.blake2b(json.dumps(parts).encode(), digest_size=16).hexdigest()


def sample_from_row(
    row: Mapping[str, Any],
    *,
    location: str,
    base_dir: Path,
    id: str,
    source: str = "",
    needs_prompt: bool = True,
    uninterpreted: tuple[str, ...] = (),
) -> Sample:
    """Bring one row to the schema: a plain one, or one of EasyR1's, verl's or TRL's.

    Every row passes here: of runs, builds, `care-train verify`, `doctor` and evaluation.

    Args:
        row: columns by name; docs/data.md says what is read.
        location: file and row, for errors.
        base_dir: the folder that relative image paths start from.
        id: the sample's id.
        source: the data set's name.
        needs_prompt: False where a row without a prompt is enough, as for a verdict.
        uninterpreted: columns that stay as they are, though their names are read elsewhere.

    Raises:
        RowError: a column missing, empty or of the wrong type, or a key that is none of the
            options, naming row, field, what it got, what was wanted and the fix.
    """
    read = {name: plain(value) for name, value in row.items() if name not in uninterpreted}
    if isinstance(verl := read.get("reward_model"), Mapping):
        read[_VERL_ANSWER] = plain(verl.get("ground_truth"))
    prompt_column, talk = _prompt(read, location, needs_prompt)
    answer_column, value, rationale = _answer(read, talk, location)
    options_column = _column(read, OPTION_COLUMNS)
    if options_column is None or is_empty(read[options_column]):
        options_column, options = None, options_in(talk.prompt)
    else:
        options = _checked(read_options, read, options_column, location, "options")
    kind = _checked(answer_type, read, "answer_type", location)
    answer, options = _key(value, options, kind, options_column, f"{location}: {answer_column}")
    images_column = _column(read, IMAGE_COLUMNS)
    images = read[images_column] if images_column else None
    if talk.images and is_empty(images):
        images_column, images = prompt_column, talk.images
    rationale = _optional_text(read, "rationale", location) or rationale
    failed_rationale = _optional_text(read, "failed_rationale", location)
    for name, texts in (
        ("prompt", [talk.prompt]),
        ("answer", [answer]),
        ("rationale", [rationale]),
        ("failed_rationale", [failed_rationale]),
        ("options", options.texts),
    ):
        _check_unicode(texts, f"{location}: {name}")
    taken = {prompt_column, "answer", "rationale", "failed_rationale", *IMAGE_COLUMNS}
    columns = {name: value for name, value in row.items() if name not in taken}
    refs = image_refs(images, column=images_column or "", base_dir=base_dir, at=location)
    for name in columns if needs_prompt and not refs else ():
        if name not in _TEXT_COLUMNS and is_image(read.get(name)):
            raise RowError(
                "image_column",
                f"{location}: {name}: got an image in a row of none, wanted it in images or image "
                "(a list, where there are several): rename the column, or drop it",
            )
    columns |= {"system": talk.system} if talk.system else {}
    return Sample(
        id=id,
        prompt=talk.prompt,
        answer=answer,
        rationale=rationale,
        failed_rationale=failed_rationale,
        images=refs,
        answer_type=kind,
        options=options.texts,
        tolerance=_checked(tolerance, read, "tolerance", location),
        source=source,
        location=location,
        is_conversation=is_conversation(read.get(prompt_column)),
        columns=columns,
    )


def _column(row: Mapping[str, Any], names: tuple[str, ...]) -> str | None:
    """The first column that holds something; else the first that is there, for errors to name."""
    filled = (name for name in names if not is_empty(row.get(name)))
    return next(filled, next((name for name in names if row.get(name) is not None), None))


def _prompt(row: Mapping[str, Any], at: str, is_needed: bool) -> tuple[str, Conversation]:
    column = _column(row, PROMPT_COLUMNS)
    if column is None and not is_needed:
        return "prompt", Conversation("")
    if column is None:
        raise RowError(
            "no_prompt",
            f"{at}: prompt: got {_columns_of(row, PROMPT_COLUMNS)}, wanted text or chat messages "
            f"in one of {', '.join(PROMPT_COLUMNS)}: rename the column that holds the question",
        )
    value = row[column]
    if is_conversation(value):
        talk = read_conversation(value, column=column, at=at)
    elif isinstance(value, str):
        talk = Conversation(value)
    else:
        wanted = "wanted text or chat messages: convert the column"
        raise RowError("prompt_type", f"{at}: {column}: got {describe(value)}, {wanted}")
    if is_needed and not talk.prompt.strip():
        raise RowError(
            "empty_prompt", f"{at}: {column}: got empty text, wanted some: fill or drop the row"
        )
    return column, talk


def _answer(row: Mapping[str, Any], talk: Conversation, at: str) -> tuple[str, object, str | None]:
    """(column, answer, rationale): of an answer column, or of a response with tags."""
    response = talk.response
    if response is None:
        response = row.get(_column(row, RESPONSE_COLUMNS) or "")
        if isinstance(response, (list, tuple)) and is_conversation(response):
            response = response[-1].get("content")
    rationale, answered = split_response(response if isinstance(response, str) else "")
    column = _column(row, ANSWER_COLUMNS) or "answer"
    value = row.get(column)
    if is_empty(value):
        if answered is None:
            got = _columns_of(row, ANSWER_COLUMNS) if value is None else describe(value)
            raise RowError(
                "empty_answer",
                f"{at}: {column}: got {got}, wanted text, a number or a boolean in one of "
                f"{', '.join(ANSWER_COLUMNS)}, or a response (an assistant turn, "
                f"{' or '.join(RESPONSE_COLUMNS)}) with an <answer> span: rename the column that "
                "holds the final answer, or drop the row",
            )
        return "response", answered, rationale
    # verl's keys may be a list of one as JSON text: `["34"]`.
    listed = spelled(value) if isinstance(value, str) and _LIST_OF_TEXT.match(value) else value
    if isinstance(listed, (list, tuple)) and len(listed) == 1:
        value = listed[0]
    if isinstance(value, str):
        own_rationale, value = split_solution(value)
        rationale = rationale or own_rationale
    return column, value, rationale


def _columns_of(row: Mapping[str, Any], names: tuple[str, ...]) -> str:
    empty = " and ".join(repr(name) for name in names if name in row)
    none = f"nothing in {empty}, and " if empty else ""
    have = f"the columns {', '.join(map(repr, row))}" if row else "no columns"
    return none + have


def _key(
    value: object, options: Options, kind: AnswerType | None, column: str | None, at: str
) -> tuple[str, Options]:
    """The key as text, and the options if it is one of them or is not held to be one."""
    try:
        answer = answer_text(value).strip()
    except ValueError as error:
        raise RowError("answer_type", f"{at}: {error}") from None
    if not answer:
        raise RowError("empty_answer", f"{at}: got empty text, wanted some: fill or drop the row")
    if not options.texts or kind not in (None, AnswerType.CHOICE):
        return answer, options if column else Options()
    key = option_key(answer, options)
    if key is None and isinstance(value, bool):
        key = option_key(str(value), options)
    if key is not None:
        return key, options
    if column is None:
        return answer, Options()
    shown = ", ".join(options.texts)
    raise RowError(
        "key_is_no_option",
        f"{at}: got {answer[:60]!r}, none of the {len(options.texts)} texts in {column} "
        f"({shown[:120]}) nor a letter from A to {options.last_letter}: write the letter or the "
        "option's text (an index counts only where the options have numbers as labels), or set "
        "answer_type to how it is compared",
    )


def _checked(
    read: Callable[[Any], _Value], row: Mapping[str, Any], column: str, at: str, reason: str = ""
) -> _Value:
    """What `read` makes of a column; its ValueError as a RowError, its reason the column's name."""
    try:
        return read(row.get(column))
    except ValueError as error:
        raise RowError(reason or column, f"{at}: {column}: {error}") from None


def _optional_text(row: Mapping[str, Any], column: str, at: str) -> str | None:
    value = row.get(column)
    if is_empty(value):
        return None
    if not isinstance(value, str):
        wanted = "wanted text: convert the column to strings"
        raise RowError("text_type", f"{at}: {column}: got {describe(value)}, {wanted}")
    return value


def _check_unicode(texts: Iterable[str | None], at: str) -> None:
    try:
        "".join(text or "" for text in texts).encode()
    except UnicodeEncodeError as error:
        raise RowError(
            "not_unicode",
            f"{at}: got a lone surrogate {error.object[error.start]!r} at character "
            f"{error.start + 1}, which no tokenizer takes, wanted text: correct or drop the row",
        ) from None
