"""The Parquet file of `care-train data build`: its columns, and samples to rows of it and back."""

import json
from collections.abc import Mapping
from typing import Any

from care_train.data.answers import AnswerType
from care_train.data.schema import OPTION_COLUMNS, Sample, sample_digest

FORMAT_VERSION = 2

BUILT_KEY, BUILT_NOTE = b"care_train.data_build", json.dumps({"version": FORMAT_VERSION}).encode()
"""In a Parquet file's metadata: that a build wrote it, and in which form."""

DIGEST_COLUMN = "digest"
"""The column with each row's `sample_digest`."""

_OTHER_COLUMNS = "other_columns"
"""The column of the source's columns that the schema has no place for, as JSON."""

_FIELDS = ("id", "prompt", "answer", "rationale", "failed_rationale", "source")
"""Columns that are a sample's own fields, beside those of its images and `_COMPARED`."""

_COMPARED = ("answer_type", "options", "tolerance")


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
            _OTHER_COLUMNS: text,
            DIGEST_COLUMN: text,
        }
    )
    arrow = features.arrow_schema
    return arrow.with_metadata({**(arrow.metadata or {}), BUILT_KEY: BUILT_NOTE})


def built_row(sample: Sample) -> dict[str, Any]:
    """A sample, its images encoded bytes, as a row of `built_schema`."""
    own = ("answer_type", "tolerance", OPTION_COLUMNS[0])
    other = {name: value for name, value in sample.columns.items() if name not in own}
    text = json.dumps(other, default=_plain, ensure_ascii=False)
    return {name: getattr(sample, name) for name in _FIELDS} | {
        "images": [{"bytes": image, "path": None} for image in sample.images],
        "answer_type": sample.answer_type,
        "options": list(sample.options),
        "tolerance": sample.tolerance,
        "origin": sample.location,
        _OTHER_COLUMNS: text.encode(errors="replace").decode(),
        DIGEST_COLUMN: sample_digest(sample),
    }


def sample_of_built(row: Mapping[str, Any], location: str) -> Sample:
    """What `built_row` made a row of; its source's columns and the compared ones are `columns`.

    Raises:
        ValueError: the row is not what was written, by its digest.
    """
    other: Mapping[str, Any] = json.loads(row[_OTHER_COLUMNS])
    kind = row["answer_type"]
    sample = Sample(
        **{name: row[name] for name in _FIELDS},
        images=tuple(image["bytes"] for image in row["images"]),
        answer_type=AnswerType(kind) if kind else None,
        options=tuple(row["options"]),
        tolerance=row["tolerance"],
        location=location,
        # Its columns come first: the source may have had an `id` or a `source` of its own.
        columns={**other, **{name: row[name] for name in (*_COMPARED, "origin")}},
    )
    if (got := sample_digest(sample)) != row[DIGEST_COLUMN]:
        raise ValueError(
            f"{location}: digest: got {got}, wanted {row[DIGEST_COLUMN]}: the file is damaged; "
            "build it again"
        )
    return sample


def _plain(value: object) -> str:
    """Other columns that JSON has no form for, such as dates and bytes."""
    return value.hex() if isinstance(value, bytes) else str(value)
