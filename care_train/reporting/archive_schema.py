"""The columns of a run's archive, of groups, rollouts and evaluated answers: docs/archive.md."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

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
    """Rows as a table, all of whose columns they have; arrays never become Python objects."""
    import pyarrow as pa

    columns = {
        field.name: [_clean(row[field.name], field.type) for row in rows] for field in schema
    }
    return pa.table(columns, schema)


def read_table(path: Path, schema: "pa.Schema", columns: Sequence[str] | None = None) -> "pa.Table":
    """What `schema` has of one file; nothing where a run that goes on dropped it, being over its
    limit."""
    import pyarrow as pa
    import pyarrow.parquet as parquet

    try:
        with parquet.ParquetFile(path) as opened:
            table = opened.read(columns=columns)
        # Exactly the columns, and fields of structs, that the schema has.
        found = [
            table[field.name].cast(field.type)
            if field.name in table.column_names
            else pa.nulls(len(table), field.type)
            for field in schema
        ]
    except FileNotFoundError:
        return schema.empty_table()
    except pa.ArrowException as error:
        raise ValueError(f"{path}: damaged ({error}): delete the file") from error
    return pa.table(found, schema)


def _clean(value: Any, type: Any) -> Any:
    """`value` with every field of its structs, and without half a surrogate pair, which JSON rows
    may hold and UTF-8 has no place for."""
    if isinstance(value, str):
        return value.encode(errors="replace").decode()
    if isinstance(value, list):
        return [_clean(item, type.value_type) for item in value]
    if isinstance(value, Mapping):
        return {field.name: _clean(value[field.name], field.type) for field in type}
    return value


def _schema(columns: Mapping[str, str]) -> "pa.Schema":
    import pyarrow as pa

    structs = {"rollout": _ROLLOUT, "reward": {"name": "string", "value": "double"}}

    def type_of(name: str) -> "pa.DataType":
        if name.startswith("list<"):
            return pa.list_(type_of(name[5:-1]))
        if name in structs:
            return pa.struct(fields_of(structs[name]))
        return pa.type_for_alias(name)

    def fields_of(columns: Mapping[str, str]) -> "list[pa.Field]":
        return [pa.field(name, type_of(type)) for name, type in columns.items()]

    return pa.schema(fields_of(columns))
