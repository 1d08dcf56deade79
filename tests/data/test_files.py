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

from care_train.config import build_config
from care_train.data import Sample, load_images, require_rationales, rows
from care_train.data.arrow_rows import ParquetRows
from care_train.data.rows import read_json_list
from tests.data.published import load, write_jsonl

ROWS = [{"prompt": f"q{i}", "answer": str(i), "image": "a.png"} for i in range(1, 6)]
LINES = "\n".join(map(json.dumps, ROWS))
TRAIN, TEST = ["0a", "0b"], ["1a", "1b"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    Image.new("RGB", (3, 2), "red").save(tmp_path / "a.png")
    return tmp_path


def prompts(path: Path | str, key: str = "data") -> list[str]:
    samples = load(path, key)
    assert len({sample.id for sample in samples}) == len(samples)
    return [sample.prompt for sample in samples]


def shards(folder: Path, *names: str) -> Path:
    """Parquet files of two rows each: `0a` and `0b`, `1a` and `1b`, ..."""
    for number, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        texts = [f"{number}a", f"{number}b"]
        parquet.write_table(pyarrow.table({"prompt": texts, "answer": texts}), folder / name)
    return folder


@pytest.mark.parametrize("form", ["jsonl", "json", "parquet", "saved", "splits"])
def test_every_source_gives_the_same_samples(folder: Path, form: str):
    """All formats give the rows in order, located from row 1, images compressed until asked for."""
    path = folder / (form if form in ("saved", "splits") else f"rows.{form}")
    images = [row | {"image": str(folder / "a.png")} for row in ROWS]
    table = datasets.Dataset.from_list(images).cast_column("image", datasets.Image())
    if form == "jsonl":
        write_jsonl(path, ROWS)
    elif form == "json":
        path.write_text(json.dumps(ROWS))
    elif form == "parquet":
        table.to_parquet(path)
    elif form == "saved":
        table.save_to_disk(path)
    else:
        datasets.DatasetDict(train=table).save_to_disk(path)
    samples = load(path)
    assert [(s.prompt, s.answer) for s in samples] == [(r["prompt"], r["answer"]) for r in ROWS]
    name = "splits/train" if form == "splits" else path.name
    assert [s.id for s in samples] == [f"{name}/{row}" for row in range(1, 6)]
    assert samples[4].location == f"{name}: row 5"
    assert samples[0].source == path.name
    for sample in samples:
        assert isinstance(sample.images[0], (Path, bytes))
        assert load_images(sample)[0].getpixel((0, 0)) == (255, 0, 0)


@pytest.mark.parametrize("name", ["r.jsonl", "r.json", "r"])
def test_a_file_is_told_by_its_bytes(tmp_path: Path, name: str):
    """JSON lines, one JSON list and Parquet, whatever the file is called."""
    for text in (LINES, "\ufeff" + LINES, json.dumps(ROWS), json.dumps(ROWS, indent=2)):
        (tmp_path / name).write_text(text, encoding="utf-8")
        assert prompts(tmp_path / name) == [row["prompt"] for row in ROWS]
    assert prompts(shards(tmp_path, name) / name) == TRAIN


def test_parquet_from_other_tools_and_class_numbers(tmp_path: Path):
    """A file that the datasets library did not write is read too, whatever its other columns; the
    number in its ClassLabel column stands for a name, which is the key."""
    tags = pyarrow.array([[("a", 1)]], pyarrow.map_(pyarrow.string(), pyarrow.int64()))
    table = pyarrow.table({"prompt": ["q"], "answer": [1.5], "tags": tags})
    parquet.write_table(table, tmp_path / "other.parquet")
    [sample] = load(tmp_path / "other.parquet")
    assert (sample.answer, sample.columns["tags"]) == ("1.5", [("a", 1)])
    kinds = datasets.Features(
        prompt=datasets.Value("string"), answer=datasets.ClassLabel(names=["red", "blue"])
    )
    data = datasets.Dataset.from_dict({"prompt": ["q"], "answer": [1]}, features=kinds)
    data.to_parquet(tmp_path / "class.parquet")
    assert load(tmp_path / "class.parquet")[0].answer == "blue"


def test_max_samples(tmp_path: Path):
    """Whole rows are drawn by the seed, in file order, and a larger draw holds a smaller one."""
    rows = [{"prompt": "q", "answer": str(i)} for i in range(100)]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)

    def draw(count: int, seed: int = 0) -> list[str]:
        return [sample.id for sample in load(path, seed=seed, max_samples=count)]

    assert draw(10) == draw(10) != draw(10, seed=1)
    assert len(draw(10)) == 10 and set(draw(10)) < set(draw(30))
    assert draw(30) == sorted(draw(30), key=lambda id: int(id.split("/")[1]))
    assert len(draw(1000)) == 100


SAME_IDS = LINES.replace('{"prompt"', '{"id": "a", "prompt"')


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("r.jsonl", '{"prompt": ', r"^r\.jsonl: row 1: not JSON .*: correct or drop the line"),
        ("r.jsonl", b'"\xff"', r"^r\.jsonl: row 1: not JSON"),
        ("r.jsonl", "[1]", r"^r\.jsonl: row 1: got a int, wanted an object"),
        # A row's number is its line, blank lines counted.
        (
            "r.jsonl",
            f'\n{LINES}\n\n{{"prompt": "q"}}',
            r"^r\.jsonl: row 8: answer: got the columns",
        ),
        ("r.jsonl", "\n\n", r"^data\.path: .*r\.jsonl has no rows, wanted at least 1"),
        # Rows of one id would share their seeds.
        ("r.jsonl", SAME_IDS, r"row 2: id: got 'a', already used by r\.jsonl: row 1"),
        ("r.json", "{}", r"r\.json: got an object at the top, wanted a list of rows"),
        ("r.json", "[", r"r\.json: row 1: not JSON"),
        ("r.parquet", "PAR0", r"r\.parquet: not a Parquet file"),
        ("r.csv", "a", r"r\.csv: begins with b'a', wanted a Parquet file, JSON"),
    ],
)
def test_unreadable_files(tmp_path: Path, name: str, content: str | bytes, message: str):
    """Broken and unknown files and rows say what they are and what is accepted."""
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=message):
        load(tmp_path / name)


@pytest.mark.parametrize("key", ["data", "eval.data", "sft.data", "sft.eval_data"])
def test_errors_name_the_key(tmp_path: Path, key: str):
    """Which of a run's data sets is wrong; several bad rows at once, the first five in full."""
    with pytest.raises(ValueError, match=rf"^{key}(\.path)?: .*gone\.jsonl does not exist: wanted"):
        load(tmp_path / "gone.jsonl", key)
    with pytest.raises(ValueError, match=rf"^{key}(\.path)?: empty text does not exist: wanted"):
        load("", key)
    with pytest.raises(ValueError, match=rf"^{key}(\.path)?: .* has no files of split .*, wanted"):
        load(tmp_path, key)
    with pytest.raises(ValueError) as error:
        load(write_jsonl(tmp_path / "bad.jsonl", [{"prompt": "q"}] * 8), key)
    lines = str(error.value).splitlines()
    assert lines[0].startswith(f"{key}: ")
    assert lines[0].endswith("bad.jsonl: 8 rows cannot be used:")
    assert lines[1].startswith("bad.jsonl: row 1: answer: got the columns")
    assert lines[-1] == "and 3 more"


def test_require_rationales():
    """A missing rationale is an error only where no row has one."""
    bare = [Sample(id=str(i), prompt="q", answer="x", location=f"r: row {i}") for i in range(5)]
    told = Sample(id="t", prompt="q", answer="x", rationale="because")
    assert require_rationales([*bare, told]) == [told]
    with pytest.raises(ValueError, match=r"rationale: got none in 5 rows \(r: row 0, .*, \.\.\.\)"):
        require_rationales(bare)


@pytest.mark.parametrize(
    ("names", "key", "wanted"),
    [
        (("data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet"), "data", None),
        (("train-0.parquet", "test-0.parquet"), "data", TRAIN),
        (("train-0.parquet", "test-0.parquet"), "eval.data", TEST),
        (("train/0.parquet", "validation/0.parquet"), "sft.eval_data", TEST),
        (("geo_train.parquet", "geo_dev.parquet"), "eval.data", TEST),
        (("rows.parquet", "more.parquet"), "eval.data", TEST + TRAIN),
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
        prompts(f"{tmp_path}@test", "eval.data")


def test_splits_of_a_saved_data_set(tmp_path: Path):
    """Training reads `train`, an evaluation `test` or `validation`, and never `train` unasked."""
    splits = {
        name: datasets.Dataset.from_list([{"prompt": name, "answer": "1"}])
        for name in ("train", "validation")
    }
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "both")
    assert prompts(tmp_path / "both") == ["train"]
    assert prompts(tmp_path / "both", "eval.data") == ["validation"]
    assert prompts(f"{tmp_path}/both@train", "eval.data") == ["train"]
    datasets.DatasetDict(train=splits["train"]).save_to_disk(tmp_path / "one")
    wanted = r"^eval\.data: .*one: got no split 'test' or .* one of train: append"
    with pytest.raises(ValueError, match=wanted):
        prompts(tmp_path / "one", "eval.data")


def test_a_folder_is_read_without_what_is_no_table_of_its_own(tmp_path: Path):
    """Copies, as another format or the same bytes under two names; a build's manifest and
    quarantine, a repository's notes and hidden files."""
    shards(tmp_path, "train.parquet", "other/train-1.parquet")
    (tmp_path / "train.jsonl").write_text(LINES)
    (tmp_path / "train-copy.parquet").write_bytes((tmp_path / "train.parquet").read_bytes())
    for name in ("manifest.json", "quarantine.jsonl", "dataset_infos.json", ".cache.json"):
        (tmp_path / name).write_text('{"prompt": "no row", "answer": "1"}\n')
    assert sorted(prompts(tmp_path)) == TRAIN + TEST


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
    for text in (json.dumps(listed, indent=2), "\ufeff" + json.dumps(listed) + "\n"):
        path.write_text(text, encoding="utf-8")
        assert list(read_json_list(path)) == listed
    path.write_text('[{"a": 1}, {"b": }]')
    with pytest.raises(ValueError, match=r"r\.json: row 2: not JSON"):
        list(read_json_list(path))
