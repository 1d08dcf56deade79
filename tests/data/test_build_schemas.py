"""A published schema that changes is an error with column, type got and type wanted."""

import json
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

from care_train.data.building.adapters import ADAPTERS
from tests.data import published
from tests.data.published import build_from, quarantine, write_jsonl

PUBLISHED = {name: adapter for name, adapter in ADAPTERS.items() if adapter.columns}
COLUMNS = [(name, c) for name, adapter in PUBLISHED.items() for c in adapter.columns]
REQUIRED = [(name, c) for name, c in COLUMNS if PUBLISHED[name].columns[c].required]


def _write(name: str, folder: Path, column: str, *, drop: bool) -> Path:
    """The adapter's published file with a column dropped, or of structs."""
    source = getattr(published, name)(folder / name)
    path = sorted([*source.rglob("*.parquet"), *source.rglob("*.json")])[0]
    if path.suffix == ".json":
        rows = json.loads(path.read_text())
        for row in rows:
            row.pop(column, None)
            row |= {} if drop else {column: {"x": 1}}
        path.write_text(json.dumps(rows))
        return path
    table = parquet.read_table(path)
    place = table.schema.get_field_index(column)
    structs = pyarrow.array([{"x": 1}] * len(table))
    if drop:
        table = table.remove_column(place)
    elif place < 0:
        table = table.append_column(column, structs)
    else:
        table = table.set_column(place, column, structs)
    # The datasets library's note still says what the columns were.
    parquet.write_table(table.replace_schema_metadata(None), path)
    return path


@pytest.mark.parametrize(("name", "column"), COLUMNS)
def test_every_column_of_another_type_is_named(name: str, column: str, tmp_path: Path):
    """Whatever is read: source, file, column, the type got and that wanted, before any output."""
    path = _write(name, tmp_path, column, drop=False)
    with pytest.raises(ValueError) as error:
        build_from(tmp_path, [{"name": "s", "adapter": name, "path": str(path)}])
    wanted = PUBLISHED[name].columns[column].wanted
    assert str(error.value) == (
        f"source s ({name}): {path.name}: column {column!r}: got an object with 'x', "
        f"wanted {wanted}"
    )


@pytest.mark.parametrize(("name", "column"), REQUIRED)
def test_every_missing_column_is_named(name: str, column: str, tmp_path: Path):
    """A required column that is gone: what was wanted, and what the file has instead."""
    path = _write(name, tmp_path, column, drop=True)
    with pytest.raises(ValueError) as error:
        build_from(tmp_path, [{"name": "s", "adapter": name, "path": str(path)}])
    start = f"source s ({name}): {path.name}: column {column!r}: got none (the columns are "
    assert str(error.value).startswith(start)
    assert f"wanted {PUBLISHED[name].columns[column].wanted}" in str(error.value)


def test_changed_json_schemas_are_named(tmp_path: Path):
    """Without a schema in the file, the first row tells; a later odd row is quarantined."""
    rows = [{"question": "q?", "answer": "1", "image": []}] * 2
    path = write_jsonl(tmp_path / "v.jsonl", [rows[0] | {"answer": 3}, rows[1]])
    source = {"name": "virl", "adapter": "virl39k", "path": str(path)}
    with pytest.raises(ValueError, match=r"virl39k\): v\.jsonl: column 'answer': got 3, wanted"):
        build_from(tmp_path, [source])
    path = write_jsonl(tmp_path / "v.jsonl", [rows[0], rows[1] | {"answer": ["a", "b"]}])
    _, output = build_from(tmp_path, [source], overwrite=True)
    [row] = quarantine(output)
    assert (row["row"], row["reason"]) == (2, "column_type")
    assert row["detail"] == "virl39k: v.jsonl: row 2: column 'answer': got ['a', 'b'], wanted text"
