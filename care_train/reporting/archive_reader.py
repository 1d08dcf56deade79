"""Read a run's archive, while the run goes on too."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from care_train.reporting.archive import ARCHIVE, IMAGES, ArchiveFile, archive_files
from care_train.reporting.archive_schema import evaluation_schema, group_schema

if TYPE_CHECKING:
    import datasets
    import pyarrow as pa


def read_archive(
    run: str | Path,
    *,
    evaluations: bool = False,
    columns: Sequence[str] | None = None,
    steps: range | None = None,
) -> "pa.Table":
    """The groups of all steps and ranks, or the evaluations' answers, in order.

    Args:
        run: the run's folder.
        evaluations: the answers of its evaluations in place of the groups.
        columns: those to read; `rollouts.text` names a field of the rollouts. None: all.
        steps: those to read; None: all.

    Raises:
        ValueError: the run has no archive, a file of it is damaged, or there is no such column.
    """
    import pyarrow as pa
    import pyarrow.parquet as parquet

    files = _files(Path(run), "eval" if evaluations else "step", steps)
    schema = evaluation_schema() if evaluations else group_schema()
    paths = None if columns is None else [_path(column, schema) for column in columns]
    tables = []
    for file in files:
        try:
            with parquet.ParquetFile(file.path) as opened:
                tables.append(opened.read(columns=paths))
        except FileNotFoundError:
            continue  # A run that goes on dropped it, being over its limit.
        except pa.ArrowException as error:
            raise ValueError(f"{file.path}: damaged ({error}): delete the file") from error
    return pa.concat_tables(tables) if tables else schema.empty_table()


def open_archive(
    run: str | Path,
    *,
    evaluations: bool = False,
    columns: Sequence[str] | None = None,
    steps: range | None = None,
) -> "datasets.Dataset":
    """`read_archive` as a Dataset in memory, whose `images` decode to images of Pillow.

    Raises:
        ValueError: as `read_archive`.
    """
    import datasets
    import pyarrow as pa

    table = read_archive(run, evaluations=evaluations, columns=columns, steps=steps)
    if "images" not in table.column_names:
        return datasets.Dataset(table)
    image = datasets.Image()
    stored = [
        [{"bytes": None, "path": str(image_path(run, name))} for name in row]
        for row in table["images"].to_pylist()
    ]
    place = table.column_names.index("images")
    # As images are stored, since a cast of the column copies all others too.
    table = table.set_column(place, "images", pa.array(stored, pa.list_(image.pa_type)))
    features = datasets.Features.from_arrow_schema(table.schema)
    features["images"] = datasets.List(image)
    return datasets.Dataset(table, info=datasets.DatasetInfo(features=features))


def image_path(run: str | Path, name: str) -> Path:
    """Where an image is that a row's `images` name.

    Raises:
        ValueError: the name is no image's of an archive.
    """
    stem, _, suffix = name.partition(".")
    if not (stem.isalnum() and suffix.isalnum()):
        raise ValueError(f"images: got {name!r}, wanted a checksum and an ending")
    return Path(run) / ARCHIVE / IMAGES / name


def _path(column: str, schema: "pa.Schema") -> str:
    """A column's name in Parquet's schema."""
    name, _, field = column.partition(".")
    fields = schema.field("rollouts").type.value_type.names if name == "rollouts" else []
    if name not in schema.names or (field and field not in fields):
        raise ValueError(
            f"columns: got {column!r}, wanted one of {', '.join(schema.names)}, or rollouts.FIELD "
            "(docs/archive.md)"
        )
    return f"{name}.list.element.{field}" if field else name


def _files(run: Path, kind: str, steps: range | None) -> list[ArchiveFile]:
    if not (run / ARCHIVE).is_dir():
        raise ValueError(
            f"{run}: no folder {ARCHIVE}: it is no run's, or the run has logging.archive_gib=0"
        )
    found = [file for file in archive_files(run) if file.kind == kind]
    return found if steps is None else [file for file in found if file.step in steps]
