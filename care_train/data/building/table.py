"""The built file's columns, and its parts on the way."""

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from care_train.data.building.prepare import Prepared
from care_train.data.schema import sample_digest
from care_train.data.table_format import BUILT_KEY, DIGEST_COLUMN, OTHER_COLUMNS

FORMAT_VERSION = 1

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
            "source": text,
            "origin": text,
            OTHER_COLUMNS: text,
            DIGEST_COLUMN: text,
        }
    )
    arrow = features.arrow_schema
    version = json.dumps({"version": FORMAT_VERSION}).encode()
    return arrow.with_metadata({**(arrow.metadata or {}), BUILT_KEY: version})


def table_of(rows: Sequence[Prepared]) -> Any:
    """Kept rows as an Arrow table."""
    import pyarrow

    return pyarrow.Table.from_pylist([_record(row) for row in rows], schema=schema())


def write_part(path: Path, rows: Sequence[Prepared]) -> None:
    """Kept rows of one chunk, durable."""
    import pyarrow

    table = table_of(rows)
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


def _record(row: Prepared) -> dict[str, Any]:
    sample = row.sample
    return {
        "id": sample.id,
        "prompt": sample.prompt,
        "answer": sample.answer,
        "images": [{"bytes": image, "path": None} for image in sample.images],
        "rationale": sample.rationale,
        "failed_rationale": sample.failed_rationale,
        "answer_type": row.answer_type,
        "options": list(row.options),
        "source": sample.source,
        "origin": sample.location,
        OTHER_COLUMNS: json.dumps(dict(sample.columns), default=_plain, ensure_ascii=False),
        DIGEST_COLUMN: sample_digest(sample),
    }


def _plain(value: object) -> str:
    """Other columns that JSON has no form for, such as dates and bytes."""
    return value.hex() if isinstance(value, bytes) else str(value)
