"""What a worker makes of a chunk of rows: adapted, cleaned, images decoded once and hashed.

It is written as a part, a function of the chunk alone, so a killed build goes on with those that
are missing.
"""

import json
import os
import re
import struct
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from care_train.config.data import BuildSettings, CleanSettings, SourceSettings
from care_train.data.answers import AnswerType, split_response
from care_train.data.built import built_row, built_schema
from care_train.data.columns import RowError, check_row, read_conversation
from care_train.data.dedup import duplicate_keys, look_of
from care_train.data.images import ImageRef, encoded_image, load_image
from care_train.data.rows import named_columns
from care_train.data.schema import Sample, sample_from_row

Row = dict[str, Any]

_NUMBER = re.compile(r"[-+]?[$€£]?(?:\d{1,3}(?:,\d{3})+|\d+)?(?:\.\d+)?\s*%?")
_YEAR = re.compile(r"(?:1[89]|20|21)\d\d")

NUM_SHOWN = 200
"""Characters of a rejected row's prompt and answer."""

# They would be read as the end of a turn, or as an image.
_SPECIAL_TOKEN = re.compile(r"<\|[a-z_]+\|>")
_TAG = re.compile(r"</?(?:think|reasoning|answer)>")

# What zipfile raises on damaged, encrypted and unknown archives, by fault.
_ARCHIVE_ERRORS = (zipfile.BadZipFile, RuntimeError, zlib.error, EOFError, OSError, struct.error)


@dataclass(frozen=True)
class Adapter:
    """A published schema, and what `sample_from_row` does not read of one by itself.

    docs/data.md says where each was read.
    """

    columns: Mapping[str, str] = field(default_factory=dict)
    """What `check_row` holds every row to."""
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
            "image": "image",
            "query": "text",
            "label": "text or texts",
            "human_or_machine?": "text or null",
        },
        _chartqa,
    ),
    "geometry3k": Adapter(
        {
            "images": "image or images",
            "problem": "text",
            "answer": "text",
            "id?": "text or number or null",
            "choices?": "texts or null",
            "ground_truth?": "text or null",
        },
        # The problem does not show the choices: its key is the value.
        uninterpreted=("choices", "ground_truth"),
    ),
    "virl39k": Adapter(
        {
            "question": "text",
            "answer": "text",
            "image": "image or images",
            **dict.fromkeys(("qid?", "category?", "source?"), "text or null"),
            **dict.fromkeys(("PassRate_32BTrained?", "PassRate_7BBase?"), "number or null"),
        }
    ),
    "vision_r1_cold": Adapter(
        {
            "conversations": "messages",
            "image?": "image or images or null",
            "images?": "image or images or null",
            "id?": "text or number or null",
            "system?": "text or null",
        },
        _vision_r1_cold,
    ),
}
"""By the name that `sources.adapter` gives."""


@dataclass(frozen=True)
class Piece:
    """A chunk of a file's rows, and all that a worker needs to know of it."""

    settings: BuildSettings
    source: SourceSettings
    file: str
    """The file's name, as errors and ids give it."""
    labels: Mapping[str, list[str]]
    roots: tuple[Path, ...]
    """Folders and .zip files that relative image paths start from."""
    rows: Sequence[tuple[int, Any]]
    """Their numbers, from 1, and values."""
    part: Path
    """Where to write what becomes of them."""


def prepare(piece: Piece) -> None:
    """Write a piece's part: each row, usable or rejected with the reason, whole or not at all.

    What a build that was stopped has written stays.
    """
    if piece.part.is_file():
        return
    import pyarrow

    prepared = [_prepare(piece, number, value) for number, value in piece.rows]
    rows = [row for row in prepared if row is not None]
    note = {"source": piece.source.name, "file": piece.file}
    note |= {"num_filtered": len(prepared) - len(rows)}
    more = {
        "number": pyarrow.int64(),
        "keys": pyarrow.list_(pyarrow.int64()),
        "looks": pyarrow.list_(pyarrow.binary()),
        "reason": pyarrow.string(),
        "detail": pyarrow.string(),
    }
    schema = pyarrow.schema([*built_schema(), *more.items()], {"part": json.dumps(note)})
    partial = piece.part.with_suffix(".partial")
    with pyarrow.ipc.new_file(str(partial), schema) as writer:
        writer.write_table(pyarrow.Table.from_pylist(rows, schema))
    os.replace(partial, piece.part)


def _prepare(piece: Piece, number: int, value: Any) -> dict[str, Any] | None:
    """A row of the part; None: `where` leaves it out."""
    at = f"{piece.file}: row {number}"
    prompt = answer = ""
    try:
        row = named_columns(value, at=at, labels=piece.labels)
        if any(row.get(name) != wanted for name, wanted in piece.source.where.items()):
            return None
        sample = _adapt(piece, row, number, at)
        prompt, answer = sample.prompt, sample.answer
        _check_texts(sample, piece.settings.clean, at)
        images = tuple(_encoded(ref, piece, at) for ref in sample.images)
        looks = [_look(image, piece.settings.clean, at) for image in images]
    except RowError as error:
        texts = {"prompt": prompt[:NUM_SHOWN], "answer": answer[:NUM_SHOWN]}
        texts |= {"reason": error.reason, "detail": str(error)}
        # A rejected row may hold what no encoding takes.
        texts = {name: text.encode(errors="replace").decode() for name, text in texts.items()}
        return {"number": number, **texts}
    keys = duplicate_keys(prompt, looks, piece.settings.dedup.max_distance)
    kept = built_row(replace(sample, images=images))
    return kept | {"number": number, "keys": keys, "looks": looks}


def _adapt(piece: Piece, row: dict[str, Any], number: int, at: str) -> Sample:
    adapter = ADAPTERS[piece.source.adapter]
    check_row(piece.source.adapter, adapter.columns, row, at)
    sample = sample_from_row(
        adapter.convert(row, at),
        location=at,
        # Relative paths stay relative here: there may be several roots.
        base_dir=Path(),
        id=f"{piece.source.name}/{piece.file}/{number}",
        source=piece.source.name,
        uninterpreted=adapter.uninterpreted,
    )
    return replace(sample, prompt=sample.prompt.strip())


def _check_texts(sample: Sample, clean: CleanSettings, at: str) -> None:
    texts = {"prompt": sample.prompt, "answer": sample.answer, "rationale": sample.rationale or ""}
    limits = {"prompt": clean.max_prompt_chars, "answer": clean.max_answer_chars}
    for name, limit in limits.items():
        if len(texts[name]) > limit:
            got = f"{name}: got {len(texts[name])} characters"
            raise RowError(f"long_{name}", f"{at}: {got}, wanted {limit} at most")
    if len(sample.images) > clean.max_images:
        got = f"images: got {len(sample.images)}"
        raise RowError("many_images", f"{at}: {got}, wanted {clean.max_images} at most")
    for name, text in texts.items():
        if found := _SPECIAL_TOKEN.search(text):
            got = f"{name}: got {found[0]!r}"
            raise RowError("special_token", f"{at}: {got}, wanted plain text")
    if found := _TAG.search(sample.answer):
        got = f"answer: got {found[0]!r}"
        raise RowError("answer_tags", f"{at}: {got}, wanted the bare answer")
    if clean.require_rationale and sample.rationale is None:
        wanted = "wanted text: clean.require_rationale"
        raise RowError("no_rationale", f"{at}: rationale: got none, {wanted}")


def _encoded(ref: ImageRef, piece: Piece, at: str) -> bytes:
    limit = piece.settings.clean.max_image_bytes
    if isinstance(ref, Path):
        ref = _found(ref, piece.roots, limit, at)
    return encoded_image(ref, at, limit, "clean.max_image_bytes")


def _found(path: Path, roots: Sequence[Path], max_bytes: int, at: str) -> Path | bytes:
    """The file below one of the roots; what an archive holds, to one byte beyond the limit."""
    named = f"{at}: image {str(path)[:300]!r}"
    for root in roots:
        if root.suffix.lower() != ".zip" or not root.is_file():
            # Where Path.is_file raises, this is False: a path too long.
            if os.path.isfile(root / path):
                return root / path
            continue
        try:
            archive = _archive(root)
            if path.as_posix() in archive.NameToInfo:
                with archive.open(path.as_posix()) as member:
                    # What the archive says of a member's size is as untrusted as the member.
                    return member.read(max_bytes + 1)
        except _ARCHIVE_ERRORS as error:
            raise RowError("image_unreadable", f"{named}: {error}") from None
    raise RowError("image_missing", f"{named}: none in {', '.join(map(str, roots))}")


@lru_cache(maxsize=32)
def _archive(path: Path) -> zipfile.ZipFile:
    return zipfile.ZipFile(path)


def _look(data: bytes, clean: CleanSettings, at: str) -> bytes:
    limit = clean.max_image_pixels
    image = load_image(data, location=at, max_pixels=limit, limit_key="clean.max_image_pixels")
    width, height = image.size
    if max(width, height) > clean.max_aspect_ratio * min(width, height):
        raise RowError(
            "image_aspect",
            f"{at}: image of {width} x {height} pixels, wanted sides within a factor of "
            f"{clean.max_aspect_ratio:g}: clean.max_aspect_ratio",
        )
    return look_of(image)
