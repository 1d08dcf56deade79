"""Untrusted image files become RGB images or an error that names row, file and fix."""

import io
import random
import warnings
from pathlib import Path

import pytest
from PIL import Image

from care_train.data import Sample, load_image, load_images

ROW = "rows.jsonl: row 3"


def encode(image: Image.Image, format: str = "PNG", **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, format, **options)
    return stream.getvalue()


def load(ref: object, max_pixels: int = 10_000) -> Image.Image:
    return load_image(ref, location=ROW, max_pixels=max_pixels)  # type: ignore[arg-type]


def test_every_kind_of_reference_loads(tmp_path: Path):
    """A path, its text, bytes and an open image give the same RGB pixels."""
    image = Image.new("RGB", (4, 3), "teal")
    path = tmp_path / "a.png"
    path.write_bytes(encode(image))
    sample = Sample(id="a", prompt="q", answer="x", images=(path, str(path), encode(image), image))
    for loaded in load_images(sample):
        assert loaded.mode == "RGB"
        assert loaded.tobytes() == image.tobytes()


@pytest.mark.parametrize(
    ("ref", "message"),
    [
        ("gone.png", r"'gone\.png': no such file, .*: correct the path"),
        # Base64, a null byte and a folder are missing files, not a crash.
        ("data:image/png;base64," + "A" * 5000, "no such file"),
        ("a\0b.png", "no such file"),
        ("/", "no such file"),
        (
            encode(Image.effect_noise((40, 40), 50))[:-300],
            r"of \d+ bytes: damaged .*: replace the file or drop",
        ),
        (b"<html>404</html>", "got no readable image, wanted PNG.*: replace the file or drop"),
        # 16 bits per channel would be clipped to white.
        (encode(Image.new("I;16", (2, 2), 40_000)), "got mode I;16, wanted 8 bits"),
        # EPS, which Pillow hands to Ghostscript, is no accepted format.
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n", "got no readable image"),
    ],
    ids=range(8),
)
def test_unusable_images_are_named(ref: object, message: str):
    """Missing, damaged or of another kind: row, image and fix, in a short message."""
    with pytest.raises(ValueError, match=f"^{ROW}: image .*{message}") as error:
        load(ref)
    assert len(str(error.value)) < 600


def test_oversize_image_is_refused_before_it_is_decoded(monkeypatch: pytest.MonkeyPatch):
    """The size is read from the header; no pixel is decoded."""
    data = encode(Image.new("L", (200, 200)))
    monkeypatch.setattr(Image.Image, "convert", lambda *_: pytest.fail("decoded"))
    with pytest.raises(ValueError) as error:
        load(data, max_pixels=39_999)
    assert str(error.value).startswith(f"{ROW}: image of ")
    assert "got 200 x 200 = 40000 pixels, wanted at most 39999: scale" in str(error.value)


@pytest.mark.parametrize("setting", ["error", "ignore"])
def test_decompression_bombs_are_errors(monkeypatch: pytest.MonkeyPatch, setting: str):
    """What Pillow warns of, or refuses, is refused, however warnings are set."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 30 * 30)
    for side in (40, 100):
        with warnings.catch_warnings(), pytest.raises(ValueError, match=r"row 3: image of .*scale"):
            warnings.simplefilter(setting, Image.DecompressionBombWarning)
            load(encode(Image.new("L", (side, side))), max_pixels=1000)


def test_images_are_shown_as_people_see_them():
    """Transparent ground lies over white, so that black lines on it stay visible; the EXIF
    orientation is applied."""
    image = Image.new("RGBA", (2, 1), (0, 0, 0, 0))
    image.putpixel((0, 0), (0, 0, 0, 255))
    loaded = load(encode(image))
    assert [loaded.getpixel((x, 0)) for x in (0, 1)] == [(0, 0, 0), (255, 255, 255)]
    exif = Image.Exif()
    exif[0x0112] = 6
    assert load(encode(Image.new("RGB", (8, 4)), "JPEG", exif=exif)).size == (4, 8)


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM"])
def test_damage_never_escapes_as_another_error(format: str):
    """Flipped and missing bytes give an image or a ValueError, in every accepted format."""
    rng = random.Random(format)
    whole = encode(Image.effect_noise((30, 20), 60).convert("RGB"), format)
    for _ in range(60):
        data = bytearray(whole[: rng.randrange(1, len(whole))] if rng.random() < 0.5 else whole)
        for _ in range(rng.randrange(1, 8)):
            data[rng.randrange(min(len(data), 300))] = rng.randrange(256)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                load(bytes(data))
            except ValueError as error:
                assert str(error).startswith(ROW)
