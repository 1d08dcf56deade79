"""Files of a build: its prepared chunks on the way, the Parquet file at the end."""

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from care_train.data.arrow_rows import BUILT_KEY, DIGEST_COLUMN
from care_train.data.dataset import BUILT_FIELDS, OTHER_COLUMNS
from care_train.data.schema import OPTION_COLUMNS, Sample, sample_digest

FORMAT_VERSION = 2

_LISTS = ("images", "options")
_IMAGE_BYTES = "images.list.element.bytes"
_ROW_GROUP = 32
"""Rows read together in training: more compress better, fewer are read faster."""
_NUM_SHOWN = 200
"""Characters of a rejected row's prompt and answer."""


@dataclass(frozen=True)
class Outcome:
    """What became of one row of a source."""

    number: int
    """The row's, from 1; for JSON lines its line."""
    sample: Sample | None = None
    """A usable row, its images encoded bytes; None: it is rejected."""
    keys: tuple[int, ...] = ()
    """Of which a duplicate shares at least one."""
    looks: tuple[bytes, ...] = ()
    """What each image looks like: `ImageLook.packed`."""
    reason: str = ""
    """Why it is rejected, in a word ..."""
    detail: str = ""
    """... and for people."""
    prompt: str = ""
    """What is known of a rejected row's prompt and answer."""
    answer: str = ""


@dataclass(frozen=True)
class Part:
    """A prepared chunk."""

    source: str
    file: str
    num_filtered: int
    """Rows that `where` left out."""
    table: Any
    """`_part_schema`, memory-mapped."""

    def rows(self) -> list[dict[str, Any]]:
        """Each row without its images."""
        return self.table.drop_columns(["images"]).to_pylist()


def built_schema() -> Any:
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


def write_part(
    path: Path, source: str, file: str, num_filtered: int, rows: Sequence[Outcome]
) -> None:
    """A chunk's rows, there as a whole or not at all."""
    import pyarrow

    note = {"source": source, "file": file, "num_filtered": num_filtered}
    whole = _part_schema().with_metadata({"part": json.dumps(note)})
    table = pyarrow.Table.from_pylist([_record(row) for row in rows], schema=whole)
    partial = path.with_suffix(".partial")
    with pyarrow.ipc.new_file(str(partial), whole) as writer:
        writer.write_table(table)
    os.replace(partial, path)


def read_part(path: Path) -> Part:
    """What `write_part` wrote."""
    import pyarrow

    table = pyarrow.ipc.open_file(pyarrow.memory_map(str(path))).read_all()
    return Part(table=table, **json.loads(table.schema.metadata[b"part"]))


def write_rows(path: Path, tables: Iterable[Any]) -> None:
    """Kept rows of parts as one Parquet file of equal row groups, with one of them in memory."""
    from pyarrow import parquet

    schema = built_schema()
    compression = {name: "zstd" for name in schema.names if name not in _LISTS}
    # Images are compressed already.
    compression |= {_IMAGE_BYTES: "none"}
    # The annotations of pyarrow's writer know less than it does.
    options: dict[str, Any] = {
        "compression": compression,
        "use_dictionary": ["source", "answer_type"],
        "write_statistics": False,
        "write_page_checksum": True,
    }
    with parquet.ParquetWriter(path, schema, **options) as writer:
        for group in _groups(tables):
            writer.write_table(group.select(schema.names).cast(schema), row_group_size=_ROW_GROUP)


def _groups(tables: Iterable[Any]) -> Iterator[Any]:
    import pyarrow

    held, count = [], 0
    for table in tables:
        while table.num_rows:
            piece = table.slice(0, _ROW_GROUP - count)
            held.append(piece)
            count, table = count + piece.num_rows, table.slice(piece.num_rows)
            if count == _ROW_GROUP:
                yield pyarrow.concat_tables(held)
                held, count = [], 0
    if held:
        yield pyarrow.concat_tables(held)


def _part_schema() -> Any:
    import pyarrow

    more = {
        "number": pyarrow.int64(),
        "keys": pyarrow.list_(pyarrow.int64()),
        "looks": pyarrow.list_(pyarrow.binary()),
        "reason": pyarrow.string(),
        "detail": pyarrow.string(),
    }
    return pyarrow.schema([*built_schema(), *(pyarrow.field(*pair) for pair in more.items())])


def _record(row: Outcome) -> dict[str, Any]:
    sample = row.sample
    if sample is None:
        texts = {"prompt": row.prompt[:_NUM_SHOWN], "answer": row.answer[:_NUM_SHOWN]}
        texts |= {"reason": row.reason, "detail": row.detail}
        # A rejected row may hold what no encoding takes.
        texts = {name: text.encode(errors="replace").decode() for name, text in texts.items()}
        return {"number": row.number, **texts}
    own = ("answer_type", "tolerance", OPTION_COLUMNS[0])
    other = {name: value for name, value in sample.columns.items() if name not in own}
    text = json.dumps(other, default=_plain, ensure_ascii=False)
    return {name: getattr(sample, name) for name in BUILT_FIELDS} | {
        "images": [{"bytes": image, "path": None} for image in sample.images],
        "answer_type": sample.answer_type,
        "options": list(sample.options),
        "tolerance": sample.tolerance,
        "origin": sample.location,
        OTHER_COLUMNS: text.encode(errors="replace").decode(),
        DIGEST_COLUMN: sample_digest(sample),
        "number": row.number,
        "keys": list(row.keys),
        "looks": list(row.looks),
    }


def _plain(value: object) -> str:
    """Other columns that JSON has no form for, such as dates and bytes."""
    return value.hex() if isinstance(value, bytes) else str(value)


def rejected_line(part: Part, row: Mapping[str, Any], reason: str, detail: str) -> str:
    """A rejected row as a line of the quarantine."""
    values = {"source": part.source, "file": part.file, "row": row["number"], "reason": reason}
    values |= {"detail": detail}
    values |= {name: row[name][:_NUM_SHOWN] for name in ("prompt", "answer")}
    return json.dumps(values, ensure_ascii=False) + "\n"
