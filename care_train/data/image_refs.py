"""References to images as rows hold them: paths, encoded bytes, base64, open images."""

import base64
import binascii
import hashlib
import io
from collections.abc import Mapping
from pathlib import Path

from PIL import Image

from care_train.data.row_error import RowError, describe

ImageRef = str | Path | bytes | Image.Image
"""A file's path, an encoded image's bytes, or an open image."""

_MIN_BASE64_CHARS = 32

_MAGIC = (b"\x89PNG", b"\xff\xd8\xff", b"GIF8", b"RIFF", b"BM", b"II*\x00", b"MM\x00*")
"""How PNG, JPEG, GIF, WebP, BMP and TIFF files begin."""


def image_refs(value: object, *, column: str, base_dir: Path, at: str) -> tuple[ImageRef, ...]:
    """The images of a column's value: one or a list of them.

    Args:
        value: a path, encoded bytes, base64 text (also as a `data:` URL), an open image, a mapping
            of the datasets library's (`bytes`, `path`) or of a chat message's (`image`,
            `image_url`), or a list of these. Nothing at all is no image.
        column: the column's name, for errors.
        base_dir: the folder that relative paths start from.
        at: file and row, for errors.

    Raises:
        RowError: something else.
    """
    if value is None:
        return ()
    entries = value if isinstance(value, (list, tuple)) else [value]
    return tuple(_image_ref(entry, column=column, base_dir=base_dir, at=at) for entry in entries)


def image_content(ref: ImageRef) -> bytes:
    """What a reference stands for: the encoded image, or an open one's size, mode and pixels.

    Raises:
        OSError: no such file.
    """
    if isinstance(ref, bytes):
        return ref
    if isinstance(ref, Image.Image):
        return f"{ref.mode} {ref.size} ".encode() + ref.tobytes()
    return Path(ref).read_bytes()


def image_digest(ref: ImageRef) -> str:
    """A checksum of `image_content`.

    Raises:
        OSError: no such file.
    """
    return hashlib.blake2b(image_content(ref), digest_size=16).hexdigest()


def encoded_image(ref: ImageRef) -> bytes:
    """An encoded image: the file's or the reference's own bytes, PNG for an open image.

    Raises:
        OSError: no such file.
    """
    if isinstance(ref, Image.Image):
        buffer = io.BytesIO()
        ref.save(buffer, "PNG")
        return buffer.getvalue()
    return image_content(ref)


def _image_ref(value: object, *, column: str, base_dir: Path, at: str) -> ImageRef:
    if isinstance(value, Mapping):
        value = _of_mapping(value)
    if isinstance(value, str) and (encoded := _from_base64(value, column=column, at=at)):
        return encoded
    if isinstance(value, (str, Path)) and str(value):
        return base_dir / value
    if isinstance(value, (bytes, Image.Image)) and value != b"":
        return value
    raise RowError(
        "image_type",
        f"{at}: {column}: got {describe(value)}, wanted a path, encoded bytes, base64, an image, "
        "or a list of these: correct or drop the row",
    )


def _of_mapping(value: Mapping) -> object:
    """What the datasets library and chat messages wrap; any of their keys may hold None."""
    for key in ("bytes", "image", "url", "image_url", "path"):
        inner = value.get(key)
        if inner:
            return _of_mapping(inner) if isinstance(inner, Mapping) else inner
    return None


def _from_base64(text: str, *, column: str, at: str) -> bytes | None:
    """The image that base64 text holds; None where it is a path."""
    is_url = text.startswith("data:")
    encoded = text.partition(",")[2] if is_url else text
    if not is_url and not _begins_like_an_image(encoded):
        return None
    try:
        return base64.b64decode(encoded, validate=True)
    except (binascii.Error, ValueError) as error:
        raise RowError(
            "image_unreadable",
            f"{at}: {column}: got damaged base64 ({error}), wanted an encoded image: correct or "
            "drop the row",
        ) from None


def _begins_like_an_image(text: str) -> bool:
    if len(text) < _MIN_BASE64_CHARS:
        return False
    try:
        return base64.b64decode(text[:16], validate=True).startswith(_MAGIC)
    except (binascii.Error, ValueError):
        return False
