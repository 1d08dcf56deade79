"""Rows are read when asked for, checked as they are, known by a checksum, in a fixed order."""

from dataclasses import replace
from pathlib import Path

import datasets
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from pyarrow import parquet

from care_train.data import (
    PromptOrder,
    Sample,
    arrow_rows,
    load_images,
    require_rationales,
    sample_digests,
)
from care_train.data.schema import sample_digest
from tests.data.published import TEXT, build_from, drawing, load, write_jsonl


@pytest.fixture
def built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A built file of five rows, the second without a rationale."""
    for number in range(5):
        drawing(number).save(tmp_path / f"{number}.png")
    rows = [
        {"prompt": f"q{i}?", "answer": str(i), "image": f"{i}.png", "rationale": "so" * (i != 1)}
        for i in range(5)
    ]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    monkeypatch.setattr("care_train.data.build._ROW_GROUP", 2)
    _, output = build_from(tmp_path, [{"name": "mine", "path": str(path)}])
    return output / "train.parquet"


def test_samples_are_a_sequence(built: Path):
    """Indices from either end, slices, iteration and a choice of rows, all in the file's order."""
    samples = load(built)
    assert [s.prompt for s in samples] == [f"q{i}?" for i in range(5)]
    assert samples[-1].location == "train.parquet: row 5"
    assert [s.answer for s in samples[1:4][::-1]] == ["3", "2", "1"]
    assert [s.answer for s in require_rationales(samples)] == ["0", "2", "3", "4"]
    with pytest.raises(IndexError):
        samples[5]
    few = load(built, max_samples=3)
    assert len(few) == 3
    assert set(sample_digests(few)) < set(sample_digests(samples))


def test_one_row_group_is_read_at_a_time(built: Path, monkeypatch: pytest.MonkeyPatch):
    """A row reads its own group; its neighbours there cost nothing more."""
    read = []
    original = parquet.ParquetFile.read_row_group
    monkeypatch.setattr(
        parquet.ParquetFile,
        "read_row_group",
        lambda self, group: read.append(group) or original(self, group),
    )
    samples = load(built)
    assert read == []
    _ = samples[3], samples[2], samples[4], samples[0]
    assert read == [1, 2, 0]


def test_a_damaged_row_is_named(built: Path):
    """A built row that is not as it was built: file, row, checksum got and wanted."""
    table = parquet.read_table(built)
    place = table.schema.get_field_index("answer")
    answers = table.column("answer").to_pylist()
    changed = datasets.Dataset.from_dict({"a": [*answers[:3], "9", answers[4]]}).data.column(0)
    parquet.write_table(table.set_column(place, table.schema.field(place), changed), built)
    samples = load(built)
    assert samples[2].answer == "2"
    with pytest.raises(ValueError, match=r"train\.parquet: row 4: digest: got \w+, wanted"):
        samples[3]


def test_a_build_of_another_version_is_refused(built: Path):
    """Its rows may have other columns."""
    table = parquet.read_table(built)
    note = {b"care_train.data_build": b'{"version": 1}'}
    parquet.write_table(table.replace_schema_metadata(table.schema.metadata | note), built)
    with pytest.raises(ValueError, match=r"train\.parquet: .*version\": 1.*: build it again"):
        load(built)


def test_builds_beside_each_other_share_no_id(built: Path):
    """Each was checked by itself; rows of one id would share their seeds."""
    parquet.write_table(parquet.read_table(built)[:2], built.with_name("train-2.parquet"))
    with pytest.raises(ValueError, match=r"row 1: id: got .*, already used by .*\.parquet: row 1"):
        load(built.parent)


def test_digests_see_pixels_and_texts():
    """Any text, one pixel of a path's, bytes' or open image's file, or their order."""
    base = Sample(id="1", prompt="q", answer="a", images=(drawing(1), b"\x89PNG"))
    changes = [{"id": "2"}, {"prompt": "p"}, {"answer": "b"}, {"rationale": "so"}]
    images = (base.images[::-1], (drawing(2), b"\x89PNG"), (drawing(1), b"\x89PNH"))
    changes += [{"images": changed} for changed in images]
    others = [replace(base, **change) for change in changes]
    assert len({sample_digest(sample) for sample in [base, *others]}) == 8
    assert sample_digest(base) == sample_digest(replace(base, images=(drawing(1), b"\x89PNG")))


def test_digests_read_image_files(tmp_path: Path):
    """An image file changed under a run changes its row's checksum, a missing one is named, and
    none is decoded: an oversize image matters when it is looked at."""
    drawing(1).save(tmp_path / "a.png")
    path = write_jsonl(tmp_path / "r.jsonl", [{"prompt": "q", "answer": "1", "image": "a.png"}] * 2)
    before = list(sample_digests(load(path)))
    Image.new("1", (9000, 9000)).save(tmp_path / "a.png")
    after = list(sample_digests(load(path)))
    assert all(one != other for one, other in zip(before, after, strict=True))
    with pytest.raises(ValueError, match="9000 x 9000"):
        load_images(load(path)[0])
    (tmp_path / "a.png").unlink()
    for name in ("a.png", "a\0.png", "a" * 300):
        write_jsonl(path, [{"prompt": "q", "answer": "1", "image": name}])
        with pytest.raises(ValueError, match=r"r\.jsonl: row 1: image .*': no such file"):
            list(sample_digests(load(path)))


def test_large_row_groups_are_memory_mapped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A file of one huge row group is not read whole for each row."""
    rows = {"prompt": [f"q{i}" for i in range(50)], "answer": ["x" * 50] * 50}
    features = datasets.Features(prompt=TEXT, answer=TEXT)
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "r.parquet")
    monkeypatch.setattr(arrow_rows, "_MAX_GROUP_BYTES", 100)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(
        parquet.ParquetFile, "read_row_group", lambda *_: pytest.fail("read a row group")
    )
    assert [s.prompt for s in load(tmp_path / "r.parquet")][::49] == ["q0", "q49"]


@given(st.integers(1, 40), st.integers(0, 2**40), st.lists(st.integers(0, 50)))
def test_position_is_the_only_state(num_samples: int, seed: int, counts: list[int]):
    """Every row is drawn once per epoch; draws split in any way equal one long draw."""
    whole = PromptOrder(num_samples, seed).take(0, 9 * num_samples + sum(counts))
    for epoch in range(9):
        drawn = whole[epoch * num_samples : (epoch + 1) * num_samples]
        assert sorted(drawn) == list(range(num_samples))
    position = 5
    for count in counts:
        piece = PromptOrder(num_samples, seed).take(position, count)
        assert piece == whole[position : position + count]
        position += count


def test_order_is_fixed():
    """The same on every machine and in every version, as resumed runs depend on it; another for
    each epoch and seed."""
    assert PromptOrder(6, 0).take(0, 12) == [3, 4, 5, 0, 2, 1, 4, 5, 3, 1, 2, 0]
    assert PromptOrder(50, 0).take(0, 50) != PromptOrder(50, 1).take(0, 50)
