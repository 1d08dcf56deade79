"""The archive's files: whole or absent, bounded, readable while they are written."""

import errno
import logging
from pathlib import Path

import pyarrow as pa
import pytest
from PIL import Image
from pyarrow import parquet

from care_train.reporting import open_archive, read_archive
from care_train.reporting.archive import ArchiveWriter, archive_files, cut_archive
from care_train.reporting.archive_schema import evaluation_schema, group_schema
from care_train.reporting.page import Page
from tests.reporting.archives import group, invented_groups, write_run
from tests.train.runs import ROOT, mounted_disk


def test_what_is_written_is_read(tmp_path: Path):
    """Every column, nulls and nested lists too; each image once, decoded on request."""
    rows = [*invented_groups(4), group(4, ["a", "b\u202e", "c\x00", "d"])]
    run = write_run(tmp_path, rows, per_step=2)
    table = read_archive(run)
    assert table.schema.equals(group_schema()) and table["step"].to_pylist() == [1, 1, 2, 2, 3]
    for row, wanted in zip(table.to_pylist(), rows, strict=True):
        for name, value in wanted.items():
            if name != "rollouts":
                assert row[name] == value, name
        for found, one in zip(row["rollouts"], wanted["rollouts"], strict=True):
            assert found["text"] == one["text"]
            assert found["token_ids"] == one["token_ids"].tolist()
    assert len(list((run / "archive/images").iterdir())) == 1
    assert open_archive(run, steps=range(2, 3))[0]["images"][0].size == (40, 30)
    light = read_archive(run, columns=["step", "rollouts.role"])
    assert light["rollouts"][0].as_py()[0] == {"role": "anchor"}
    with pytest.raises(ValueError, match="rollouts\\.nothing"):
        read_archive(run, columns=["rollouts.nothing"])
    # A row's JSON may hold half a surrogate pair, which UTF-8 cannot.
    broken = write_run(tmp_path / "broken", [group(0, ["\ud800 <b>", *"bcd"])])
    assert read_archive(broken)["rollouts"][0].as_py()[0]["text"] == "? <b>"


def test_files_of_an_earlier_version_read_as_today(tmp_path: Path):
    """As in a run that a newer version resumed: what a file does not hold is null in its rows."""
    run = write_run(tmp_path, list(invented_groups(2)), per_step=1)
    new = read_archive(run)
    path = archive_files(run)[0].path
    known = new.schema.field("rollouts").type.value_type
    old = pa.list_(pa.struct([field for field in known if field.name != "wrong_step_start"]))
    table = parquet.read_table(path).drop_columns(["reason"]).append_column("gone", pa.array([1]))
    place = table.column_names.index("rollouts")
    table = table.set_column(place, "rollouts", table["rollouts"].cast(old))
    parquet.write_table(table, path)
    read = read_archive(run)
    assert read.schema.equals(group_schema()) and read["reason"].to_pylist() == [None, ""]
    part = read_archive(run, columns=["rollouts.wrong_step_start"])["rollouts"].to_pylist()
    assert part[0] == [{"wrong_step_start": None}] * 4 and len(part[1]) == 4
    assert Page([run]).blocks.keys() >= {"0-step-000001-rank-00", "0-step-000002-rank-00"}


def test_a_file_that_is_being_written_does_not_count(tmp_path: Path):
    """What a kill leaves half written is not read, and a resume deletes it with later steps."""
    run = write_run(tmp_path, list(invented_groups(6)), per_step=2)
    whole = archive_files(run)[2].path
    partial = whole.with_name("step-000004-rank-00.parquet.0.partial")
    partial.write_bytes(whole.read_bytes()[:100])
    assert read_archive(run)["step"].to_pylist() == [1, 1, 2, 2, 3, 3]
    cut_archive(run, 2)
    assert not partial.exists() and read_archive(run)["step"].to_pylist() == [1, 1, 2, 2]


def test_the_oldest_steps_go_at_the_limit(tmp_path: Path, caplog, monkeypatch):
    """With one warning; the last step stays however small the limit, of the images those that a
    kept step names."""
    monkeypatch.setattr("care_train.reporting.archive._IMAGE_REST_SECONDS", -1)
    rows = list(invented_groups(1))
    image = Image.new("RGB", (8, 8))
    one_step = write_run(tmp_path / "one", rows) / "archive/step-000001-rank-00.parquet"
    limit = 6 * one_step.stat().st_size / 2**30
    with caplog.at_level(logging.WARNING), ArchiveWriter(tmp_path, 0, 1, limit) as archive:
        for step in range(1, 21):
            own = Image.new("RGB", (8, 8), (step // 2, 0, 0))
            archive.write_step(step, [rows[0] | {"step": step}], [(own,)])
    named = {name for row in read_archive(tmp_path)["images"].to_pylist() for name in row}
    assert {path.name for path in tmp_path.glob("archive/images/*")} == named
    steps = [file.step for file in archive_files(tmp_path)]
    assert 2 < len(steps) <= 6 and steps == list(range(21 - len(steps), 21))
    assert len(caplog.records) == 1 and "logging.archive_gib" in caplog.text
    with ArchiveWriter(tmp_path / "tiny", 0, 1, 1e-9) as archive:
        for step in (1, 2):
            archive.write_step(step, [rows[0] | {"step": step}], [(image,)])
    assert [file.step for file in archive_files(tmp_path / "tiny")] == [2]


def test_a_full_disk_is_reported_by_the_next_call(tmp_path: Path):
    """As the error that ends a run with 74 (docs/failures.md)."""
    rows = [group(0, ["x" * 100_000, "b", "c", "d"]) | {"step": 1}]
    noise = Image.effect_noise((300, 300), 90)
    with mounted_disk(tmp_path / "disk", "size=64k") as disk:
        with pytest.raises(OSError) as caught, ArchiveWriter(disk, 0, 1, None) as archive:
            archive.write_step(1, rows, [(noise,)])
            archive.flush()
        assert caught.value.errno == errno.ENOSPC
        assert not archive_files(disk)


def test_every_column_is_documented():
    text = (ROOT / "docs/archive.md").read_text()
    rollout = group_schema().field("rollouts").type.value_type
    names = {*group_schema().names, *evaluation_schema().names, *rollout.names}
    # The content spans share a pattern.
    names = {name.replace("_content", "") for name in names}
    assert [name for name in sorted(names) if f"`{name}`" not in text] == []
