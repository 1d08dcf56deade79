"""One row after the other, in a worker: adapt, clean, decode once, hash."""

import errno
import re
import struct
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from care_train.config.build import CleanSettings, DedupSettings
from care_train.data.building.adapters import ADAPTERS
from care_train.data.building.dedup import ImageLook, duplicate_keys
from care_train.data.building.parts import Outcome, write_part
from care_train.data.columns import check_row
from care_train.data.errors import RowError
from care_train.data.images import ImageRef, encoded_image, load_image, read_image_file
from care_train.data.rows import Chunk, named_columns, rows_of
from care_train.data.schema import Sample, sample_from_row

# They would be read as the end of a turn, or as an image.
_SPECIAL_TOKEN = re.compile(r"<\|[a-z_]+\|>")
_TAG = re.compile(r"</?(?:think|reasoning|answer)>")

# What zipfile raises on damaged, encrypted and unknown archives, by fault.
_ARCHIVE_ERRORS = (zipfile.BadZipFile, RuntimeError, zlib.error, EOFError, struct.error)


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
    dedup: DedupSettings


@dataclass(frozen=True)
class Piece:
    """A chunk of a file's rows, and where to write what becomes of them."""

    task: Task
    chunk: Chunk
    part: Path


def prepare(piece: Piece) -> None:
    """Write a piece's part: each row, usable or rejected with the reason."""
    task, rows, num_filtered = piece.task, [], 0
    for number, value in rows_of(piece.chunk):
        row = _prepare(task, number, value)
        if row is None:
            num_filtered += 1
        else:
            rows.append(row)
    write_part(piece.part, task.source, task.file, num_filtered, rows)


def _prepare(task: Task, number: int, value: Any) -> Outcome | None:
    """None for a row that `where` leaves out."""
    at = f"{task.file}: row {number}"
    prompt = answer = ""
    try:
        row = named_columns(value, at=at, labels=task.labels)
        if any(row.get(name) != wanted for name, wanted in task.where.items()):
            return None
        sample = _adapt(task, row, number, at)
        prompt, answer = sample.prompt, sample.answer
        _check_texts(sample, task.clean, at)
        images = tuple(_encoded(ref, task, at) for ref in sample.images)
        looks = [_look(image, task, at) for image in images]
    except RowError as error:
        return Outcome(number, reason=error.reason, detail=str(error), prompt=prompt, answer=answer)
    keys = duplicate_keys(prompt, looks, task.dedup.max_distance)
    packed = tuple(look.packed for look in looks)
    return Outcome(number, replace(sample, images=images), keys, packed)


def _adapt(task: Task, row: dict[str, Any], number: int, at: str) -> Sample:
    adapter = ADAPTERS[task.adapter]
    check_row(task.adapter, adapter.columns, row, at)
    plain = adapter.convert(row, at)
    for name in ("prompt", "problem", "question"):
        if isinstance(plain.get(name), str):
            plain[name] = plain[name].strip()
    return sample_from_row(
        plain,
        location=at,
        # Relative paths stay relative here: there may be several roots.
        base_dir=Path(),
        id=f"{task.source}/{task.file}/{number}",
        source=task.source,
        uninterpreted=adapter.uninterpreted,
    )


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


def _encoded(ref: ImageRef, task: Task, at: str) -> bytes:
    limit = task.clean.max_image_bytes
    try:
        data = _from_roots(ref, task.roots, limit) if isinstance(ref, Path) else encoded_image(ref)
    except FileNotFoundError:
        roots = ", ".join(map(str, task.roots))
        raise RowError(
            "image_missing", f"{at}: image {str(ref)[:300]!r}: none in {roots}"
        ) from None
    # An archive's fault; or a path too long, with a zero byte, or of a file too large.
    except (*_ARCHIVE_ERRORS, OSError, ValueError) as error:
        is_large = isinstance(error, OSError) and error.errno == errno.EFBIG
        is_path = isinstance(error, (OSError, ValueError))
        reason = "image_missing" if is_path else "image_unreadable"
        if is_large:
            reason, error = "image_too_large", f"{error.args[1]}: clean.max_image_bytes"
        raise RowError(reason, f"{at}: image {str(ref)[:300]!r}: {error}") from None
    if len(data) > limit:
        raise RowError(
            "image_too_large",
            f"{at}: image of {len(data)} bytes, wanted {limit} at most: clean.max_image_bytes",
        )
    return data


def _from_roots(path: Path, roots: Sequence[Path], max_bytes: int) -> bytes:
    for root in roots:
        if root.suffix.lower() == ".zip" and root.is_file():
            archive = _archive(root)
            if path.as_posix() in archive.NameToInfo:
                with archive.open(path.as_posix()) as member:
                    # What the archive says of a member's size is as untrusted as the member.
                    return member.read(max_bytes + 1)
        elif (root / path).is_file():
            return read_image_file(root / path, max_bytes)
    raise FileNotFoundError(path)


@lru_cache(maxsize=32)
def _archive(path: Path) -> zipfile.ZipFile:
    return zipfile.ZipFile(path)


def _look(data: bytes, task: Task, at: str) -> ImageLook:
    limit = task.clean.max_image_pixels
    image = load_image(data, location=at, max_pixels=limit, limit_key="clean.max_image_pixels")
    width, height = image.size
    if max(width, height) > task.clean.max_aspect_ratio * min(width, height):
        raise RowError(
            "image_aspect",
            f"{at}: image of {width} x {height} pixels, wanted sides within a factor of "
            f"{task.clean.max_aspect_ratio:g}: clean.max_aspect_ratio",
        )
    return ImageLook.of(image)
