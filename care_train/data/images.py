"""Images as rows hold them, and their pixels. Image files are untrusted.

They stay encoded until a prompt needs their pixels: paths, encoded bytes, base64, open images.
"""

import base64
import hashlib
import io
import os
import re
import struct
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote

from PIL import ExifTags, Image, UnidentifiedImageError

from care_train.data.columns import IMAGE_KEYS, RowError, describe

if TYPE_CHECKING:
    from care_train.data.schema import Sample

ImageRef = str | Path | bytes | Image.Image
"""A file's path, an encoded image's bytes, or an open image."""

MAX_IMAGE_PIXELS = 50_000_000
"""Largest width x height of a run's images: rows are untrusted."""

MAX_IMAGE_BYTES = 2**28
"""Largest image file that is opened: no decoder gets more, whatever the file says it holds."""

# An allow list: other decoders of Pillow are less exercised, and EPS runs Ghostscript.
IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
"""Formats accepted."""

_MIN_BASE64_CHARS = 32
_MAGIC = re.compile(rb"\x89PNG|\xff\xd8\xff|GIF8|RIFF.{4}WEBP|BM.{4}\0{4}|II\*\0|MM\0\*", re.DOTALL)
"""How PNG, JPEG, GIF, WebP (RIFF begins sounds too), BMP and TIFF files begin: 12 bytes tell."""

_SEEN_FILE = re.compile(r"(?i)[^\n]{1,300}\.(?:png|jpe?g|webp|gif|bmp|tiff?|mp4|mkv|mov|avi|webm)")
_SEEN_COLUMN = re.compile(
    r"(?i)image|img|pic|photo|fig|diagram|chart|plot|page|scan|thumb|screen|visual|frame|video"
    r"|file|path|media|url"
)
"""What is in the name of a column that data sets keep an image's or video's path or address in."""

_NAME_CHARS = 300
_EIGHT_BIT_MODES = {"1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBX", "RGBa", "CMYK", "YCbCr"}

# What Pillow raises on damaged files, by format.
_DECODE_ERRORS = (OSError, SyntaxError, ValueError, EOFError, struct.error)

_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""How to turn an image upright, by the values that EXIF's orientation may have."""


def image_refs(value: object, *, column: str, base_dir: Path, at: str) -> tuple[ImageRef, ...]:
    """The images of a column's value: one or a list of them.

    Args:
        value: a path, a `file://` URL, encoded bytes, base64 (also as a `data:` URL), an open
            image, a mapping of the datasets library's (`bytes`, `path`) or of a chat message's
            (`image`, `image_url`), or a list of these. Nothing at all is no image.
        column: its name, for errors.
        base_dir: the folder that relative paths start from.
        at: file and row, for errors.

    Raises:
        RowError: something else.
    """
    if value is None or value == "":
        return ()
    entries = value if isinstance(value, (list, tuple)) else [value]
    try:
        return tuple(_image_ref(entry, base_dir) for entry in entries)
    except RowError as error:
        raise RowError(error.reason, f"{at}: {column}: {error}") from None


def is_seen(column: str, value: object, base_dir: Path) -> bool:
    """Whether a column's value can be nothing but an image or video, or a list of some.

    An open one, encoded bytes, base64, or the name of a file of theirs: one that is there, or in a
    column that may be an image's. In other columns such a name is what a text is about.
    """
    if isinstance(value, (list, tuple)):
        return any(is_seen(column, entry, base_dir) for entry in value)
    if isinstance(value, Mapping):
        return any(is_seen(key, value.get(key), base_dir) for key in IMAGE_KEYS)
    if isinstance(value, str) and _SEEN_FILE.fullmatch(value):
        return bool(_SEEN_COLUMN.search(column)) or os.path.isfile(base_dir / value)
    if isinstance(value, str) and value.startswith("data:image/"):
        return True
    value = _base64_head(value) if isinstance(value, str) else value
    return bool(_MAGIC.match(value)) if isinstance(value, bytes) else isinstance(value, Image.Image)


def encoded_image(
    ref: ImageRef, location: str, max_bytes: int = MAX_IMAGE_BYTES, limit_key: str = ""
) -> bytes:
    """An encoded image: the file's or the reference's own bytes, PNG for an open image.

    Args:
        ref: a path, encoded bytes, or an open image.
        location: what refers to it, for errors.
        max_bytes: largest file accepted, asked before anything is read.
        limit_key: the setting that says so, if one does, for errors.

    Raises:
        RowError: no regular file that can be read, or a larger one.
    """
    if isinstance(ref, Image.Image):
        buffer = io.BytesIO()
        ref.save(buffer, "PNG")
        return buffer.getvalue()
    _check_size(ref, f"{location}: image {_name(ref)}", max_bytes, limit_key)
    return ref if isinstance(ref, bytes) else Path(ref).read_bytes()


def image_digest(ref: ImageRef, location: str) -> str:
    """A checksum of the encoded image, or of an open one's size, mode and pixels.

    Raises:
        RowError: as `encoded_image`.
    """
    if isinstance(ref, Image.Image):
        content = f"{ref.mode} {ref.size} ".encode() + ref.tobytes()
    else:
        content = encoded_image(ref, location)
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def load_images(sample: "Sample") -> list[Image.Image]:
    """All images of a sample, in order, as RGB.

    Raises:
        RowError: as `load_image`, naming the sample's row.
    """
    return [load_image(ref, location=sample.where) for ref in sample.images]


def load_image(
    ref: ImageRef, *, location: str, max_pixels: int = MAX_IMAGE_PIXELS, limit_key: str = ""
) -> Image.Image:
    """One image as RGB: first frame, upright as its EXIF says, transparency laid over white.

    Args:
        ref: a path, encoded bytes, or an open image.
        location: file and row, for errors.
        max_pixels: largest width x height accepted, checked before any pixel is decoded.
        limit_key: the setting that says so, if one does, for errors.

    Raises:
        RowError: a missing, damaged or oversize image, naming row, path and fix.
    """
    with _opened(ref, location, max_pixels, limit_key) as image:
        return _to_rgb(image, f"{location}: image {_name(ref)}")


def image_sizes(sample: "Sample") -> list[tuple[int, int]]:
    """Width and height of all images of a sample, as stored; only files' heads are read.

    Raises:
        RowError: a missing or oversize image, or one without a readable head, naming the row.
    """
    sizes = []
    for ref in sample.images:
        with _opened(ref, sample.where) as image:
            sizes.append(image.size)
    return sizes


def _image_ref(value: object, base_dir: Path) -> ImageRef:
    if isinstance(value, Mapping):
        value = _of_mapping(value)
    if isinstance(value, str) and (encoded := _from_base64(value)):
        return encoded
    if isinstance(value, str) and "://" in value[:16]:
        return _of_url(value)
    if isinstance(value, (str, Path)) and str(value):
        return base_dir / value
    if isinstance(value, (bytes, Image.Image)) and value != b"":
        return value
    raise RowError(
        "image_type",
        f"got {describe(value)}, wanted a path, encoded bytes, base64, an image, or a list of "
        "these: correct or drop the row",
    )


def _of_url(text: str) -> Path:
    # Not by urlsplit, which takes what follows `?` and `#` off a file's name.
    found = re.fullmatch(r"file://(?:localhost)?(/.*)", text, re.IGNORECASE | re.DOTALL)
    if found is None:
        raise RowError(
            "image_url",
            f"got {text[:_NAME_CHARS]!r}: URLs are not fetched: download the image and give its "
            "path (file:///path is read too)",
        )
    return Path(unquote(found[1]))


def _of_mapping(value: Mapping) -> object:
    """What the datasets library and chat messages wrap; any of their keys may hold None."""
    for key in IMAGE_KEYS:
        inner = value.get(key)
        if inner:
            return _of_mapping(inner) if isinstance(inner, Mapping) else inner
    return None


def _from_base64(text: str) -> bytes | None:
    """The image that base64 text holds, on one line or several; None where it is a path."""
    is_url = text.startswith("data:")
    encoded = "".join((text.partition(",")[2] if is_url else text).split())
    if not is_url and not (len(encoded) >= _MIN_BASE64_CHARS and _MAGIC.match(_base64_head(text))):
        return None
    try:
        return base64.b64decode(encoded, validate=True)
    except ValueError as error:
        raise RowError(
            "image_unreadable",
            f"got damaged base64 ({error}), wanted an encoded image: correct or drop the row",
        ) from None


def _base64_head(text: str) -> bytes:
    """The first bytes that base64 text holds; none where it is something else."""
    try:
        return base64.b64decode("".join(text[:80].split())[:16], validate=True)
    except ValueError:
        return b""


@contextmanager
def _opened(
    ref: ImageRef, location: str, max_pixels: int = MAX_IMAGE_PIXELS, limit_key: str = ""
) -> Iterator[Image.Image]:
    """An image of an accepted format and size, not decoded yet; damage becomes a RowError."""
    name = f"{location}: image {_name(ref)}"
    image = None
    try:
        image = ref if isinstance(ref, Image.Image) else _open(ref, name)
        width, height = image.size
        if width * height > max_pixels:
            raise RowError(
                "image_too_large",
                f"{name}: got {width} x {height} = {width * height} pixels, wanted at most "
                f"{max_pixels}: scale the image down or drop the row" + _or_raise(limit_key),
            )
        yield image
    except RowError:
        raise
    except Image.DecompressionBombError as error:
        raise RowError(
            "image_too_large", f"{name}: {error}: scale the image down to {max_pixels} pixels"
        ) from None
    except UnidentifiedImageError:
        raise RowError(
            "image_unreadable",
            f"{name}: got no readable image, wanted {', '.join(IMAGE_FORMATS)}: replace the file "
            "or drop the row",
        ) from None
    except _DECODE_ERRORS as error:
        raise RowError(
            "image_unreadable", f"{name}: damaged ({error}): replace the file or drop the row"
        ) from None
    finally:
        if image is not None and image is not ref:
            image.close()


def _check_size(
    ref: str | Path | bytes, name: str, max_bytes: int = MAX_IMAGE_BYTES, limit_key: str = ""
) -> None:
    # os.path.isfile is False where Path.is_file raises: text too long for a path, such as base64.
    if not isinstance(ref, bytes) and not (os.path.isfile(ref) and os.access(ref, os.R_OK)):
        raise RowError(
            "image_missing",
            f"{name}: no such file, or none that can be read: correct the path (relative ones "
            "start at the data file's folder) or drop the row",
        )
    size = len(ref) if isinstance(ref, bytes) else os.path.getsize(ref)
    if size > max_bytes:
        raise RowError(
            "image_too_large",
            f"{name}: got a file of {size} bytes, wanted at most {max_bytes}: replace it or drop "
            "the row" + _or_raise(limit_key),
        )


def _or_raise(limit_key: str) -> str:
    return f", or raise {limit_key}" if limit_key else ""


def _open(ref: str | Path | bytes, name: str) -> Image.Image:
    _check_size(ref, name)
    # Of sizes, before our limit has been looked at, and of odd EXIF tags.
    with warnings.catch_warnings(action="ignore"):
        file = io.BytesIO(ref) if isinstance(ref, bytes) else ref
        return Image.open(file, formats=IMAGE_FORMATS)


def _to_rgb(image: Image.Image, name: str) -> Image.Image:
    if image.mode not in _EIGHT_BIT_MODES:
        raise RowError(
            "image_mode",
            f"{name}: got mode {image.mode}, wanted 8 bits per channel (more would be clipped): "
            "convert the image",
        )
    image = _turned_upright(image)
    if not image.has_transparency_data:
        return image.convert("RGB")
    # Line drawings are often black on transparent, where dropping alpha leaves black on black.
    rgba = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")


def _turned_upright(image: Image.Image) -> Image.Image:
    """Turned as its EXIF says; a tag of another type or value is no orientation."""
    try:
        with warnings.catch_warnings(action="ignore"):
            orientation = image.getexif().get(ExifTags.Base.Orientation)
    # What Pillow raises on damaged EXIF blocks, whose pixels are whole.
    except (*_DECODE_ERRORS, KeyError, TypeError, OverflowError):
        return image
    method = _UPRIGHT.get(orientation) if isinstance(orientation, int) else None
    return image if method is None else image.transpose(method)


def _name(ref: ImageRef) -> str:
    if isinstance(ref, bytes):
        return f"of {len(ref)} bytes"
    if isinstance(ref, Image.Image):
        return "in memory"
    path = str(ref)
    return repr(path[:_NAME_CHARS] + "..." * (len(path) > _NAME_CHARS))
