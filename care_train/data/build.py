"""`care-train data build`: workers write a part for each chunk of rows, then the parts are joined.

Duplicates depend on all rows before, and are told while the parts are joined.
"""

import fcntl
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from itertools import count, islice
from pathlib import Path
from typing import Any, TextIO

from care_train.config import dotted
from care_train.config.data import BuildSettings, SourceSettings
from care_train.data.built import FORMAT_VERSION, built_schema
from care_train.data.columns import check_row
from care_train.data.dedup import DuplicateIndex
from care_train.data.files import file_checksums, open_rows, sha256_of
from care_train.data.prepare import ADAPTERS, NUM_SHOWN, Piece, prepare
from care_train.data.rows import RowFile
from care_train.killable import ordered_map

CHUNK_ROWS = 128
"""Rows of a part: what a worker gets, and what is lost when it is killed."""

_ROW_GROUP = 32
"""Rows read together in training: more compress better, fewer are read faster."""

_WORK, _BEGUN = ".unfinished", "begun.json"
_DATA, _QUARANTINE, _MANIFEST = "train.parquet", "quarantine.jsonl", "manifest.json"

_LIBRARIES = ("pyarrow", "datasets", "pillow", "imagehash", "numpy", "scipy")
"""Those whose versions the output may depend on."""

_FREE = ("output", "overwrite", "workers")
"""Settings that change nothing in the output."""

Report = Callable[[int, int | None], None]
"""Called with rows done, and all rows where that is known."""


def build(settings: BuildSettings, report: Report = lambda done, total: None) -> dict[str, Any]:
    """Build a data set; a killed build goes on where it was, a finished one is left alone.

    Args:
        settings: sources, cleaning, duplicates, output.
        report: told how far it has come, for a progress bar.

    Returns:
        The manifest, which also lies beside the data.

    Raises:
        ValueError: a source is missing or not of its published schema (source, file, column, got,
            wanted); the output holds another build, or another process builds there; no row is
            usable.
    """
    sources = [_open_source(source) for source in settings.sources]
    output = Path(settings.output).expanduser()
    # Two builds that agree in this write the same bytes.
    fingerprint: dict[str, Any] = {
        "format": FORMAT_VERSION,
        "settings": {k: v for k, v in asdict(settings).items() if k not in _FREE},
        "inputs": {
            source.name: [checksum for file in files for checksum in file_checksums(file)]
            for source, files in zip(settings.sources, sources, strict=True)
        },
        "libraries": {name: version(name) for name in _LIBRARIES},
    }
    fingerprint = json.loads(json.dumps(fingerprint))
    manifest, work = output / _MANIFEST, output / _WORK
    begun = work / _BEGUN
    if manifest.is_file() and not settings.overwrite:
        return _same_build(manifest, "a build", output, fingerprint)
    work.mkdir(parents=True, exist_ok=True)
    with _locked(work):
        if begun.is_file() and not settings.overwrite:
            _same_build(begun, "an unfinished build", output, fingerprint)
        else:
            for path in (begun, *work.glob("*.arrow")):
                path.unlink(missing_ok=True)
            begun.write_text(json.dumps(fingerprint))
        for name in (_MANIFEST, _DATA, _QUARANTINE):
            (output / name).unlink(missing_ok=True)
        parts = _write_parts(settings, sources, work, report)
        counts, checksums = _join(settings, parts, work)
        for name in checksums:
            os.replace(work / name, output / name)
        if not (total := counts["total"])["kept"]:
            (output / _DATA).unlink()
            shutil.rmtree(work)
            if total["rejected"]:
                why = f"{output / _QUARANTINE} says why"
            else:
                why = "`where` leaves out all" if total["read"] else "the files hold none"
            raise ValueError(f"output: no row is usable: {why}")
        whole = {**fingerprint, "counts": counts, "sha256": checksums}
        # Last: a folder with a manifest is whole.
        (work / _MANIFEST).write_text(json.dumps(whole, indent=2) + "\n")
        os.replace(work / _MANIFEST, manifest)
        shutil.rmtree(work)
    return whole


def _open_source(source: SourceSettings) -> list[RowFile]:
    """The files of a source, in the order of their rows, each first row held to its schema."""
    key, columns = f"sources.{source.name}", ADAPTERS[source.adapter].columns
    files = []
    for path in [source.path] if isinstance(source.path, str) else source.path:
        files += open_rows(
            path,
            key=f"{key}.path",
            split=source.split,
            download=("*",),
            revision=source.revision,
        )
    for file in files:
        row = file.first_row()
        where = f"source {source.name} ({source.adapter})"
        # Other rows that differ are quarantined.
        check_row(where, columns, row, file.name, nulls_pass=True)
        if unknown := [name for name in source.where if name not in row]:
            raise ValueError(
                f"{key}.where: {file.name}: got column {unknown[0]!r}, wanted one of "
                f"{', '.join(row)}"
            )
    return files


@contextmanager
def _locked(work: Path) -> Iterator[None]:
    """One process at a time builds in a folder; the lock goes with the process."""
    with (work / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"output: {work.parent}: does another process build there? wait for it, or choose "
                "another folder"
            ) from None
        yield


def _same_build(note: Path, what: str, output: Path, now: Mapping[str, Any]) -> dict[str, Any]:
    """What an earlier build noted, if it had the same settings, inputs and libraries."""
    noted = json.loads(note.read_text())
    before, after = dotted({key: noted.get(key) for key in now}), dotted(now)
    changes = [key for key in {**before, **after} if before.get(key) != after.get(key)]
    if changes:
        changed = ", ".join(dict.fromkeys(key.split(".")[0] for key in changes))
        shown = "; ".join(
            f"{key}: saved {before.get(key)!r:.200}, got {after.get(key)!r:.200}" for key in changes
        )
        raise ValueError(
            f"output: {output} holds {what} of other {changed} ({shown}): set it back, choose "
            "another folder, or build anew with overwrite=true"
        )
    return noted


def _pieces(
    settings: BuildSettings, sources: Sequence[Sequence[RowFile]], work: Path
) -> Iterator[Piece]:
    numbers = count()
    for source, files in zip(settings.sources, sources, strict=True):
        named = tuple(Path(root).expanduser() for root in source.image_dir)
        for file in files:
            roots = named or (file.base_dir, *sorted(file.base_dir.glob("*.zip")))
            values = file.values()
            while rows := list(islice(values, CHUNK_ROWS)):
                part = work / f"{next(numbers):08}.arrow"
                yield Piece(settings, source, file.name, file.labels, roots, rows, part)


def _write_parts(
    settings: BuildSettings,
    sources: Sequence[Sequence[RowFile]],
    work: Path,
    report: Report,
) -> list[Path]:
    """The parts of all chunks, those that are missing written now."""
    sizes = [file.num_rows for files in sources for file in files]
    total = None if None in sizes else sum(size or 0 for size in sizes)
    workers = settings.workers or len(os.sched_getaffinity(0))
    parts: list[Path] = []
    num_rows = 0
    for piece, _ in ordered_map(prepare, _pieces(settings, sources, work), workers):
        parts.append(piece.part)
        num_rows += len(piece.rows)
        report(num_rows, total)
    return parts


@dataclass
class SourceCounts:
    """What became of one source's rows."""

    read: int = 0
    filtered: int = 0
    """Left out by `where`."""
    kept: int = 0
    images: int = 0
    """Of the rows kept."""
    rejected: Counter[str] = field(default_factory=Counter)
    """By reason, told before duplicates are looked for."""
    duplicates: Counter[str] = field(default_factory=Counter)
    """By reason and the source whose row is kept: `near_duplicate of chartqa`."""


def _summary(
    sources: Sequence[SourceSettings], counts: Mapping[str, SourceCounts]
) -> dict[str, Any]:
    """The manifest's counts: per source as in the paper's Table 4, then in total."""
    by_source: dict[str, dict[str, Any]] = {}
    total: Counter[str] = Counter()
    for source in sources:
        one = counts[source.name]
        reasons = {"rejected": one.rejected, "duplicates": one.duplicates}
        sums = {name: found.total() for name, found in reasons.items()}
        # Every row is either left out, rejected, a duplicate or kept. Table 4 counts those that
        # are left after cleaning, before duplicates go.
        usable = one.kept + sums["duplicates"]
        assert one.read == one.filtered + sums["rejected"] + usable, source.name
        numbers = {"read": one.read, "filtered": one.filtered, "usable": usable}
        numbers |= {"kept": one.kept, "images": one.images}
        total.update(numbers | sums)
        by_source[source.name] = {
            **numbers,
            **{name: dict(sorted(found.items())) for name, found in reasons.items()},
            "expected_rows": source.expected_rows,
        }
    for one in by_source.values():
        for name in ("usable", "kept"):
            # In percent, to one decimal, as Table 4 prints it.
            one[f"{name}_share"] = round(100 * one[name] / max(total[name], 1), 1)
    return {"sources": by_source, "total": dict(total)}


def _join(
    settings: BuildSettings, parts: Sequence[Path], work: Path
) -> tuple[dict[str, Any], dict[str, str]]:
    """Write data and quarantine; returns the counts, and both files' checksums."""
    counts = {source.name: SourceCounts() for source in settings.sources}
    index = DuplicateIndex(settings.dedup.max_distance) if settings.dedup.enabled else None
    with (work / _QUARANTINE).open("w", encoding="utf-8") as quarantine:
        write_rows(work / _DATA, (kept_rows(part, counts, index, quarantine) for part in parts))
    checksums = {name: sha256_of(work / name) for name in (_DATA, _QUARANTINE)}
    return _summary(settings.sources, counts), checksums


def kept_rows(
    path: Path, counts: Mapping[str, SourceCounts], index: DuplicateIndex | None, rejected: TextIO
) -> Any:
    """The table of a part's rows that are kept; the others are lines of the quarantine."""
    import pyarrow

    table = pyarrow.ipc.open_file(pyarrow.memory_map(str(path))).read_all()
    part = json.loads(table.schema.metadata[b"part"])
    rows, one = table.drop_columns(["images"]).to_pylist(), counts[part["source"]]
    one.read += len(rows) + part["num_filtered"]
    one.filtered += part["num_filtered"]
    keeps = []
    for row in rows:
        reason, detail = row["reason"], row["detail"]
        if reason:
            one.rejected[reason] += 1
        elif duplicate := index and index.find_or_add(row):
            reason, first_id, first_source = duplicate
            one.duplicates[f"{reason} of {first_source}"] += 1
            detail = f"{row['origin']}: repeats {first_id}"
        else:
            one.kept += 1
            one.images += len(row["looks"])
        keeps.append(not reason)
        if reason:
            line = {"source": part["source"], "file": part["file"], "row": row["number"]}
            line |= {"reason": reason, "detail": detail}
            line |= {name: row[name][:NUM_SHOWN] for name in ("prompt", "answer")}
            rejected.write(json.dumps(line, ensure_ascii=False) + "\n")
    return table.filter(pyarrow.array(keeps, pyarrow.bool_()))


def write_rows(path: Path, tables: Iterable[Any]) -> None:
    """Kept rows of parts as one Parquet file, with one part of them in memory."""
    from pyarrow import parquet

    schema = built_schema()
    # Images are compressed already.
    compression = {name: "zstd" for name in schema.names if name not in ("images", "options")}
    compression["images.list.element.bytes"] = "none"
    # The annotations of pyarrow's writer know less than it does.
    options: dict[str, Any] = {
        "compression": compression,
        "use_dictionary": ["source", "answer_type"],
        "write_statistics": False,
        "write_page_checksum": True,
    }
    with parquet.ParquetWriter(path, schema, **options) as writer:
        for table in tables:
            rows = table.select(schema.names).cast(schema)
            writer.write_table(rows, row_group_size=_ROW_GROUP)
