"""Decode images, which stay compressed until a prompt needs them. Image files are untrusted."""

import io
import os.path
import struct
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from PIL import Image, ImageOps, UnidentifiedImageError

from care_train.data.image_refs import ImageRef
from care_train.data.row_error import RowError
from care_train.data.schema import Sample

# An allow list: other decoders of Pillow are less exercised, and EPS runs Ghostscript.
IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
"""Formats accepted."""

_NAME_CHARS = 300

_EIGHT_BIT_MODES = {"1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBX", "RGBa", "CMYK", "YCbCr"}

# What Pillow raises on damaged files, by format.
_DECODE_ERRORS = (OSError, SyntaxError, ValueError, EOFError, struct.error)


def load_images(sample: Sample, max_pixels: int) -> list[Image.Image]:
    """All images of a sample, in order, as RGB.

    Raises:
        RowError: as `load_image`, naming the sample's row.
    """
    location = sample.location or sample.id
    return [load_image(ref, location=location, max_pixels=max_pixels) for ref in sample.images]


def load_image(
    ref: ImageRef, *, location: str, max_pixels: int, limit_key: str = "prompt.max_image_pixels"
) -> Image.Image:
    """Decode one image: first frame, upright as its EXIF says, transparency laid over white.

    Args:
        ref: a path, encoded bytes, or an open image.
        location: file and row, for errors.
        max_pixels: largest width x height accepted, checked before any pixel is decoded.
        limit_key: the setting that says so, for errors.

    Returns:
        An RGB image.

    Raises:
        RowError: a missing, damaged or oversize image, naming row, path and fix.
    """
    name = f"{location}: image {_name(ref)}"
    with _bombs_named(name, max_pixels, limit_key):
        image = _open(ref, name)
        _check_size(image, name, max_pixels, limit_key)
        return _to_rgb(image, name)


def image_sizes(sample: Sample, max_pixels: int) -> list[tuple[int, int]]:
    """Width and height of all images of a sample, as stored; only files' heads are read.

    Raises:
        RowError: a missing or oversize image, or one without a readable head, naming the row.
    """
    sizes = []
    for ref in sample.images:
        name = f"{sample.location or sample.id}: image {_name(ref)}"
        with _bombs_named(name, max_pixels, "prompt.max_image_pixels"):
            image = _open(ref, name)
            _check_size(image, name, max_pixels, "prompt.max_image_pixels")
            sizes.append(image.size)
        if image is not ref:
            image.close()
    return sizes


@contextmanager
def _bombs_named(name: str, max_pixels: int, limit_key: str) -> Iterator[None]:
    try:
        yield
    except Image.DecompressionBombError as error:
        raise RowError(
            "image_too_large",
            f"{name}: {error}: scale the image down to {limit_key} = {max_pixels} pixels",
        ) from None


def _open(ref: ImageRef, name: str) -> Image.Image:
    if isinstance(ref, Image.Image):
        return ref
    # os.path.isfile is False where Path.is_file raises: text too long for a path, such as base64.
    if isinstance(ref, (str, Path)) and not os.path.isfile(ref):
        raise RowError(
            "image_missing",
            f"{name}: no such file: correct the path (relative ones start at the data file's "
            "folder) or drop the row",
        )
    try:
        # Its own warning would come before our limit has been looked at.
        with warnings.catch_warnings(action="ignore", category=Image.DecompressionBombWarning):
            file = io.BytesIO(ref) if isinstance(ref, bytes) else ref
            return Image.open(file, formats=IMAGE_FORMATS)
    except UnidentifiedImageError:
        raise RowError(
            "image_unreadable",
            f"{name}: got no readable image, wanted {', '.join(IMAGE_FORMATS)}: replace the file "
            "or drop the row",
        ) from None
    except _DECODE_ERRORS as error:
        raise _damaged(name, error) from None


def _check_size(image: Image.Image, name: str, max_pixels: int, limit_key: str) -> None:
    width, height = image.size
    if width * height > max_pixels:
        raise RowError(
            "image_too_large",
            f"{name}: got {width} x {height} = {width * height} pixels, wanted at most "
            f"{max_pixels}: scale the image down, drop the row, or raise {limit_key}",
        )


def _to_rgb(image: Image.Image, name: str) -> Image.Image:
    if image.mode not in _EIGHT_BIT_MODES:
        raise RowError(
            "image_mode",
            f"{name}: got mode {image.mode}, wanted 8 bits per channel (more would be clipped): "
            "convert the image",
        )
    try:
        image = ImageOps.exif_transpose(image)
        if not image.has_transparency_data:
            return image.convert("RGB")
        # Line drawings are often black on transparent, where dropping alpha leaves black on black.
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    except _DECODE_ERRORS as error:
        raise _damaged(name, error) from None


def _damaged(name: str, error: Exception) -> RowError:
    return RowError(
        "image_unreadable", f"{name}: damaged ({error}): replace the file or drop the row"
    )


def _name(ref: ImageRef) -> str:
    if isinstance(ref, bytes):
        return f"of {len(ref)} bytes"
    if isinstance(ref, Image.Image):
        return "in memory"
    path = str(ref)
    return repr(path if len(path) <= _NAME_CHARS else path[:_NAME_CHARS] + "...")
