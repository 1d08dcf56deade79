"""Which rows a path means: files and folders in every form, their splits, or an error that names
path, row and fix. An evaluation never reads training rows unasked."""

import json
import logging
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pytest
from PIL import Image
from pyarrow import parquet

from care_train.config import DataSettings, build_config
from care_train.data import Sample, load_images, load_samples, require_rationales, rows
from care_train.data.arrow_rows import ParquetRows
from care_train.data.rows import read_json_list
from tests.data.published import write_jsonl

KEY_VALUES = pyarrow.map_(pyarrow.string(), pyarrow.int64())
ROWS = [{"prompt": f"q{i}", "answer": str(i), "image": "a.png"} for i in range(1, 6)]
LINES = "\n".join(map(json.dumps, ROWS))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    Image.new("RGB", (3, 2), "red").save(tmp_path / "a.png")
    return tmp_path


def load(path: Path, key: str = "data", split: str = "") -> list[Sample]:
    samples = load_samples(DataSettings(path=f"{path}{split}"), key=key)
    assert len({sample.id for sample in samples}) == len(samples)
    return list(samples)


def prompts(*arguments: Any, **options: Any) -> list[str]:
    return [sample.prompt for sample in load(*arguments, **options)]


def table(path: Path, prompts: list[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.table({"prompt": prompts, "answer": prompts}), path)


def with_image_column(folder: Path) -> datasets.Dataset:
    rows = [row | {"image": str(folder / "a.png")} for row in ROWS]
    return datasets.Dataset.from_list(rows).cast_column("image", datasets.Image())


def splits_in(folder: Path, **splits: datasets.Dataset) -> Path:
    datasets.DatasetDict(splits).save_to_disk(folder)
    return folder


@pytest.mark.parametrize("form", ["jsonl", "json", "parquet", "saved", "splits"])
def test_every_source_gives_the_same_samples(folder: Path, form: str):
    """All formats give the rows in order, located from row 1, images compressed until asked for."""
    path = folder / (form if form in ("saved", "splits") else f"rows.{form}")
    if form == "jsonl":
        write_jsonl(path, ROWS)
    elif form == "json":
        path.write_text(json.dumps(ROWS))
    elif form == "parquet":
        with_image_column(folder).to_parquet(path)
    elif form == "saved":
        with_image_column(folder).save_to_disk(path)
    else:
        splits_in(path, train=with_image_column(folder))
    samples = load(path)
    assert [(s.prompt, s.answer) for s in samples] == [(r["prompt"], r["answer"]) for r in ROWS]
    name = "splits/train" if form == "splits" else path.name
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
    saved = splits_in(folder / "splits", train=with_image_column(folder))
    with pytest.raises(ValueError, match=r"data\.path: .*splits: got no split 'test', .* train"):
        load(saved, split="@test")


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


@pytest.mark.parametrize("name", ["r.jsonl", "r.json", "r.ndjson", "r.txt", "r"])
@pytest.mark.parametrize("form", ["lines", "list", "indented list", "byte order mark", "parquet"])
def test_a_file_is_told_by_its_bytes(tmp_path: Path, name: str, form: str):
    """JSON lines, one JSON list and Parquet, whatever the file is called."""
    path = tmp_path / name
    if form == "parquet":
        table(path, [row["prompt"] for row in ROWS])
    else:
        text = {"lines": LINES, "list": json.dumps(ROWS), "byte order mark": "\ufeff" + LINES}
        path.write_text(text.get(form, json.dumps(ROWS, indent=2)), encoding="utf-8")
    assert prompts(path) == [row["prompt"] for row in ROWS]


def shards(folder: Path, *names: str) -> Path:
    for number, name in enumerate(names):
        table(folder / name, [f"{number}a", f"{number}b"])
    return folder


TRAIN, TEST = ["0a", "0b"], ["1a", "1b"]


@pytest.mark.parametrize(
    ("names", "key", "wanted"),
    [
        (("data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet"), "data", None),
        (("train-0.parquet", "test-0.parquet"), "data", TRAIN),
        (("train-0.parquet", "test-0.parquet"), "eval.data", TEST),
        (("train/0.parquet", "validation/0.parquet"), "sft.eval_data", TEST),
        (("geo_train.parquet", "geo_dev.parquet"), "eval.data", TEST),
        (("rows.parquet", "more.parquet"), "eval.data", ["1a", "1b", "0a", "0b"]),
        (("train.parquet", "other.parquet"), "eval.data", TEST),
    ],
)
def test_splits_of_a_folder(tmp_path: Path, names: Any, key: str, wanted: list[str] | None):
    """A downloaded repository: the split its files' names say, all of its shards in order."""
    assert prompts(shards(tmp_path, *names), key) == (wanted or TRAIN + TEST)


def test_a_folder_of_one_split_is_read_with_a_warning(tmp_path: Path, caplog: Any):
    """Names are a habit: where nothing else is there, the files are what was meant, but not
    where a split was named."""
    shards(tmp_path, "train-0.parquet")
    with caplog.at_level(logging.WARNING):
        assert prompts(tmp_path, "eval.data") == TRAIN
    assert "eval.data: " in caplog.text and "only files named train" in caplog.text
    with pytest.raises(ValueError, match=r"^eval\.data: .* no files of split 'test'"):
        prompts(tmp_path, "eval.data", split="@test")


def test_splits_of_a_saved_data_set(tmp_path: Path):
    """Training reads `train`, an evaluation `test` or `validation`, and never `train` unasked."""
    splits = {
        name: datasets.Dataset.from_list([{"prompt": name, "answer": "1"}])
        for name in ("train", "validation")
    }
    splits_in(tmp_path / "both", **splits)
    assert prompts(tmp_path / "both") == ["train"]
    assert prompts(tmp_path / "both", "eval.data") == ["validation"]
    assert prompts(tmp_path / "both", "eval.data", split="@train") == ["train"]
    splits_in(tmp_path / "one", train=splits["train"])
    with pytest.raises(
        ValueError,
        match=r"^eval\.data: .*no split 'test' or .* one of train: append",
    ):
        prompts(tmp_path / "one", "eval.data")


def test_copies_of_a_table_are_read_once(tmp_path: Path):
    """The same rows as Parquet and JSON lines, or twice the same bytes under two names."""
    shards(tmp_path, "train.parquet", "other/train-1.parquet")
    (tmp_path / "train.jsonl").write_text(LINES)
    (tmp_path / "train-copy.parquet").write_bytes((tmp_path / "train.parquet").read_bytes())
    assert sorted(prompts(tmp_path)) == TRAIN + TEST


def test_what_lies_beside_the_rows_is_none(tmp_path: Path):
    """A build's manifest and quarantine, a repository's notes and hidden files."""
    shards(tmp_path, "train.parquet")
    for name in ("manifest.json", "quarantine.jsonl", "dataset_infos.json", ".cache.json"):
        (tmp_path / name).write_text('{"prompt": "no row", "answer": "1"}\n')
    assert prompts(tmp_path) == TRAIN


@pytest.mark.parametrize(
    ("settings", "held_out"),
    [
        ({}, "easy_vqa@test"),
        ({"data": {"path": "x"}}, None),
        ({"data": {"path": "x@train"}, "eval": {"data": "@dev"}}, "x@dev"),
        ({"data": {"path": "x#v1"}, "eval": {"data": "@dev"}}, "x@dev#v1"),
        ({"data": {"path": "x"}, "eval": {"data": "y"}}, "y"),
    ],
)
def test_held_out_rows_are_of_no_other_data_set(settings: dict, held_out: str | None):
    """Without `eval.data` nothing is evaluated but the training data's own held-out rows."""
    found = build_config(settings).held_out
    assert (found and found.path) == held_out
    if found is None:
        with pytest.raises(ValueError, match=r"train\.eval_every: got 5, wanted 0 without eval"):
            build_config(settings | {"train": {"eval_every": 5}})


@pytest.mark.parametrize("key", ["data", "eval.data", "sft.data", "sft.eval_data"])
def test_errors_name_the_key(tmp_path: Path, key: str):
    """Which of a run's data sets is wrong."""
    with pytest.raises(ValueError, match=rf"^{key}(\.path)?: .*gone\.jsonl does not exist"):
        prompts(tmp_path / "gone.jsonl", key)
    (tmp_path / "bad.jsonl").write_text('{"prompt": "q"}\n{"prompt": "q"}\n')
    with pytest.raises(ValueError, match=rf"^{key}: .*bad\.jsonl: 2 rows cannot be used"):
        prompts(tmp_path / "bad.jsonl", key)


def test_values_hold_each_row_once(tmp_path: Path):
    """Whatever the row groups, all rows come in order."""
    numbers = pyarrow.table({"n": range(1000)})
    parquet.write_table(numbers, tmp_path / "t.parquet", row_group_size=77)
    found = [(number, row["n"]) for number, row in ParquetRows(tmp_path / "t.parquet").values()]
    assert found == [(place + 1, place) for place in range(1000)]


def test_json_lists_are_read_row_by_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Rows across reads, nested brackets, a byte order mark; a damaged row is named."""
    monkeypatch.setattr(rows, "READ_BYTES", 16)
    listed = [{"a": ["]", {"b": "}, {"}]}, {"long": "x" * 500}, {}, {"c": -1.5}]
    path = tmp_path / "r.json"
    for text in (
        json.dumps(listed),
        json.dumps(listed, indent=2),
        "\ufeff" + json.dumps(listed) + "\n",
    ):
        path.write_text(text, encoding="utf-8")
        assert list(read_json_list(path)) == listed
    path.write_text('[{"a": 1}, {"b": }]')
    with pytest.raises(ValueError, match=r"r\.json: row 2: not JSON"):
        list(read_json_list(path))
