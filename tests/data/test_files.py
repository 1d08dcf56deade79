"""Which files a path means, and which of their splits: an evaluation never reads training rows."""

import json
import logging
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pytest
from pyarrow import parquet

from care_train.config import DataSettings, build_config
from care_train.data import load_samples

ROWS = [{"prompt": f"q{i}", "answer": str(i)} for i in range(3)]
LINES = "\n".join(map(json.dumps, ROWS))


def load(path: Path, key: str = "data", split: str = "") -> list[str]:
    samples = load_samples(DataSettings(path=f"{path}{split}"), key=key)
    assert len({sample.id for sample in samples}) == len(samples)
    return [sample.prompt for sample in samples]


def table(path: Path, prompts: list[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.table({"prompt": prompts, "answer": prompts}), path)


@pytest.mark.parametrize("name", ["r.jsonl", "r.json", "r.ndjson", "r.txt", "r"])
@pytest.mark.parametrize("form", ["lines", "list", "indented list", "byte order mark", "parquet"])
def test_a_file_is_told_by_its_bytes(tmp_path: Path, name: str, form: str):
    """JSON lines, one JSON list and Parquet, whatever the file is called."""
    path = tmp_path / name
    if form == "parquet":
        table(path, ["q0", "q1", "q2"])
    else:
        text = {"lines": LINES, "list": json.dumps(ROWS), "byte order mark": "\ufeff" + LINES}
        path.write_text(text.get(form, json.dumps(ROWS, indent=2)), encoding="utf-8")
    assert load(path) == ["q0", "q1", "q2"]


def shards(folder: Path, *names: str) -> Path:
    for number, name in enumerate(names):
        table(folder / name, [f"{number}a", f"{number}b"])
    return folder


TRAIN, TEST = ["0a", "0b"], ["1a", "1b"]


@pytest.mark.parametrize(
    ("names", "key", "prompts"),
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
def test_splits_of_a_folder(tmp_path: Path, names: Any, key: str, prompts: list[str] | None):
    """A downloaded repository: the split its files' names say, all of its shards in order."""
    assert load(shards(tmp_path, *names), key) == (prompts or TRAIN + TEST)


def test_a_folder_of_one_split_is_read_with_a_warning(tmp_path: Path, caplog: Any):
    """Names are a habit: where nothing else is there, the files are what was meant, but not
    where a split was named."""
    shards(tmp_path, "train-0.parquet")
    with caplog.at_level(logging.WARNING):
        assert load(tmp_path, "eval.data") == TRAIN
    assert "eval.data: " in caplog.text and "only files named train" in caplog.text
    with pytest.raises(ValueError, match=r"^eval\.data: .* no files of split 'test'"):
        load(tmp_path, "eval.data", split="@test")


def test_splits_of_a_saved_data_set(tmp_path: Path):
    """Training reads `train`, an evaluation `test` or `validation`, and never `train` unasked."""
    splits = {
        name: datasets.Dataset.from_list([{"prompt": name, "answer": "1"}])
        for name in ("train", "validation")
    }
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "both")
    assert load(tmp_path / "both") == ["train"]
    assert load(tmp_path / "both", "eval.data") == ["validation"]
    assert load(tmp_path / "both", "eval.data", split="@train") == ["train"]
    datasets.DatasetDict(train=splits["train"]).save_to_disk(tmp_path / "one")
    with pytest.raises(ValueError, match=r"^eval\.data: got 'test' or .* has train: append"):
        load(tmp_path / "one", "eval.data")


def test_copies_of_a_table_are_read_once(tmp_path: Path):
    """The same rows as Parquet and JSON lines, or twice the same bytes under two names."""
    shards(tmp_path, "train.parquet", "other/train-1.parquet")
    (tmp_path / "train.jsonl").write_text(LINES)
    (tmp_path / "train-copy.parquet").write_bytes((tmp_path / "train.parquet").read_bytes())
    assert sorted(load(tmp_path)) == TRAIN + TEST


def test_what_lies_beside_the_rows_is_none(tmp_path: Path):
    """A build's manifest and quarantine, a repository's notes and hidden files."""
    shards(tmp_path, "train.parquet")
    for name in ("manifest.json", "quarantine.jsonl", "dataset_infos.json", ".cache.json"):
        (tmp_path / name).write_text('{"prompt": "no row", "answer": "1"}\n')
    assert load(tmp_path) == TRAIN


@pytest.mark.parametrize(
    ("settings", "held_out"),
    [
        ({}, "easy_vqa@test"),
        ({"data": {"path": "x"}}, None),
        ({"data": {"path": "x@train"}, "eval": {"data": "@dev"}}, "x@dev"),
        ({"data": {"path": "x#v1"}, "eval": {"data": "@dev"}}, "x@dev#v1"),
        ({"data": {"path": "x"}, "eval": {"data": "y"}}, "y"),
        # As earlier versions had it.
        ({"data": {"path": "x"}, "eval": {"data": {"split": "dev"}}}, "x@dev"),
        ({"eval": {"data": {"path": "y", "split": None, "revision": "v1"}}}, "y#v1"),
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
        load(tmp_path / "gone.jsonl", key)
    (tmp_path / "bad.jsonl").write_text('{"prompt": "q"}\n{"prompt": "q"}\n')
    with pytest.raises(ValueError, match=rf"^{key}: .*bad\.jsonl: 2 rows cannot be used"):
        load(tmp_path / "bad.jsonl", key)
