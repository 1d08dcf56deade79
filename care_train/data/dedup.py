"""Duplicates: rows with the same prompt whose images look the same, found through an index on disk.

An image asked about twice is no duplicate, nor are two diagrams under "Find x.". Rows whose images
only look the same are duplicates if their answers agree too: figures that differ in one label have
other answers.
"""

import hashlib
import sqlite3
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

import numpy
from PIL import Image

from care_train.config.data import HASH_SIZE
from care_train.data.columns import IMAGE_PLACEHOLDER

_MAX_COLOR_DISTANCE = 24
"""Largest difference of two thumbnails' colours, of 255. Encoding anew as JPEG and scaling by 0.5
to 1.6 changed those of drawings by 20 at most, taking the colours out by 48 at least."""

_SIDE = 8
_LOOK = numpy.dtype(
    [
        ("pixels", "u1", 16),  # a checksum of the decoded pixels
        ("hash", "u1", HASH_SIZE**2 // 8),  # imagehash's pHash: brightness, coarse
        ("thumbnail", "u1", (_SIDE, _SIDE, 3)),  # pHash is blind to colour
    ]
)
"""What an image looks like."""


def look_of(image: Image.Image) -> bytes:
    """What an RGB image looks like, for `DuplicateIndex`."""
    import imagehash

    size = "{}x{} ".format(*image.size).encode()
    pixels = hashlib.blake2b(size + image.tobytes(), digest_size=16).digest()
    bits = numpy.packbits(imagehash.phash(image, hash_size=HASH_SIZE).hash)
    thumbnail = image.resize((_SIDE, _SIDE), Image.Resampling.BOX)
    return pixels + bits.tobytes() + thumbnail.tobytes()


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

    def find_or_add(self, row: Mapping[str, Any]) -> tuple[str, str, str] | None:
        """The kept row that a prepared one repeats, the earliest of several; None keeps it too.

        Returns:
            (reason, id, source): `duplicate` is the same pixels or text alone, `near_duplicate`
            looks the same, `conflicting_answer` is the same pixels with another answer.
        """
        keys, looks = row["keys"], b"".join(row["looks"])
        answer = _digest(normalized_text(row["answer"]).encode())
        query = (
            "SELECT DISTINCT kept.row, id, source, answer, looks FROM keys JOIN kept USING (row) "
            f"WHERE key IN ({','.join('?' * len(keys))}) ORDER BY kept.row"
        )
        for _, id, source, other_answer, other_looks in self._connection.execute(query, keys):
            has_same_pixels, is_alike = compare_looks(looks, other_looks, self._max_distance)
            agree = answer == other_answer
            if has_same_pixels:
                return "duplicate" if agree else "conflicting_answer", id, source
            if agree and is_alike:
                return "near_duplicate", id, source
        statement = "INSERT INTO kept (id, source, answer, looks) VALUES (?, ?, ?, ?)"
        values = (row["id"], row["source"], answer, looks)
        added = self._connection.execute(statement, values).lastrowid
        pairs = [(key, added) for key in keys]
        self._connection.executemany("INSERT INTO keys VALUES (?, ?)", pairs)
        return None


def compare_looks(ours: bytes, theirs: bytes, max_distance: int) -> tuple[bool, bool]:
    """Whether two rows' images have the same pixels, and whether they look the same, in order.

    Args:
        ours: `look_of` each image, joined.
        theirs: of as many images.
        max_distance: bits in which the perceptual hashes of two images may differ.
    """
    one: Any = numpy.frombuffer(ours, _LOOK)
    other: Any = numpy.frombuffer(theirs, _LOOK)
    has_same_pixels = bool((one["pixels"] == other["pixels"]).all())
    bits = numpy.unpackbits(one["hash"] ^ other["hash"], axis=-1).sum(-1)
    colors = abs(one["thumbnail"].astype(int) - other["thumbnail"])
    are_close = bits.max(initial=0) <= max_distance and colors.max(initial=0) <= _MAX_COLOR_DISTANCE
    return has_same_pixels, bool(are_close)


def normalized_text(text: str) -> str:
    """A prompt as duplicates are told: no case, white space, placeholders or closing marks."""
    text = unicodedata.normalize("NFKC", text.replace(IMAGE_PLACEHOLDER, " ")).casefold()
    return "".join(text.split()).rstrip(".?!:")


def duplicate_keys(prompt: str, looks: Sequence[bytes], max_distance: int) -> list[int]:
    """Keys of which two duplicates share at least one.

    The first image's hash is cut into one band more than bits may differ: one band is untouched.
    """
    text = f"{len(looks)} {normalized_text(prompt)}".encode()
    if not looks:
        return [int.from_bytes(_digest(text), signed=True)]
    bits, count = numpy.frombuffer(looks[0], _LOOK)["hash"].tobytes(), max_distance + 1
    edges = [len(bits) * band // count for band in range(count + 1)]
    bands = [bytes([n]) + b"\0" + bits[edges[n] : edges[n + 1]] for n in range(count)]
    return [int.from_bytes(_digest(text + b"\0" + band), signed=True) for band in bands]


def _digest(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=8).digest()
