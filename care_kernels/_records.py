"""Records of per-row vectors: NamedTuples whose fields are tensors over the same rows, or None."""

from collections.abc import Sequence
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

Record = TypeVar("Record", bound=NamedTuple)


def take(record: Record, rows: slice | Tensor) -> Record:
    """The same record at the given rows."""
    return record._make(None if field is None else field[rows] for field in record)


def join(records: Sequence[Record]) -> Record:
    """Records of consecutive rows as one; a field is None in all of them or in none."""
    columns = zip(*records, strict=True)
    return records[0]._make(None if column[0] is None else torch.cat(column) for column in columns)


def spread(record: Record, rows: Tensor, num_rows: int, fill: Sequence[float | bool]) -> Record:
    """A record of `rows` [M] laid out over [num_rows], with each field's `fill` elsewhere."""
    return record._make(
        None if field is None else field.new_full((num_rows,), default).index_copy_(0, rows, field)
        for field, default in zip(record, fill, strict=True)
    )


def overwrite(record: Record, rows: Tensor, values: Record) -> Record:
    """The record with `values` [M] in place of its numbers at `rows` [M]."""
    return record._make(
        None if field is None else field.index_copy(0, rows, value)
        for field, value in zip(record, values, strict=True)
    )
