"""Duplicates: rows with the same prompt whose images look the same, found through an index on disk.

An image asked about twice is no duplicate, nor are two diagrams under "Find x.". Rows whose images
only look the same are duplicates if their answers agree too: figures that differ in one label have
other answers.
"""

import hashlib
import sqlite3
from collections.abc import Sequence
from dataclasses import dataclass

import numpy

from care_train.config import DedupSettings
from care_train.data.building.prepare import ImageHash, Prepared, normalized_text

_MAX_COLOR_DISTANCE = 24
"""Largest difference of two thumbnails' colours, of 255. Encoding anew as JPEG and scaling by 0.5
to 1.6 changed those of drawings by 20 at most, taking the colours out by 48 at least."""


@dataclass(frozen=True)
class Duplicate:
    """Why a row is not kept, and for which one."""

    reason: str
    """`duplicate`: the same pixels or text alone; `near_duplicate`: they look the same;
    `conflicting_answer`: the same pixels, another answer."""
    first_id: str
    first_source: str


class DuplicateIndex:
    """All rows kept so far; memory does not grow with them."""

    def __init__(self, connection: sqlite3.Connection, settings: DedupSettings) -> None:
        self._connection, self._settings = connection, settings
        connection.executescript(
            """
            CREATE TABLE IF NOT EXISTS kept (
                row INTEGER PRIMARY KEY, id TEXT, source TEXT, answer BLOB, hashes BLOB
            );
            CREATE TABLE IF NOT EXISTS bands (key INTEGER, row INTEGER);
            CREATE INDEX IF NOT EXISTS bands_by_key ON bands (key);
            """
        )

    def find(self, row: Prepared) -> Duplicate | None:
        """The kept row that this one repeats, the earliest if there are several."""
        if not self._settings.enabled:
            return None
        keys = band_keys(row, self._settings.max_distance)
        marks = ",".join("?" * len(keys))
        query = (
            f"SELECT DISTINCT kept.row, id, source, answer, hashes FROM bands JOIN kept "
            f"ON kept.row = bands.row WHERE key IN ({marks}) ORDER BY kept.row"
        )
        answer, mine = _answer_key(row), row.hashes
        for _, id, source, other_answer, packed in self._connection.execute(query, keys):
            theirs = _unpack(packed, len(mine), self._settings.hash_size)
            same = [one.pixels for one in mine] == [one.pixels for one in theirs]
            if same:
                return Duplicate(
                    "duplicate" if answer == other_answer else "conflicting_answer", id, source
                )
            if answer == other_answer and self._look_alike(mine, theirs):
                return Duplicate("near_duplicate", id, source)
        return None

    def add(self, row: Prepared) -> None:
        """Keep a row."""
        if not self._settings.enabled:
            return
        packed = b"".join(h.pixels + h.perceptual + h.thumbnail for h in row.hashes)
        values = (row.sample.id, row.sample.source, _answer_key(row), packed)
        cursor = self._connection.execute(
            "INSERT INTO kept (id, source, answer, hashes) VALUES (?, ?, ?, ?)", values
        )
        keys = band_keys(row, self._settings.max_distance)
        self._connection.executemany(
            "INSERT INTO bands VALUES (?, ?)", [(key, cursor.lastrowid) for key in keys]
        )

    def _look_alike(self, mine: Sequence[ImageHash], theirs: Sequence[ImageHash]) -> bool:
        return all(
            look_alike(one, other, self._settings.max_distance)
            for one, other in zip(mine, theirs, strict=True)
        )


def look_alike(one: ImageHash, other: ImageHash, max_distance: int) -> bool:
    """Whether two images' perceptual hashes and colours are close."""
    bits = int.from_bytes(one.perceptual) ^ int.from_bytes(other.perceptual)
    if bits.bit_count() > max_distance:
        return False
    colors = [numpy.frombuffer(h.thumbnail, numpy.uint8).astype(int) for h in (one, other)]
    return int(abs(colors[0] - colors[1]).max()) <= _MAX_COLOR_DISTANCE


def band_keys(row: Prepared, max_distance: int) -> list[int]:
    """Keys of which two duplicates share at least one.

    The first image's hash is cut into one band more than bits may differ: one band is untouched.
    """
    text = f"{len(row.hashes)} {normalized_text(row.sample.prompt)}".encode()
    if not row.hashes:
        return [_key(text)]
    bits = row.hashes[0].perceptual
    bands = min(max_distance + 1, len(bits))
    edges = [len(bits) * band // bands for band in range(bands + 1)]
    return [_key(text, bytes([band]), bits[edges[band] : edges[band + 1]]) for band in range(bands)]


def _key(*parts: bytes) -> int:
    digest = hashlib.blake2b(b"\0".join(parts), digest_size=8).digest()
    return int.from_bytes(digest, signed=True)


def _answer_key(row: Prepared) -> bytes:
    text = normalized_text(row.sample.answer).encode()
    return hashlib.blake2b(text, digest_size=8).digest()


def _unpack(packed: bytes, count: int, hash_size: int) -> list[ImageHash]:
    # Bands of a row with as many images: their key holds the number.
    width = len(packed) // count if count else 0
    perceptual = (hash_size * hash_size + 7) // 8
    return [
        ImageHash(one[:16], one[16 : 16 + perceptual], one[16 + perceptual :])
        for one in (packed[width * place : width * (place + 1)] for place in range(count))
    ]
