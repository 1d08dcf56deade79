"""Duplicates: rows with the same prompt whose images look the same, found through an index on disk.

An image asked about twice is no duplicate, nor are two diagrams under "Find x.". Rows whose images
only look the same are duplicates if their answers agree too: figures that differ in one label have
other answers.
"""

import hashlib
import sqlite3
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy
from PIL import Image

from care_train.config.build import HASH_SIZE
from care_train.data.conversations import IMAGE_PLACEHOLDER

_MAX_COLOR_DISTANCE = 24
"""Largest difference of two thumbnails' colours, of 255. Encoding anew as JPEG and scaling by 0.5
to 1.6 changed those of drawings by 20 at most, taking the colours out by 48 at least."""

_PIXELS, _HASH, _SIDE = 16, HASH_SIZE**2 // 8, 8


@dataclass(frozen=True)
class ImageLook:
    """What an image looks like."""

    pixels: bytes
    """A checksum of its decoded pixels."""
    perceptual: bytes
    """imagehash's pHash: brightness, coarse."""
    thumbnail: bytes
    """8 x 8 RGB: pHash is blind to colour."""

    @classmethod
    def of(cls, image: Image.Image) -> "ImageLook":
        """That of an RGB image."""
        import imagehash

        size = "{}x{} ".format(*image.size).encode()
        pixels = hashlib.blake2b(size + image.tobytes(), digest_size=_PIXELS).digest()
        bits = numpy.packbits(imagehash.phash(image, hash_size=HASH_SIZE).hash)
        thumbnail = image.resize((_SIDE, _SIDE), Image.Resampling.BOX)
        return cls(pixels, bits.tobytes(), thumbnail.tobytes())

    @property
    def packed(self) -> bytes:
        """As `unpacked` takes it."""
        return self.pixels + self.perceptual + self.thumbnail

    @classmethod
    def unpacked(cls, packed: bytes) -> "ImageLook":
        """From `packed`."""
        end = _PIXELS + _HASH
        return cls(packed[:_PIXELS], packed[_PIXELS:end], packed[end:])

    def is_like(self, other: "ImageLook", max_distance: int) -> bool:
        """Whether the perceptual hashes and colours are close."""
        bits = int.from_bytes(self.perceptual) ^ int.from_bytes(other.perceptual)
        if bits.bit_count() > max_distance:
            return False
        colors = [numpy.frombuffer(one.thumbnail, numpy.uint8).astype(int) for one in (self, other)]
        return int(abs(colors[0] - colors[1]).max()) <= _MAX_COLOR_DISTANCE


@dataclass(frozen=True)
class Duplicate:
    """Why a row is not kept, and for which one."""

    reason: str
    """`duplicate`: the same pixels or text alone; `near_duplicate`: they look the same;
    `conflicting_answer`: the same pixels, another answer."""
    first_id: str
    first_source: str


class DuplicateIndex:
    """All rows kept so far, in a temporary file: memory does not grow with them."""

    def __init__(self, max_distance: int) -> None:
        self._max_distance = max_distance
        self._connection = sqlite3.connect("")
        self._connection.executescript(
            """
            CREATE TABLE kept (row INTEGER PRIMARY KEY, id, source, answer BLOB, looks BLOB);
            CREATE TABLE keys (key INTEGER, row INTEGER);
            CREATE INDEX rows_by_key ON keys (key);
            """
        )

    def find_or_add(self, row: Mapping[str, Any]) -> Duplicate | None:
        """The kept row that a prepared one repeats, the earliest of several; None keeps it too."""
        keys, looks = row["keys"], [ImageLook.unpacked(look) for look in row["looks"]]
        answer = _digest(normalized_text(row["answer"]).encode())
        query = (
            "SELECT DISTINCT kept.row, id, source, answer, looks FROM keys JOIN kept USING (row) "
            f"WHERE key IN ({','.join('?' * len(keys))}) ORDER BY kept.row"
        )
        for _, id, source, other_answer, packed in self._connection.execute(query, keys):
            # Their key holds the number of images: there are as many.
            width = len(packed) // max(1, len(looks))
            parts = (packed[width * place : width * (place + 1)] for place in range(len(looks)))
            pairs = list(zip(looks, map(ImageLook.unpacked, parts), strict=True))
            agree = answer == other_answer
            if all(mine.pixels == theirs.pixels for mine, theirs in pairs):
                return Duplicate("duplicate" if agree else "conflicting_answer", id, source)
            if agree and all(mine.is_like(theirs, self._max_distance) for mine, theirs in pairs):
                return Duplicate("near_duplicate", id, source)
        values = (row["id"], row["source"], answer, b"".join(row["looks"]))
        statement = "INSERT INTO kept (id, source, answer, looks) VALUES (?, ?, ?, ?)"
        added = self._connection.execute(statement, values).lastrowid
        pairs = [(key, added) for key in keys]
        self._connection.executemany("INSERT INTO keys VALUES (?, ?)", pairs)
        return None


def normalized_text(text: str) -> str:
    """A prompt as duplicates are told: no case, white space, placeholders or closing marks."""
    text = unicodedata.normalize("NFKC", text.replace(IMAGE_PLACEHOLDER, " ")).casefold()
    return "".join(text.split()).rstrip(".?!:")


def duplicate_keys(prompt: str, looks: Sequence[ImageLook], max_distance: int) -> tuple[int, ...]:
    """Keys of which two duplicates share at least one.

    The first image's hash is cut into one band more than bits may differ: one band is untouched.
    """
    text = f"{len(looks)} {normalized_text(prompt)}".encode()
    if not looks:
        return (int.from_bytes(_digest(text), signed=True),)
    bits, count = looks[0].perceptual, max_distance + 1
    edges = [len(bits) * band // count for band in range(count + 1)]
    bands = [bytes([n]) + b"\0" + bits[edges[n] : edges[n + 1]] for n in range(count)]
    return tuple(int.from_bytes(_digest(text + b"\0" + band), signed=True) for band in bands)


def _digest(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=8).digest()
