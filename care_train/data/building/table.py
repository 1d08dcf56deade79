"""The built file's columns, and its parts on the way."""

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from care_train.data.arrow_rows import BUILT_KEY, DIGEST_COLUMN
from care_train.data.dataset import BUILT_FIELDS, OTHER_COLUMNS
from care_train.data.schema import OPTION_COLUMNS, Sample, sample_digest

FORMAT_VERSION = 2

_LISTS = ("images", "options")
_IMAGE_BYTES = "images.list.element.bytes"


def schema() -> Any:
    """The Arrow schema, with the datasets library's note on it, so that it shows the images."""
    import datasets
    from datasets import Image, List, Value

    text = Value("string")
    features = datasets.Features(
        {
            "id": text,
            "prompt": text,
            "answer": text,
            "images": List(Image()),
            "rationale": text,
            "failed_rationale": text,
            "answer_type": text,
            "options": List(text),
            "tolerance": Value("float64"),
            "source": text,
            "origin": text,
            OTHER_COLUMNS: text,
            DIGEST_COLUMN: text,
        }
    )
    arrow = features.arrow_schema
    version = json.dumps({"version": FORMAT_VERSION}).encode()
    return arrow.with_metadata({**(arrow.metadata or {}), BUILT_KEY: version})


def write_part(path: Path, rows: Sequence[Sample]) -> None:
    """Kept rows of one chunk, durable."""
    import pyarrow

    table = pyarrow.Table.from_pylist([_record(row) for row in rows], schema=schema())
    with path.open("wb") as file:
        with pyarrow.ipc.new_file(file, table.schema) as writer:
            writer.write_table(table)
        file.flush()
        os.fsync(file.fileno())


def join_parts(parts: Sequence[Path], path: Path, row_group: int) -> None:
    """All parts as one Parquet file of equal row groups, with one of them in memory."""
    from pyarrow import parquet

    compression = {name: "zstd" for name in schema().names if name not in _LISTS}
    # Images are compressed already.
    compression |= {_IMAGE_BYTES: "none"}
    # The annotations of pyarrow's writer know less than it does.
    options: dict[str, Any] = {
        "compression": compression,
        "use_dictionary": ["source", "answer_type"],
        "write_statistics": False,
        "write_page_checksum": True,
    }
    with parquet.ParquetWriter(path, schema(), **options) as writer:
        for table in _groups(parts, row_group):
            writer.write_table(table, row_group_size=row_group)


def _groups(parts: Sequence[Path], row_group: int) -> Iterator[Any]:
    import pyarrow

    held: list[Any] = []
    count = 0
    for part in parts:
        with pyarrow.memory_map(str(part)) as source:
            table = pyarrow.ipc.open_file(source).read_all()
        while table.num_rows:
            piece = table.slice(0, row_group - count)
            held.append(piece)
            count, table = count + piece.num_rows, table.slice(piece.num_rows)
            if count == row_group:
                yield pyarrow.concat_tables(held)
                held, count = [], 0
    if count:
        yield pyarrow.concat_tables(held)


def _record(sample: Sample) -> dict[str, Any]:
    own = ("answer_type", "tolerance", OPTION_COLUMNS[0])
    other = {name: value for name, value in sample.columns.items() if name not in own}
    text = json.dumps(other, default=_plain, ensure_ascii=False)
    return {name: getattr(sample, name) for name in BUILT_FIELDS} | {
        "images": [{"bytes": image, "path": None} for image in sample.images],
        "answer_type": sample.answer_type,
        "options": list(sample.options),
        "tolerance": sample.tolerance,
        "origin": sample.location,
        # Other columns may hold what no encoding takes.
        OTHER_COLUMNS: text.encode(errors="replace").decode(),
        DIGEST_COLUMN: sample_digest(sample),
    }


def _plain(value: object) -> str:
    """Other columns that JSON has no form for, such as dates and bytes."""
    return value.hex() if isinstance(value, bytes) else str(value)
