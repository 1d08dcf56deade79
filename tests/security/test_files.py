"""Files of rows and images made to end a run or a build, or to fill the memory, are named instead.

Each attack is a file that a data set from elsewhere may hold.
"""

import json
import os
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from PIL import Image
from pyarrow import parquet

from care_train.config import build_config
from care_train.data import load_image, sample_digests
from care_train.data import rows as row_files
from care_train.evaluation.benchmark_run import open_questions
from tests.data.published import build_from, drawing, load, quarantine, write_jsonl

GOOD = {"prompt": "How high?", "answer": "3"}
GIB = 2**30
DEEP = "[" * 100_000 + "]" * 100_000
DEEP_ROW = f'{{"prompt": "q", "answer": {DEEP}}}'


@pytest.fixture(autouse=True)
def few_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Less than a real run's limits, so that the attacks are small too; nothing may read past."""
    monkeypatch.setattr(row_files, "MAX_ROW_BYTES", 2**20)
    read_bytes = Path.read_bytes

    def bounded(path: Path) -> bytes:
        assert path.stat().st_size < GIB, f"read {path} whole"
        return read_bytes(path)

    monkeypatch.setattr(Path, "read_bytes", bounded)


def sparse(path: Path, size: int = 4 * GIB, start: bytes = b"") -> Path:
    """A file that takes no room on the disk."""
    with path.open("wb") as file:
        file.write(start)
        file.truncate(size)
    return path


def build_rows(folder: Path, rows: list[Any], **settings: Any) -> dict[int, str]:
    """Why rows were rejected, by row; the last one is good and kept."""
    path = write_jsonl(folder / "rows.jsonl", [*rows, GOOD])
    source = {"name": "s", "path": str(path)} | settings
    manifest, output = build_from(folder, [source])
    assert manifest["counts"]["total"]["kept"] == 1
    return {row["row"]: row["reason"] for row in quarantine(output)}


ORIENTATIONS = {
    "text": struct.pack("<HHI4s", 0x112, 2, 4, b"up\0\0"),
    "two numbers": struct.pack("<HHIHH", 0x112, 3, 2, 6, 6),
    "beyond the file": struct.pack("<HHII", 0x112, 12, 9, 2**31),
    "no type": struct.pack("<HHII", 0x112, 99, 1, 6),
}


def test_an_odd_exif_orientation_is_none(tmp_path: Path):
    """The photos are read all the same, in runs and builds."""
    for number, (name, entry) in enumerate(ORIENTATIONS.items()):
        head = b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<H", 1) + entry + bytes(4)
        path = tmp_path / f"{name}.jpg"
        drawing(number).save(path, "JPEG", exif=head + struct.pack("<II", 6, 0))
        image = load_image(path, location="r: row 1", max_pixels=10**6)
        assert sorted(image.size) == sorted(drawing(number).size), name
    rows = [GOOD | {"image": f"{name}.jpg"} for name in ORIENTATIONS]
    path = write_jsonl(tmp_path / "r.jsonl", rows)
    manifest, _ = build_from(tmp_path, [{"name": "s", "path": str(path)}])
    assert manifest["counts"]["total"]["images"] == len(ORIENTATIONS)


def encrypted(data: bytes) -> bytes:
    """The same archive with the encryption bit set in each header."""
    for magic, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        place = data.index(magic) + offset
        data = data[:place] + bytes([data[place] | 1]) + data[place + 1 :]
    return data


NOISE, UNREADABLE = os.urandom(300), "image_unreadable"
ARCHIVES: dict[str, tuple[bytes, Any, str]] = {
    "cut": (NOISE, lambda data: data[: len(data) // 2], UNREADABLE),
    "no archive": (NOISE, lambda data: b"no archive", UNREADABLE),
    "encrypted": (NOISE, encrypted, UNREADABLE),
    "damaged member": (NOISE, lambda data: data[:30] + bytes(60) + data[90:], UNREADABLE),
    # 64 MiB of zeros in 64 kB are read to the limit alone.
    "bomb": (bytes(2**26), lambda data: data, "image_too_large"),
}


@pytest.mark.parametrize("fault", ARCHIVES)
def test_a_faulty_archive_rejects_its_rows(tmp_path: Path, fault: str):
    """The build goes on with the rows whose images are elsewhere."""
    content, change, reason = ARCHIVES[fault]
    path = tmp_path / "images.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("a.png", content)
    path.write_bytes(change(path.read_bytes()))
    rows = [GOOD | {"image": "a.png"}]
    assert build_rows(tmp_path, rows, image_dir=[str(path)]) == {1: reason}


def test_deep_json_is_a_bad_row(tmp_path: Path):
    """A run names the line, a build puts it into quarantine."""
    path = tmp_path / "deep.jsonl"
    path.write_text("\n".join([DEEP_ROW, json.dumps(GOOD), DEEP]))
    with pytest.raises(ValueError, match=r"2 rows cannot be used:\n.*row 1: .*nested too deeply"):
        load(path)
    manifest, _ = build_from(tmp_path, [{"name": "s", "path": str(path)}])
    assert manifest["counts"]["total"] | {"kept": 1, "rejected": 2} == manifest["counts"]["total"]


def test_a_sparse_image_is_not_read_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Its size is asked before a decoder sees it, whether it is decoded, checked by its digest or
    built."""
    monkeypatch.setattr(Image, "open", lambda *_, **__: pytest.fail("opened"))
    sparse(tmp_path / "a.png", start=b"\x89PNG\r\n\x1a\n")
    row = GOOD | {"image": "a.png"}
    [sample] = load(write_jsonl(tmp_path / "one.jsonl", [row]))
    with pytest.raises(ValueError, match=r"one\.jsonl: row 1: image .*a\.png'.*: got a file of"):
        load_image(sample.images[0], location=sample.location, max_pixels=10**6)
    with pytest.raises(ValueError, match=r"one\.jsonl: row 1: image .* bytes, wanted at most"):
        list(sample_digests([sample]))
    assert build_rows(tmp_path, [row]) == {1: "image_too_large"}


def parquet_bomb(path: Path) -> None:
    """A thousand times the same 40 MB: a dictionary of one entry, compressed to almost nothing."""
    numbers = pyarrow.array([0] * 1000, pyarrow.int32())
    prompts = pyarrow.DictionaryArray.from_arrays(numbers, pyarrow.array(["x" * 40_000_000]))
    table = pyarrow.table({"prompt": prompts, "answer": ["1"] * 1000})
    parquet.write_table(table, path, compression="zstd", store_schema=False)
    assert path.stat().st_size < 10_000


def long_texts(path: Path) -> None:
    """Different texts of one letter compress to nothing, and their size is in the file."""
    table = pyarrow.table({"prompt": ["x" * (100_000 + i) for i in range(40)]})
    parquet.write_table(table, path, compression="zstd", use_dictionary=False)


ROWS: dict[str, tuple[Callable[[Path], object], str]] = {
    "deep.json": (
        lambda path: path.write_text(f"[{json.dumps(GOOD)}, {DEEP_ROW}]"),
        "row 2: JSON nested too deeply",
    ),
    "line.jsonl": (
        lambda path: sparse(path, 2**24, json.dumps(GOOD).encode() + b"\n"),
        r"row 2: not JSON \(longer than 1048576",
    ),
    "list.json": (
        lambda path: sparse(path, 2**24, b'[{"prompt": "'),
        "row 1: longer than 1048576",
    ),
    "zeros.json": (sparse, r"begins with b'\\x00"),
    "zeros.parquet": (lambda path: sparse(path, start=b"PAR1"), "not a Parquet file"),
    "bomb.parquet": (parquet_bomb, "rows 1 to 1000: reading it takes more than"),
    "claim.parquet": (long_texts, r"got a file of \d+ bytes that says it holds"),
}


@pytest.mark.parametrize("name", ROWS)
def test_a_file_of_rows_is_not_read_beyond_the_limits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
):
    """Lines, rows and columns of any length: the message names the file and the place."""
    limit = 2**20 if name == "claim.parquet" else GIB
    monkeypatch.setattr("care_train.data.arrow_rows.MAX_EXPANDED_BYTES", limit)
    make, message = ROWS[name]
    make(tmp_path / name)
    with pytest.raises(ValueError, match=rf"{name}.*{message}"):
        load(tmp_path / name)
    if name == "bomb.parquet":
        with pytest.raises(ValueError, match=rf"{name}: reading it takes more than 1073741824"):
            build_from(tmp_path, [{"name": "s", "path": str(tmp_path / name)}])


@pytest.mark.parametrize("name", ["/dev/zero", "pipe.jsonl"])
def test_devices_and_pipes_are_no_files_of_rows(tmp_path: Path, name: str):
    """What never ends is not opened: as training rows, as held-out rows and as a benchmark; in a
    folder of tables it is none of them."""
    os.mkfifo(tmp_path / "pipe.jsonl")
    path = tmp_path / name
    for key, setting in (("data", "data.path"), ("eval.data", "eval.data")):
        with pytest.raises(ValueError, match=rf"^{setting}: .*got a device or pipe"):
            load(path, key)
    config = build_config({"eval": {"sources": {"mathvista": str(path)}}})
    with pytest.raises(ValueError, match=r"eval\.sources\.mathvista: .*got a device or pipe"):
        open_questions("mathvista", config)
    write_jsonl(tmp_path / "train.jsonl", [GOOD])
    assert len(load(tmp_path)) == 1


@pytest.mark.parametrize("name", ["/dev/zero", "pipe.png"])
def test_devices_and_pipes_are_no_images(tmp_path: Path, name: str):
    """Nor is one read as an image, whether decoded, checked by its digest or built."""
    os.mkfifo(tmp_path / "pipe.png")
    row = GOOD | {"image": name}
    path = write_jsonl(tmp_path / "r.jsonl", [row])
    config = build_config({"data": {"path": str(path)}, "eval": {"data": str(path)}})
    with pytest.raises(ValueError, match=r"r\.jsonl: row 1: image .*no such file"):
        open_questions("data", config)
    [sample] = load(path)
    with pytest.raises(ValueError, match=r"r\.jsonl: row 1: image .*no such file"):
        load_image(sample.images[0], location=sample.location, max_pixels=100)
    assert build_rows(tmp_path, [row]) == {1: "image_missing"}
