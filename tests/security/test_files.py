"""Files of rows and images made to end a run or a build, or to fill the memory, are named instead.

Each attack is a file that a data set from elsewhere may hold.
"""

import json
import os
import struct
import zipfile
import zlib
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from PIL import Image
from pyarrow import parquet

from care_train.config import DataSettings, build_config
from care_train.data import images as image_files
from care_train.data import load_image, load_samples, sample_digests
from care_train.data import rows as row_files
from care_train.evaluation.benchmark_run import open_questions
from tests.data.published import build_from, drawing, quarantine, write_jsonl

GOOD = {"prompt": "How high?", "answer": "3"}
GIB = 2**30


@pytest.fixture(autouse=True)
def few_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Less than a real run's limits, so that the attacks are small too; nothing may read past."""
    monkeypatch.setattr(row_files, "MAX_ROW_BYTES", 2**20)
    read_bytes = Path.read_bytes

    def bounded(path: Path) -> bytes:
        assert path.stat().st_size < GIB, f"read {path} whole"
        return read_bytes(path)

    monkeypatch.setattr(Path, "read_bytes", bounded)


def load(path: Path, key: str = "data") -> list[Any]:
    return list(load_samples(DataSettings(path=str(path)), key=key))


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


def jpeg_with_exif(path: Path, entry: bytes, payload: bytes = b"") -> Path:
    """A JPEG whose EXIF block holds one entry, as the bytes of a TIFF directory."""
    head = b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<H", 1) + entry + bytes(4) + payload
    drawing(1).save(path, "JPEG", exif=head)
    return path


@pytest.mark.parametrize(
    "entry",
    [
        pytest.param(struct.pack("<HHI4s", 0x112, 2, 4, b"up\0\0"), id="text"),
        pytest.param(struct.pack("<HHII", 0x112, 5, 1, 26), id="rational"),
        pytest.param(struct.pack("<HHI4s", 0x112, 7, 4, b"\x06\0\0\0"), id="bytes"),
        pytest.param(struct.pack("<HHIHH", 0x112, 3, 2, 6, 6), id="two numbers"),
        pytest.param(struct.pack("<HHII", 0x112, 3, 1, 77), id="no orientation"),
        pytest.param(struct.pack("<HHII", 0x112, 12, 9, 2**31), id="beyond the file"),
        pytest.param(struct.pack("<HHII", 0x112, 99, 1, 6), id="no type"),
    ],
)
def test_an_odd_exif_orientation_is_none(tmp_path: Path, entry: bytes):
    """The photo is read all the same, in runs and builds."""
    path = jpeg_with_exif(tmp_path / "a.jpg", entry, struct.pack("<II", 6, 0))
    image = load_image(path, location="r: row 1", max_pixels=10**6)
    assert sorted(image.size) == sorted(drawing(1).size)
    row = GOOD | {"image": "a.jpg"}
    manifest, _ = build_from(
        tmp_path, [{"name": "s", "path": str(write_jsonl(tmp_path / "r.jsonl", [row]))}]
    )
    assert manifest["counts"]["total"]["images"] == 1


def archive(path: Path, **members: bytes) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for name, data in members.items():
            file.writestr(name, data)
    return path


def encrypted(data: bytes) -> bytes:
    """The same archive with the encryption bit set in each header."""
    for magic, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        place = data.index(magic) + offset
        data = data[:place] + bytes([data[place] | 1]) + data[place + 1 :]
    return data


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        pytest.param(lambda data: data[: len(data) // 2], "image_unreadable", id="cut"),
        pytest.param(lambda data: b"no archive", "image_unreadable", id="no archive"),
        pytest.param(encrypted, "image_unreadable", id="encrypted"),
        pytest.param(
            lambda data: (
                data.replace(zlib.compress(bytes(9))[:2], b"\xff\xff", 1)[:30]
                + bytes(60)
                + data[90:]
            ),
            "image_unreadable",
            id="damaged member",
        ),
    ],
)
def test_a_faulty_archive_rejects_its_rows(tmp_path: Path, change: Any, reason: str):
    """The build goes on with the rows whose images are elsewhere."""
    path = archive(tmp_path / "images.zip", **{"a.png": os.urandom(300)})
    path.write_bytes(change(path.read_bytes()))
    rows = [GOOD | {"image": "a.png"}]
    assert build_rows(tmp_path, rows, image_dir=[str(path)]) == {1: reason}


def test_an_archive_bomb_is_not_unpacked(tmp_path: Path):
    """64 MiB of zeros in 64 kB, whose header says that they are few: read to the limit alone."""
    path = archive(tmp_path / "images.zip", **{"a.png": bytes(2**26)})
    rows = [GOOD | {"image": "a.png"}]
    assert build_rows(tmp_path, rows, image_dir=[str(path)]) == {1: "image_too_large"}


def test_deep_json_is_a_bad_row(tmp_path: Path):
    """A run names the line, a build puts it into quarantine; a list's row is named too."""
    deep = "[" * 100_000 + "]" * 100_000
    lines = ['{"prompt": "q", "answer": ' + deep + "}", json.dumps(GOOD), deep]
    path = tmp_path / "deep.jsonl"
    path.write_text("\n".join(lines))
    with pytest.raises(ValueError, match=r"2 rows cannot be used:\n.*row 1: .*nested too deeply"):
        load(path)
    manifest, _ = build_from(tmp_path, [{"name": "s", "path": str(path)}])
    assert manifest["counts"]["total"] | {"kept": 1, "rejected": 2} == manifest["counts"]["total"]
    (tmp_path / "deep.json").write_text(f"[{json.dumps(GOOD)}, {lines[0]}]")
    with pytest.raises(ValueError, match=r"deep\.json: row 2: JSON nested too deeply"):
        load(tmp_path / "deep.json")


def test_a_sparse_file_is_not_read_whole(tmp_path: Path):
    """As an image, a line, a JSON row and a file of rows: its size is asked first."""
    sparse(tmp_path / "a.png", start=b"\x89PNG\r\n\x1a\n")
    row = json.dumps(GOOD | {"image": "a.png"})
    path = write_jsonl(tmp_path / "one.jsonl", [json.loads(row)])
    [sample] = load(path)
    with pytest.raises(ValueError, match=r"one\.jsonl: row 1: image .*a\.png'.*: got a file of"):
        load_image(sample.images[0], location=sample.location, max_pixels=10**6)
    with pytest.raises(ValueError, match=r"one\.jsonl: row 1: image .* bytes, wanted at most"):
        list(sample_digests([sample]))
    assert build_rows(tmp_path, [json.loads(row)]) == {1: "image_too_large"}
    line = sparse(tmp_path / "line.jsonl", size=2**24, start=(row + "\n").encode())
    with pytest.raises(ValueError, match=r"line\.jsonl: row 2: not JSON \(longer than 1048576"):
        load(line)
    listed = sparse(tmp_path / "list.json", size=2**24, start=b'[{"prompt": "')
    with pytest.raises(ValueError, match=r"list\.json: row 1: longer than 1048576"):
        load(listed)
    with pytest.raises(ValueError, match=r"begins with b'\\x00"):
        load(sparse(tmp_path / "zeros.json"))
    with pytest.raises(ValueError, match="not a Parquet file"):
        load(sparse(tmp_path / "zeros.parquet", start=b"PAR1"))


def parquet_bomb(path: Path, length: int, count: int) -> Path:
    """One long text `count` times: a dictionary of one entry, and compressed to almost nothing."""
    numbers = pyarrow.array([0] * count, pyarrow.int32())
    prompts = pyarrow.DictionaryArray.from_arrays(numbers, pyarrow.array(["x" * length]))
    table = pyarrow.table({"prompt": prompts, "answer": ["1"] * count})
    parquet.write_table(table, path, compression="zstd", store_schema=False)
    assert path.stat().st_size < 10_000
    return path


def test_ten_kilobytes_of_parquet_are_not_forty_gigabytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """A thousand times the same 40 MB: reading stops at the limit, naming file and rows."""
    from care_train.data import arrow_rows

    monkeypatch.setattr(arrow_rows, "MAX_EXPANDED_BYTES", GIB)
    path = parquet_bomb(tmp_path / "r.parquet", 40_000_000, 1000)
    with pytest.raises(ValueError, match=r"r\.parquet: rows 1 to 1000: reading it takes more than"):
        load(path)
    with pytest.raises(ValueError, match=r"r\.parquet: reading it takes more than 1073741824"):
        build_from(tmp_path, [{"name": "s", "path": str(path)}])


def test_parquet_that_claims_to_hold_too_much_is_not_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Different long texts of one letter compress to nothing, and their size is in the file."""
    from care_train.data import arrow_rows

    monkeypatch.setattr(arrow_rows, "MAX_EXPANDED_BYTES", 2**20)
    table = pyarrow.table({"prompt": ["x" * (100_000 + i) for i in range(40)]})
    parquet.write_table(table, tmp_path / "r.parquet", compression="zstd", use_dictionary=False)
    with pytest.raises(ValueError, match=r"r\.parquet: got a file of \d+ bytes that says it holds"):
        load(tmp_path / "r.parquet")


@pytest.mark.parametrize("name", ["zero", "pipe.jsonl"])
def test_devices_and_pipes_are_no_files_of_rows(tmp_path: Path, name: str):
    """What never ends is not opened: as training rows, as held-out rows and as a benchmark."""
    path = Path("/dev/zero") if name == "zero" else tmp_path / name
    if path.suffix:
        os.mkfifo(path)
    for key, setting in (("data", "data.path"), ("eval.data", "eval.data")):
        with pytest.raises(ValueError, match=rf"^{setting}: .*got a device or pipe"):
            load(path, key)
    config = build_config({"eval": {"sources": {"mathvista": str(path)}}})
    with pytest.raises(ValueError, match=r"eval\.sources\.mathvista: .*got a device or pipe"):
        open_questions("mathvista", config)


@pytest.mark.parametrize("name", ["/dev/zero", "pipe.png"])
def test_devices_and_pipes_are_no_images(tmp_path: Path, name: str):
    """Nor is one read as an image, whether decoded, checked by its digest or built."""
    if name == "pipe.png":
        os.mkfifo(tmp_path / name)
    row = GOOD | {"image": name, "prompt": "?"}
    path = write_jsonl(tmp_path / "r.jsonl", [row])
    config = build_config({"data": {"path": str(path)}, "eval": {"data": str(path)}})
    with pytest.raises(ValueError, match=r"r\.jsonl: row 1: image .*no regular file"):
        open_questions("data", config)
    [sample] = load(path)
    with pytest.raises(ValueError, match=r"r\.jsonl: row 1: image .*no such file"):
        load_image(sample.images[0], location=sample.location, max_pixels=100)
    assert build_rows(tmp_path, [row]) == {1: "image_missing"}


def test_a_folder_of_rows_holds_no_pipes(tmp_path: Path):
    """What is not a regular file is none of a folder's tables."""
    write_jsonl(tmp_path / "train.jsonl", [GOOD])
    os.mkfifo(tmp_path / "train-2.jsonl")
    assert len(load(tmp_path)) == 1


def test_an_image_file_beyond_the_limit_is_not_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Decoders read chunks of any length: a file over the limit reaches none."""
    monkeypatch.setattr(image_files, "MAX_IMAGE_BYTES", 100)
    monkeypatch.setattr(Image, "open", lambda *_, **__: pytest.fail("opened"))
    drawing(1).save(tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"row 1: image .*wanted at most 100"):
        load_image(tmp_path / "a.png", location="r: row 1", max_pixels=10**6)
