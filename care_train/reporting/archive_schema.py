"""The columns of a run's archive: what each group, rollout and evaluated answer holds.

Documented for readers in docs/archive.md.
"""

from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import numpy as np

# pyarrow takes half a second to load, and commands that write no archive import this package too.
if TYPE_CHECKING:
    import pyarrow as pa

Row = Mapping[str, Any]
"""One row's values by column; lists of numbers are NumPy arrays, None is null."""

_QUESTION = {
    "step": "int32",
    "row_id": "string",
    "visit": "int32",
    "location": "string",
    "source": "string",
    "prompt": "string",
    "images": "list<string>",
    "answer": "string",
    "answer_type": "string",
    "options": "list<string>",
}
_ANSWER = {
    "text": "string",
    "token_ids": "list<int32>",
    "finished": "bool",
    "accuracy": "double",
    "format": "double",
    "reward": "double",
    "rewards": "list<reward>",
    "verdict": "string",
    "format_verdict": "string",
}
REGIONS = ("think", "think_content", "answer", "answer_content", "wrong_step")
"""The fields of `algorithm.Spans`, in order."""
SPAN_COLUMNS = tuple(f"{region}_{end}" for region in REGIONS for end in ("start", "end"))
_ROLLOUT = (
    _ANSWER
    | dict.fromkeys(SPAN_COLUMNS, "int32")
    | {
        "prefix_ids": "list<int32>",
        "role": "string",
        "trained": "bool",
        "rank_of_negative": "int32",
        "distance": "double",
        "reflected_from": "int32",
        "raw_advantage": "double",
        "sequence_advantage": "double",
        "token_weights": "list<float>",
        "token_advantages": "list<float>",
        "old_log_probs": "list<float>",
        "old_log_prob_sum": "float",
        "ref_log_probs": "list<float>",
        "rollout_log_probs": "list<float>",
        "entropy": "list<float>",
        "clipped": "list<int8>",
    }
)
_GROUP = _QUESTION | {
    "rank": "int32",
    "group": "int32",
    "outcome": "string",
    "reason": "string",
    "num_correct": "int32",
    "num_negatives": "int32",
    "equalize_factor": "double",
    "anchor_clamped": "bool",
    "reflection": "string",
    "reflect_on": "int32",
    "pair_distances": "list<double>",
    "rollouts": "list<rollout>",
}
_EVALUATION = _QUESTION | {"decoding": "string"} | _ANSWER


def group_schema() -> "pa.Schema":
    """Of a step's file: one row per group."""
    return _schema(_GROUP)


def evaluation_schema() -> "pa.Schema":
    """Of an evaluation's file: one row per answer."""
    return _schema(_EVALUATION)


def make_table(rows: Sequence[Row], schema: "pa.Schema") -> "pa.Table":
    """Rows as a table. Long lists of numbers never become Python objects."""
    import pyarrow as pa

    columns = [_column([row[field.name] for row in rows], field.type) for field in schema]
    return pa.Table.from_arrays(columns, schema=schema)


def _column(values: Sequence[Any], type: "pa.DataType") -> "pa.Array":
    import pyarrow as pa

    if pa.types.is_string(type):
        # Half a surrogate pair, which JSON rows may hold, has no place in UTF-8.
        clean = [value and value.encode(errors="replace").decode() for value in values]
        return pa.array(clean, type)
    if not pa.types.is_list(type):
        return pa.array(values, type)
    inner = type.value_type
    offsets = [0, *accumulate(0 if value is None else len(value) for value in values)]
    present = [value for value in values if value is not None]
    if pa.types.is_struct(inner):
        items = [item for value in present for item in value]
        fields = [inner.field(place) for place in range(inner.num_fields)]
        columns = [_column([item[field.name] for item in items], field.type) for field in fields]
        flat: Any = pa.StructArray.from_arrays(columns, fields=fields)
    elif pa.types.is_string(inner):
        flat = _column([item for value in present for item in value], inner)
    else:
        dtype = inner.to_pandas_dtype()
        arrays = [np.asarray(value, dtype) for value in present]
        flat = pa.array(np.concatenate(arrays) if arrays else np.empty(0, dtype), inner)
    is_null = pa.array([value is None for value in values], pa.bool_())
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), flat, type=type, mask=is_null)


def _schema(columns: Mapping[str, str]) -> "pa.Schema":
    import pyarrow as pa

    return pa.schema(_fields(columns.items()))


def _fields(columns: Iterable[tuple[str, str]]) -> "list[pa.Field]":
    import pyarrow as pa

    reward = {"name": "string", "value": "double"}
    structs = {"rollout": _ROLLOUT, "reward": reward}

    def type_of(name: str) -> "pa.DataType":
        if name.startswith("list<"):
            return pa.list_(type_of(name[5:-1]))
        if name in structs:
            return pa.struct(_fields(structs[name].items()))
        return pa.type_for_alias(name)

    return [pa.field(name, type_of(type)) for name, type in columns]
