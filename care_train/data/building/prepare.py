"""One row after the other, in a worker: adapt, clean, decode once, hash."""

import hashlib
import re
import unicodedata
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from care_train.config import CleanSettings
from care_train.data.answer_types import AnswerType, options_of
from care_train.data.building.adapters import ADAPTERS
from care_train.data.building.readers import Chunk, rows_of
from care_train.data.conversations import IMAGE_PLACEHOLDER
from care_train.data.image_refs import ImageRef, encoded_image
from care_train.data.images import load_image
from care_train.data.row_error import RowError
from care_train.data.schema import Sample, sample_from_row

# They would be read as the end of a turn, or as an image.
_SPECIAL_TOKEN = re.compile(r"<\|[a-z_]+\|>")
_TAG = re.compile(r"</?(?:think|reasoning|answer)>")

_THUMBNAIL_SIDE = 8


@dataclass(frozen=True)
class ImageHash:
    """What an image looks like."""

    pixels: bytes
    """A checksum of its decoded pixels."""
    perceptual: bytes
    """imagehash's pHash: brightness, coarse."""
    thumbnail: bytes
    """8 x 8 RGB: pHash is blind to colour."""


@dataclass(frozen=True)
class Prepared:
    """A usable row."""

    number: int
    sample: Sample
    """Its images are encoded bytes."""
    answer_type: str | None
    options: tuple[str, ...]
    hashes: tuple[ImageHash, ...]


@dataclass(frozen=True)
class Rejected:
    """A row that goes to the quarantine."""

    number: int
    reason: str
    detail: str
    prompt: str = ""
    answer: str = ""


@dataclass(frozen=True)
class PreparedChunk:
    """What became of a chunk's rows, in order."""

    rows: list[Prepared | Rejected]
    num_filtered: int
    """Rows that `where` left out."""


@dataclass(frozen=True)
class Task:
    """All a worker needs to know about a file."""

    source: str
    adapter: str
    file: str
    """The file's name, as errors and ids give it."""
    roots: tuple[Path, ...]
    """Folders and .zip files that relative image paths start from."""
    where: Mapping[str, Any]
    labels: Mapping[str, list[str]]
    clean: CleanSettings
    hash_size: int


def prepare_chunk(task: Task, chunk: Chunk) -> PreparedChunk:
    """Each row of a chunk, usable or rejected with the reason."""
    rows: list[Prepared | Rejected] = []
    num_filtered = 0
    for number, row in rows_of(chunk):
        if isinstance(row, Mapping):
            row = _with_names(dict(row), task.labels)
            if any(row.get(name) != value for name, value in task.where.items()):
                num_filtered += 1
                continue
        rows.append(_prepare(task, number, row))
    return PreparedChunk(rows, num_filtered)


def normalized_text(text: str) -> str:
    """A prompt as duplicates are told: no case, white space, placeholders or closing marks."""
    text = unicodedata.normalize("NFKC", text.replace(IMAGE_PLACEHOLDER, " ")).casefold()
    return "".join(text.split()).rstrip(".?!:")


def _prepare(task: Task, number: int, row: Any) -> Prepared | Rejected:
    at = f"{task.file}: row {number}"
    if not isinstance(row, Mapping):
        got = f"not JSON ({row})" if isinstance(row, ValueError) else f"a {type(row).__name__}"
        return Rejected(number, "not_an_object", f"{at}: got {got}, wanted named columns")
    prompt = answer = ""
    try:
        sample = _adapt(task, row, number, at)
        prompt, answer = sample.prompt, sample.answer
        _check_texts(sample, task.clean, at)
        _check_type(sample.columns.get("answer_type"), at)
        images = [_encoded(ref, task, at) for ref in sample.images]
        hashes = tuple(_hash(image, task, at) for image in images)
    except RowError as error:
        return Rejected(number, error.reason, str(error), prompt[:200], answer[:200])
    columns = dict(sample.columns)
    options = _options(columns.pop("options", None), sample.prompt)
    kind = columns.pop("answer_type", None)
    stored = Sample(
        id=sample.id,
        prompt=sample.prompt,
        answer=sample.answer,
        images=tuple(images),
        rationale=sample.rationale,
        failed_rationale=sample.failed_rationale,
        source=task.source,
        location=at,
        columns=columns,
    )
    return Prepared(number, stored, kind, options, hashes)


def _adapt(task: Task, row: Mapping[str, Any], number: int, at: str) -> Sample:
    adapter = ADAPTERS[task.adapter]
    missing = [c.name for c in adapter.columns if c.required and row.get(c.name) is None]
    if missing:
        raise RowError("missing_column", f"{at}: {missing[0]}: got nothing, wanted a value")
    plain = adapter.convert(dict(row), at)
    for name in ("prompt", "problem", "question", "answer"):
        if isinstance(plain.get(name), str):
            plain[name] = plain[name].strip()
    # Relative paths stay relative here: there may be several roots.
    id = f"{task.source}/{task.file}/{number}"
    return sample_from_row(plain, location=at, base_dir=Path(), id=id, source=task.source)


def _check_texts(sample: Sample, clean: CleanSettings, at: str) -> None:
    def check(holds: bool, reason: str, message: str) -> None:
        if not holds:
            raise RowError(reason, f"{at}: {message}")

    limits = (
        ("prompt", len(sample.prompt), clean.max_prompt_chars),
        ("answer", len(sample.answer), clean.max_answer_chars),
    )
    for name, got, limit in limits:
        check(got <= limit, f"long_{name}", f"{name}: got {got} characters, wanted {limit} at most")
    got = len(sample.images)
    limit = clean.max_images
    check(got <= limit, "many_images", f"images: got {got}, wanted {limit} at most")
    texts = {"prompt": sample.prompt, "answer": sample.answer, "rationale": sample.rationale or ""}
    for name, text in texts.items():
        found = _SPECIAL_TOKEN.search(text)
        check(not found, "special_token", f"{name}: got {found and found[0]!r}, wanted plain text")
    found = _TAG.search(sample.answer)
    check(not found, "answer_tags", f"answer: got {found and found[0]!r}, wanted the bare answer")
    has = sample.rationale is not None or not clean.require_rationale
    check(has, "no_rationale", "rationale: got none, wanted text: clean.require_rationale")


def _check_type(kind: object, at: str) -> None:
    if kind is not None and kind not in list(AnswerType):
        wanted = ", ".join(AnswerType)
        raise RowError("answer_type", f"{at}: answer_type: got {kind!r}, wanted one of {wanted}")


def _encoded(ref: ImageRef, task: Task, at: str) -> bytes:
    try:
        data = _from_roots(ref, task.roots) if isinstance(ref, Path) else encoded_image(ref)
    except FileNotFoundError:
        roots = ", ".join(map(str, task.roots))
        raise RowError(
            "image_missing", f"{at}: image {str(ref)[:300]!r}: none in {roots}"
        ) from None
    except (OSError, ValueError) as error:
        # A path too long or with a zero byte.
        raise RowError("image_missing", f"{at}: image {str(ref)[:300]!r}: {error}") from None
    if len(data) > task.clean.max_image_bytes:
        raise RowError(
            "image_too_large",
            f"{at}: image of {len(data)} bytes, wanted {task.clean.max_image_bytes} at most: "
            "clean.max_image_bytes",
        )
    return data


def _from_roots(path: Path, roots: Sequence[Path]) -> bytes:
    for root in roots:
        if root.suffix.lower() == ".zip" and root.is_file():
            try:
                return _archive(root).read(path.as_posix())
            except KeyError:
                continue
        elif (root / path).is_file():
            return (root / path).read_bytes()
    raise FileNotFoundError(path)


@lru_cache(maxsize=32)
def _archive(path: Path) -> zipfile.ZipFile:
    return zipfile.ZipFile(path)


def _hash(data: bytes, task: Task, at: str) -> ImageHash:
    import imagehash
    import numpy
    from PIL import Image

    limit = task.clean.max_image_pixels
    image = load_image(data, location=at, max_pixels=limit, limit_key="clean.max_image_pixels")
    width, height = image.size
    if max(width, height) > task.clean.max_aspect_ratio * min(width, height):
        raise RowError(
            "image_aspect",
            f"{at}: image of {width} x {height} pixels, wanted sides within a factor of "
            f"{task.clean.max_aspect_ratio:g}: clean.max_aspect_ratio",
        )
    pixels = hashlib.blake2b(f"{width}x{height} ".encode() + image.tobytes(), digest_size=16)
    side = (_THUMBNAIL_SIDE, _THUMBNAIL_SIDE)
    thumbnail = image.resize(side, Image.Resampling.BOX).tobytes()
    bits = imagehash.phash(image, hash_size=task.hash_size).hash
    return ImageHash(pixels.digest(), numpy.packbits(bits).tobytes(), thumbnail)


def _with_names(row: dict[str, Any], labels: Mapping[str, list[str]]) -> dict[str, Any]:
    """Class numbers by their names."""
    for column, names in labels.items():
        value = row.get(column)
        if isinstance(value, int) and 0 <= value < len(names):
            row[column] = names[value]
    return row


def _options(value: object, prompt: str) -> tuple[str, ...]:
    if isinstance(value, list) and value and all(isinstance(option, str) for option in value):
        return tuple(value)
    return options_of(prompt)
