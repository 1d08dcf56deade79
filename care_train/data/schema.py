"""The image-prompt-answer schema every source is brought to (Sec. 8.1)."""

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from care_train.data.answers import (
    ANSWER_COLUMNS,
    RESPONSE_COLUMNS,
    AnswerType,
    accepted_answers,
    answer_type,
    find_key,
    read_key,
    tolerance,
)
from care_train.data.columns import (
    IMAGE_PLACEHOLDER,
    Conversation,
    RowError,
    describe,
    filled_column,
    is_conversation,
    is_empty,
    missing_columns,
    nested,
    plain,
    read_conversation,
)
from care_train.data.images import ImageRef, image_digest, image_refs, is_seen
from care_train.data.options import letter_columns, options_in, read_options

# Of each tuple the first column that holds something is read.
PROMPT_COLUMNS = (
    *("prompt", "problem", "question", "query"),
    *("messages", "conversations", "message"),
)
"""A prompt's: text, or chat messages, which may be JSON text."""

IMAGE_COLUMNS = ("images", "image")
OPTION_COLUMNS = ("options", "choices")
_TEXT_COLUMNS = {*PROMPT_COLUMNS, *ANSWER_COLUMNS, *RESPONSE_COLUMNS, *OPTION_COLUMNS}

_Value = TypeVar("_Value")


@dataclass(frozen=True)
class Sample:
    """One prompt with its images and the answer a verifier compares with."""

    id: str
    """Stable over runs: seeds are derived from it (`draw`)."""
    prompt: str
    """The user's text. `<image>` marks where each image goes; without one, images come first."""
    answer: str
    """The key; one that spells a list of texts accepts any of them."""
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
    key: Any = field(default=None, repr=False, hash=False)
    """The key as it stands where it is a list or mapping, as reward functions get it."""
    visit: int = 0
    """How often training had gone through all rows before it came to this one again."""

    @property
    def draw(self) -> str:
        """What seeds are made from: a prompt that a step shows twice gets other rollouts."""
        return f"{self.id}/{self.visit}" if self.visit else self.id

    @property
    def where(self) -> str:
        """What errors call this row."""
        return self.location or self.id

    @property
    def right_answer(self) -> str:
        """What a right response says: of several keys the first."""
        return accepted_answers(self.answer)[0]

    @property
    def hides_options(self) -> bool:
        """The key is an option's letter, and no option's text is in the prompt."""
        texts = self.options
        return bool(texts) and self.answer not in texts and not any(t in self.prompt for t in texts)

    def __post_init__(self) -> None:
        placeholders = self.prompt.count(IMAGE_PLACEHOLDER)
        if placeholders not in (0, len(self.images)):
            raise RowError(
                "placeholders",
                f"{self.where}: prompt: got {placeholders} {IMAGE_PLACEHOLDER} "
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
        digest = known.get(ref) if is_file else None
        digest = digest or image_digest(ref, sample.where)
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
    prompt_column, talk = _prompt(read, location, needs_prompt)
    found = find_key(read, talk, location)
    options_column = filled_column(read, OPTION_COLUMNS)
    if options_column is None or is_empty(read[options_column]):
        options_column, options = None, letter_columns(read) or options_in(talk.prompt)
    else:
        options = _checked(read_options, read, options_column, location, "options")
    kind = _checked(answer_type, read, "answer_type", location)
    at = f"{location}: {found.column}"
    answer, kind, options = read_key(found, options, kind, options_column, at)
    images_column = filled_column(read, IMAGE_COLUMNS)
    images = read[images_column] if images_column else None
    if talk.images and is_empty(images):
        images_column, images = prompt_column, talk.images
    rationale = _optional_text(read, "rationale", location) or found.rationale
    failed_rationale = _optional_text(read, "failed_rationale", location)
    for name, texts in (
        ("prompt", [talk.prompt]),
        ("answer", [answer]),
        ("rationale", [rationale]),
        ("failed_rationale", [failed_rationale]),
        ("options", options.texts),
    ):
        _check_unicode(texts, f"{location}: {name}")
    taken = {prompt_column, "rationale", "failed_rationale", *IMAGE_COLUMNS}
    for name in {"answer", "ground_truth"} & read.keys():
        if is_empty(read[name]) or read[name] == answer:
            taken.add(name)
    columns = {name: value for name, value in row.items() if name not in taken}
    refs = image_refs(images, column=images_column or "", base_dir=base_dir, at=location)
    for name in columns if needs_prompt and not refs else ():
        if name not in _TEXT_COLUMNS and is_seen(name, read.get(name), base_dir):
            raise RowError(
                "image_column",
                f"{location}: {name}: got an image or video in a row without images, wanted it in "
                "images or image (a list, where there are several; videos are not read): rename or "
                "drop the column",
            )
    columns |= {"system": talk.system} if talk.system else {}
    return Sample(
        id=id,
        prompt=talk.prompt,
        answer=answer,
        key=found.value if isinstance(found.value, (list, tuple, Mapping)) else None,
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


def _prompt(row: Mapping[str, Any], at: str, is_needed: bool) -> tuple[str, Conversation]:
    column = filled_column(row, PROMPT_COLUMNS)
    if column is None and not is_needed:
        return "prompt", Conversation("")
    if column is None:
        raise RowError(
            "no_prompt",
            f"{at}: prompt: got {missing_columns(row, PROMPT_COLUMNS)}, wanted text or chat "
            f"messages in one of {', '.join(PROMPT_COLUMNS)}: rename the question's column",
        )
    value = row[column]
    talks = nested(value) if isinstance(value, str) else value
    if is_conversation(talks):
        talk = read_conversation(talks, column=column, at=at)
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
