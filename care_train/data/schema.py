"""The image-prompt-answer schema every source is brought to (Sec. 8.1)."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path
from typing import Any

from PIL import Image

ImageRef = str | Path | bytes | Image.Image
"""A file's path, an encoded image's bytes, or an open image."""

IMAGE_PLACEHOLDER = "<image>"
"""Where an image goes in a prompt's text."""

PROMPT_COLUMNS = ("prompt", "problem", "question")
"""Columns a prompt is read from; the first one present wins."""

IMAGE_COLUMNS = ("images", "image")
"""Columns images are read from; the first one present wins."""

_READ_COLUMNS = {"answer", "rationale", "failed_rationale"}


@dataclass(frozen=True)
class Sample:
    """One prompt with its images and the answer a verifier compares with."""

    id: str
    """Stable over runs: seeds are derived from it."""
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

    def __post_init__(self) -> None:
        placeholders = self.prompt.count(IMAGE_PLACEHOLDER)
        if placeholders not in (0, len(self.images)):
            raise ValueError(
                f"{self.location or self.id}: prompt: got {placeholders} {IMAGE_PLACEHOLDER} "
                f"placeholders for {len(self.images)} images, wanted one per image, or none to put "
                "the images first: add or remove placeholders"
            )


def sample_from_row(
    row: Mapping[str, Any], *, location: str, base_dir: Path, id: str, source: str = ""
) -> Sample:
    """Bring one row to the schema.

    Args:
        row: columns by name: prompt | problem | question; answer (text, a number, or a boolean,
            which becomes yes or no); optionally images | image, rationale and failed_rationale.
        location: file and row, for errors.
        base_dir: the folder that relative image paths start from.
        id: the sample's id.
        source: the data set's name.

    Raises:
        ValueError: a column missing, empty or of the wrong type, naming row, field and fix.
    """
    prompt_column = _first_present(row, PROMPT_COLUMNS)
    image_column = _first_present(row, IMAGE_COLUMNS)
    if prompt_column is None:
        raise ValueError(
            f"{location}: prompt: got columns {', '.join(map(repr, row)) or 'none'}, wanted one of "
            f"{', '.join(PROMPT_COLUMNS)}: rename the column that holds the question"
        )
    read = {prompt_column, image_column, *_READ_COLUMNS}
    return Sample(
        id=id,
        prompt=_text(row[prompt_column], field=prompt_column, location=location),
        answer=_answer(row.get("answer"), location=location),
        images=_images(row.get(image_column), column=image_column, base_dir=base_dir, at=location)
        if image_column
        else (),
        rationale=_optional_text(row, "rationale", location=location),
        failed_rationale=_optional_text(row, "failed_rationale", location=location),
        source=source,
        location=location,
        columns={name: value for name, value in row.items() if name not in read},
    )


def _first_present(row: Mapping[str, Any], names: tuple[str, ...]) -> str | None:
    return next((name for name in names if row.get(name) is not None), None)


def _text(value: object, *, field: str, location: str) -> str:
    if not isinstance(value, str):
        raise ValueError(
            f"{location}: {field}: got {_describe(value)}, wanted text: convert the column to "
            "strings"
        )
    if not value.strip():
        raise ValueError(f"{location}: {field}: got empty text, wanted some: fill or drop the row")
    return value


def _optional_text(row: Mapping[str, Any], field: str, *, location: str) -> str | None:
    value = row.get(field)
    if value is None or (isinstance(value, str) and not value.strip()):
        return None
    return _text(value, field=field, location=location)


def _answer(value: object, *, location: str) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError(
                f"{location}: answer: got {value}, wanted a finite number: correct or drop the row"
            )
        # Written out without an exponent: the verifier compares plain decimals.
        return format(Decimal(repr(value)), "f")
    if isinstance(value, int):
        return str(value)
    if not isinstance(value, str):
        raise ValueError(
            f"{location}: answer: got {_describe(value)}, wanted text, a number or a boolean: keep "
            "one final answer per row"
        )
    return _text(value, field="answer", location=location)


def _images(value: object, *, column: str, base_dir: Path, at: str) -> tuple[ImageRef, ...]:
    entries = value if isinstance(value, (list, tuple)) else [value]
    return tuple(_image_ref(entry, column=column, base_dir=base_dir, at=at) for entry in entries)


def _image_ref(value: object, *, column: str, base_dir: Path, at: str) -> ImageRef:
    # The datasets library stores an image as {"bytes": ..., "path": ...}, either of them None.
    if isinstance(value, Mapping):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, (str, Path)) and str(value):
        return base_dir / value
    if isinstance(value, (bytes, Image.Image)):
        return value
    raise ValueError(
        f"{at}: {column}: got {_describe(value)}, wanted a path, encoded bytes, an image, or a "
        "list of these: correct or drop the row"
    )


def _describe(value: object) -> str:
    if value is None:
        return "nothing"
    if value == "":
        return "empty text"
    return f"a {type(value).__name__}"
