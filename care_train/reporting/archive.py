"""A run's archive: every group of every step and every evaluated answer, as files of Parquet.

    archive/step-000012-rank-00.parquet          the groups of step 12 (counted from 1) of one rank
    archive/eval-000050-sampled-rank-00.parquet  the answers of the evaluation after step 50
    archive/images/<sha256>.png                  each image once, by its content

A file is written under a temporary name, synced and renamed: it is there whole or not at all.
"""

import hashlib
import io
import logging
import os
import re
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import chain, groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Self

from PIL import Image

from care_train.data.images import IMAGE_FORMATS, ImageRef, encoded_image
from care_train.reporting.archive_schema import (
    Row,
    evaluation_schema,
    group_schema,
    make_table,
    read_table,
)
from care_train.reporting.files import PARTIAL, put_in_place, sync, write_partial

if TYPE_CHECKING:
    import datasets
    import pyarrow as pa

ARCHIVE = "archive"
IMAGES = "images"
_NAME = re.compile(r"(step|eval)-(\d{6,})(?:-(sampled|greedy))?-rank-(\d{2,})\.parquet")
_KEPT_SHARE = 0.9
"""Over its limit an archive is cut down to this share of it, so that files are rarely dropped."""
_IMAGE_REST_SECONDS = 600.0
"""How long an image stays after it was last named: another rank's file may be about to name it."""

logger = logging.getLogger(__name__)


class ArchiveFile(NamedTuple):
    """One file of an archive; sorts by step."""

    step: int
    kind: str
    """step | eval."""
    decoding: str
    """sampled | greedy; empty for a step."""
    rank: int
    path: Path


def archive_files(run_dir: Path, kind: str = "") -> list[ArchiveFile]:
    """The whole files of a run's archive in order, all or of a kind; none without an archive."""
    folder = run_dir / ARCHIVE
    names = os.listdir(folder) if folder.is_dir() else []
    return sorted(
        ArchiveFile(int(match[2]), match[1], match[3] or "", int(match[4]), folder / name)
        for name in names
        if (match := _NAME.fullmatch(name)) and kind in ("", match[1])
    )


def archive_steps(run_dir: Path, kind: str) -> list[list[ArchiveFile]]:
    """The files of a run's steps or evaluations, a list each, in order."""
    return [list(own) for _, own in groupby(archive_files(run_dir, kind), lambda file: file.step)]


def check_archive(run: str | Path) -> None:
    """Raise a `ValueError` where a run has no archive."""
    if not (Path(run) / ARCHIVE).is_dir():
        raise ValueError(
            f"{run}: no folder {ARCHIVE}: it is no run's, or the run has logging.archive_gib=0"
        )


def cut_archive(run_dir: Path, step: int) -> None:
    """Drop what was written after `step`, -1 for all, and files that a kill left half written."""
    folder = run_dir / ARCHIVE
    for partial in folder.rglob(f"*{PARTIAL}"):
        partial.unlink()
    for file in archive_files(run_dir):
        if file.step > step:
            file.path.unlink()
    if folder.is_dir():
        sync(folder)


class ArchiveWriter:
    """Writes this rank's files in the background, one at a time; use it as a context manager.

    An error of a write is raised by the next call: `OSError` where there is no room.
    """

    def __init__(self, run_dir: Path, rank: int, ranks: int, max_gib: float | None) -> None:
        """Nothing is written yet.

        The first of the `ranks` keeps the archive below `max_gib`, which is `logging.archive_gib`.
        """
        self._run_dir, self.rank, self._ranks = run_dir, rank, ranks
        self._folder = run_dir / ARCHIVE
        self._limit = None if max_gib is None else int(max_gib * 2**30)
        self._room = 0
        """Bytes until the archive's size must be looked up again."""
        self._has_warned = False
        self._thread = ThreadPoolExecutor(1, "archive")
        self._pending: Future[None] | None = None

    def write_step(
        self, step: int, rows: Sequence[Row], images: Sequence[Sequence[ImageRef]]
    ) -> None:
        """Begin to write a step's groups, once the file before is written.

        Steps count from 1; rows are by `group_schema`, each row's `images` beside them.
        """
        self._begin(f"step-{step:06d}", rows, images, group_schema())

    def write_evaluation(
        self, step: int, decoding: str, rows: Sequence[Row], images: Sequence[Sequence[ImageRef]]
    ) -> None:
        """The same of an evaluation's answers after `step` steps, by `evaluation_schema`.

        `decoding` is sampled | greedy.
        """
        self._begin(f"eval-{step:06d}-{decoding}", rows, images, evaluation_schema())

    def flush(self) -> None:
        """Wait until all that was handed over is on the disk.

        Raises:
            OSError: it could not be written.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        self._thread.shutdown()
        if kind is None:
            self.flush()

    def _begin(self, name: str, *content: Any) -> None:
        self.flush()
        path = self._folder / f"{name}-rank-{self.rank:02d}.parquet"
        self._pending = self._thread.submit(self._write, path, *content)

    def _write(
        self,
        path: Path,
        rows: Sequence[Row],
        images: Sequence[Sequence[ImageRef]],
        schema: "pa.Schema",
    ) -> None:
        import pyarrow as pa
        import pyarrow.parquet as parquet

        (self._folder / IMAGES).mkdir(parents=True, exist_ok=True)
        new: dict[Path, Path] = {}
        named = [
            {**row, "images": [self._keep(ref, new) for ref in refs]}
            for row, refs in zip(rows, images, strict=True)
        ]
        put_in_place(new)
        buffer = pa.BufferOutputStream()
        parquet.write_table(make_table(named, schema), buffer, compression="zstd")
        put_in_place({path: self._partial(path, memoryview(buffer.getvalue()))})
        if self._limit is not None and self.rank == 0 and self._room < 0:
            self._room = self._shrink(self._limit)

    def _keep(self, ref: ImageRef, new: dict[Path, Path]) -> str:
        """The name of an image's file; where it is new its partial file is written, into `new`."""
        content = encoded_image(ref, str(self._folder))
        with Image.open(io.BytesIO(content), formats=IMAGE_FORMATS) as image:
            suffix = (image.format or "bin").lower()
        name = f"{hashlib.sha256(content).hexdigest()}.{suffix}"
        path = self._folder / IMAGES / name
        try:
            os.utime(path)
        except FileNotFoundError:
            if path not in new:
                new[path] = self._partial(path, memoryview(content))
        return name

    def _partial(self, path: Path, content: memoryview) -> Path:
        self._room -= len(content) * self._ranks
        # By rank: several may come to write the same image.
        return write_partial(path, content, writer=f".{self.rank}")

    def _shrink(self, limit: int) -> int:
        """Drop the oldest files where the archive is over its limit; how much room is left."""
        files = archive_files(self._run_dir)
        sizes = [file.path.stat().st_size for file in files]
        images = list(os.scandir(self._folder / IMAGES))
        total = sum(sizes) + sum(image.stat().st_size for image in images)
        if total <= limit:
            return limit - total
        last = files[-1].step
        dropped = []
        for file, size in zip(files, sizes, strict=True):
            if total <= _KEPT_SHARE * limit or file.step == last:
                break
            file.path.unlink()
            dropped.append(file.step)
            total -= size
        kept = read_files(files[len(dropped) :], columns=["images"])["images"].to_pylist()
        named = set(chain(*kept))
        for image in images:
            is_old = time.time() - image.stat().st_mtime > _IMAGE_REST_SECONDS
            if is_old and image.name not in named:
                os.unlink(image.path)
                total -= image.stat().st_size
        if dropped and not self._has_warned:
            self._has_warned = True
            logger.warning(
                "warning: %s: over logging.archive_gib = %g: from now on the oldest steps are "
                "dropped, so far those up to %d",
                *(self._folder, limit / 2**30, dropped[-1]),
            )
        return max(limit - total, 0)


def read_archive(
    run: str | Path,
    *,
    evaluations: bool = False,
    columns: Sequence[str] | None = None,
    steps: range | None = None,
) -> "pa.Table":
    """The groups of all steps and ranks, or the evaluations' answers, in order.

    A column that a file does not have, as an earlier version wrote it, is null in its rows.

    Args:
        run: the run's folder.
        evaluations: the answers of its evaluations in place of the groups.
        columns: those to read; `rollouts.text` names a field of the rollouts. None: all.
        steps: those to read; None: all.

    Raises:
        ValueError: the run has no archive, a file of it is damaged, or there is no such column.
    """
    check_archive(run)
    files = archive_files(Path(run), "eval" if evaluations else "step")
    chosen = [file for file in files if steps is None or file.step in steps]
    return read_files(chosen, evaluations=evaluations, columns=columns)


def read_files(
    files: Sequence[ArchiveFile],
    *,
    evaluations: bool = False,
    columns: Sequence[str] | None = None,
) -> "pa.Table":
    """`read_archive` of some of its files."""
    import pyarrow as pa

    schema = evaluation_schema() if evaluations else group_schema()
    paths = None
    if columns is not None:
        paths, schema = _selected(columns, schema)
    tables = [read_table(file.path, schema, paths) for file in files]
    return pa.concat_tables([schema.empty_table(), *tables])


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


def _selected(columns: Sequence[str], schema: "pa.Schema") -> tuple[list[str], "pa.Schema"]:
    """The names of columns in Parquet's schema, and the schema of a table that has them alone."""
    import pyarrow as pa

    nested = schema.field("rollouts").type.value_type if "rollouts" in schema.names else ()
    parts = {f"rollouts.{field.name}": field for field in nested}
    if unknown := [name for name in columns if name not in schema.names and name not in parts]:
        raise ValueError(
            f"columns: got {unknown[0]!r}, wanted one of {', '.join(schema.names)}, or "
            "rollouts.FIELD (docs/archive.md)"
        )
    chosen = [parts[column] for column in columns if column in parts]
    names = dict.fromkeys(column.partition(".")[0] for column in columns)
    fields = {name: schema.field(name) for name in names}
    if chosen and "rollouts" not in columns:
        fields["rollouts"] = pa.field("rollouts", pa.list_(pa.struct(chosen)))
    paths = [column for column in columns if column not in parts]
    for field in chosen:
        # Every file has `finished`, which says how many rollouts a group has.
        paths += [f"rollouts.list.element.{name}" for name in (field.name, "finished")]
    return paths, pa.schema(list(fields.values()))
