"""Files and folders become samples, or an error that names path, row and fix."""

import json
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pytest
from PIL import Image
from pyarrow import parquet

from care_train.config import DataSettings
from care_train.data import Sample, load_images, load_samples, require_rationales

KEY_VALUES = pyarrow.map_(pyarrow.string(), pyarrow.int64())
ROWS = [{"prompt": f"q{i}", "answer": str(i), "image": "a.png"} for i in range(1, 6)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    Image.new("RGB", (3, 2), "red").save(tmp_path / "a.png")
    return tmp_path


def write_jsonl(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def load(path: Path, **settings: Any) -> list[Sample]:
    return load_samples(DataSettings(path=str(path), **settings))


def as_jsonl(folder: Path) -> Path:
    return write_jsonl(folder / "rows.jsonl", ROWS)


def as_json(folder: Path) -> Path:
    path = folder / "rows.json"
    path.write_text(json.dumps(ROWS))
    return path


def with_image_column(folder: Path) -> datasets.Dataset:
    rows = [row | {"image": str(folder / "a.png")} for row in ROWS]
    return datasets.Dataset.from_list(rows).cast_column("image", datasets.Image())


def as_parquet(folder: Path) -> Path:
    with_image_column(folder).to_parquet(folder / "rows.parquet")
    return folder / "rows.parquet"


def as_folder(folder: Path) -> Path:
    with_image_column(folder).save_to_disk(folder / "saved")
    return folder / "saved"


def as_folder_with_splits(folder: Path) -> Path:
    datasets.DatasetDict(train=with_image_column(folder)).save_to_disk(folder / "splits")
    return folder / "splits"


@pytest.mark.parametrize("write", [as_jsonl, as_json, as_parquet, as_folder, as_folder_with_splits])
def test_every_source_gives_the_same_samples(folder: Path, write: Any):
    """All formats give the rows in order, located from row 1, images compressed until asked for."""
    path = write(folder)
    samples = load(path)
    assert [(s.prompt, s.answer) for s in samples] == [(r["prompt"], r["answer"]) for r in ROWS]
    name = "splits/train" if path.name == "splits" else path.name
    assert [s.id for s in samples] == [f"{name}/{row}" for row in range(1, 6)]
    assert samples[4].location == f"{name}: row 5"
    assert samples[0].source == path.name
    for sample in samples:
        assert isinstance(sample.images[0], (Path, bytes))
        assert load_images(sample)[0].getpixel((0, 0)) == (255, 0, 0)


def test_max_samples(folder: Path):
    """Whole rows are drawn by the seed, in file order, and a larger draw holds a smaller one."""
    rows = [{"prompt": "q", "answer": str(i)} for i in range(100)]
    path = write_jsonl(folder / "rows.jsonl", rows)

    def draw(count: int, seed: int = 0) -> list[str]:
        return [s.id for s in load_samples(DataSettings(path=str(path), max_samples=count), seed)]

    assert draw(10) == draw(10)
    assert len(draw(10)) == 10
    assert draw(10) != draw(10, seed=1)
    assert set(draw(10)) < set(draw(30))
    assert draw(30) == sorted(draw(30), key=lambda id: int(id.split("/")[1]))
    assert len(draw(1000)) == 100
    with pytest.raises(ValueError, match=r"max_samples"):
        draw(0)


def test_easy_vqa_is_a_source():
    """`easy_vqa` needs no file; its rows are drawn whole."""
    samples = load_samples(DataSettings(path="easy_vqa@test", max_samples=7))
    assert len({sample.id for sample in samples}) == 7
    assert all(sample.id.startswith("easy_vqa/test/") for sample in samples)


@pytest.mark.parametrize("content", ["", "\n\n"])
def test_empty_dataset(folder: Path, content: str):
    """No rows: the path and what to check."""
    path = folder / "rows.jsonl"
    path.write_text(content)
    with pytest.raises(ValueError) as error:
        load(path)
    assert str(error.value) == f"data.path: {path} has no rows, wanted at least 1"


def test_blank_lines_keep_line_numbers(folder: Path):
    """A row's number in a .jsonl is its line, blank lines counted."""
    path = folder / "rows.jsonl"
    path.write_text('\n{"prompt": "q", "answer": 1}\n\n{"prompt": "q", "answer": [1, 2]}\n')
    with pytest.raises(ValueError, match=r"^rows\.jsonl: row 4: answer: got \[1, 2\]"):
        load(path)


def test_all_bad_rows_are_told_at_once(folder: Path):
    """Several bad rows come in one error: the first five, and how many more."""
    rows = [{"prompt": "q", "answer": None}] * 8 + [{"prompt": "q", "answer": "fine"}]
    with pytest.raises(ValueError) as error:
        load(write_jsonl(folder / "rows.jsonl", rows))
    lines = str(error.value).splitlines()
    assert lines[0].endswith("rows.jsonl: 8 rows cannot be used:")
    assert lines[1].startswith("rows.jsonl: row 1: answer: got nothing")
    assert lines[-1] == "and 3 more"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("r.jsonl", b'{"prompt": ', r"^r\.jsonl: row 1: not JSON .*: correct or drop the line"),
        ("r.jsonl", b'"\xff"', r"^r\.jsonl: row 1: not JSON"),
        ("r.jsonl", b"[1]", r"^r\.jsonl: row 1: got a int, wanted an object"),
        ("r.json", b"{}", r"r\.json: got an object at the top, wanted a list of rows"),
        ("r.json", b"[", r"r\.json: row 1: not JSON"),
        ("r.parquet", b"PAR0", r"r\.parquet: not a Parquet file"),
        ("r.csv", b"a", r"r\.csv: begins with b'a', wanted a Parquet file, JSON"),
    ],
)
def test_unreadable_files(folder: Path, name: str, content: bytes, message: str):
    """Broken and unknown files say what they are and what is accepted."""
    (folder / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load(folder / name)


def test_missing_paths_and_splits(folder: Path):
    """A missing path, a folder of something else and a missing split are told apart."""
    with pytest.raises(ValueError, match=r"gone\.jsonl does not exist: wanted a Parquet"):
        load(folder / "gone.jsonl")
    with pytest.raises(ValueError, match="has no files of split 'train', wanted a Parquet"):
        load(folder)
    with pytest.raises(ValueError, match=r"data\.path: got 'test', .*splits has train"):
        load(Path(f"{as_folder_with_splits(folder)}@test"))


def test_ids_are_unique(folder: Path):
    """Two rows with one id would share their seeds: both rows are named."""
    rows = [{"id": id, "prompt": "q", "answer": "x"} for id in ("a", "b", "a")]
    with pytest.raises(ValueError) as error:
        load(write_jsonl(folder / "rows.jsonl", rows))
    message = str(error.value)
    assert message.startswith("rows.jsonl: row 3: id: got 'a', already used by rows.jsonl: row 1")


def test_class_numbers_are_read_by_name(folder: Path):
    """The number in a ClassLabel column stands for a name: that is the key."""
    features = datasets.Features(
        prompt=datasets.Value("string"), answer=datasets.ClassLabel(names=["red", "blue"])
    )
    data = datasets.Dataset.from_dict({"prompt": ["q"], "answer": [1]}, features=features)
    data.to_parquet(folder / "r.parquet")
    assert [sample.answer for sample in load(folder / "r.parquet")] == ["blue"]


def test_require_rationales():
    """A missing rationale is an error only where no row has one."""
    bare = [Sample(id=str(i), prompt="q", answer="x", location=f"r: row {i}") for i in range(5)]
    told = Sample(id="t", prompt="q", answer="x", rationale="because")
    assert require_rationales([*bare, told]) == [told]
    with pytest.raises(ValueError, match=r"rationale: got none in 5 rows \(r: row 0, .*, \.\.\.\)"):
        require_rationales(bare)


def test_parquet_from_other_tools(folder: Path):
    """A file that the datasets library did not write is read too, whatever its other columns."""
    columns = {"prompt": ["q"], "answer": [1.5], "tags": pyarrow.array([[("a", 1)]], KEY_VALUES)}
    parquet.write_table(pyarrow.table(columns), folder / "r.parquet")
    [sample] = load(folder / "r.parquet")
    assert (sample.answer, sample.columns["tags"]) == ("1.5", [("a", 1)])
