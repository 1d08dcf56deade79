"""The build: workers write a part for each chunk of rows, then the parts become one file.

A part is a function of its chunk alone, so a killed build goes on with the parts that are missing.
Duplicates depend on all rows before, and are told while the parts are joined.
"""

import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any, TextIO

from care_train.config.build import BuildSettings, SourceSettings
from care_train.data.building.adapters import ADAPTERS
from care_train.data.building.counts import SourceCounts, summary_of
from care_train.data.building.dedup import DuplicateIndex
from care_train.data.building.parts import (
    FORMAT_VERSION,
    Part,
    read_part,
    rejected_line,
    write_rows,
)
from care_train.data.building.prepare import Piece, Task, prepare
from care_train.data.columns import check_row
from care_train.data.files import file_checksums, open_rows, sha256_of
from care_train.data.rows import RowFile
from care_train.killable import ordered_map

_WORK, _BEGUN = ".unfinished", "begun.json"
_DATA, _QUARANTINE, _MANIFEST = "train.parquet", "quarantine.jsonl", "manifest.json"

_LIBRARIES = ("pyarrow", "datasets", "pillow", "imagehash", "numpy", "scipy")
"""Those whose versions the output may depend on."""

_FREE = ("output", "overwrite", "workers")
"""Settings that change nothing in the output."""

Report = Callable[[int, int | None], None]
"""Called with rows done, and all rows where that is known."""


def build(settings: BuildSettings, report: Report | None = None) -> dict[str, Any]:
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
    for source, files in zip(settings.sources, sources, strict=True):
        _check_schema(source, files)
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
    if manifest.is_file() and not settings.overwrite:
        finished = json.loads(manifest.read_text())
        before = {key: finished.get(key) for key in fingerprint}
        _check_same(output, "a build", before, fingerprint)
        return finished
    work.mkdir(parents=True, exist_ok=True)
    with _locked(work):
        _begin(settings, work, fingerprint)
        for name in (_MANIFEST, _DATA, _QUARANTINE):
            (output / name).unlink(missing_ok=True)
        parts = _write_parts(settings, sources, work, report)
        counts, checksums = _join(settings, parts, work)
        for name in checksums:
            os.replace(work / name, output / name)
        if not counts["total"]["kept"]:
            (output / _DATA).unlink()
            raise ValueError(f"output: no row is usable; {output / _QUARANTINE} says why")
        whole = {**fingerprint, "counts": counts, "sha256": checksums}
        # Last: a folder with a manifest is whole.
        (work / _MANIFEST).write_text(json.dumps(whole, indent=2) + "\n")
        os.replace(work / _MANIFEST, manifest)
        shutil.rmtree(work)
    return whole


def _open_source(source: SourceSettings) -> list[RowFile]:
    """The files of a source, in the order of their rows."""
    paths = [source.path] if isinstance(source.path, str) else source.path
    return [
        file
        for path in paths
        for file in open_rows(
            path,
            key=f"sources.{source.name}.path",
            split=source.split,
            download=("*",),
            revision=source.revision,
        )
    ]


def _check_schema(source: SourceSettings, files: list[RowFile]) -> None:
    """Hold each file's first row to the published schema: others that differ are quarantined."""
    for file in files:
        row = file.first_row()
        columns = ADAPTERS[source.adapter].columns
        where = f"source {source.name} ({source.adapter})"
        check_row(where, columns, row, file.name, nulls_pass=True)
        if unknown := [name for name in source.where if name not in row]:
            raise ValueError(
                f"sources.{source.name}.where: {file.name}: got column {unknown[0]!r}, wanted one "
                f"of {', '.join(row)}"
            )


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


def _begin(settings: BuildSettings, work: Path, fingerprint: Mapping[str, Any]) -> None:
    """Keep what an unfinished build of the same settings left; without one, begin anew."""
    note = work / _BEGUN
    if note.is_file() and not settings.overwrite:
        before = json.loads(note.read_text())
        _check_same(work.parent, "an unfinished build", before, fingerprint)
        return
    for part in (note, *work.glob("*.arrow")):
        part.unlink(missing_ok=True)
    note.write_text(json.dumps(fingerprint))


def _check_same(output: Path, what: str, before: Any, now: Any) -> None:
    if changes := _changes(before, now):
        changed = ", ".join(dict.fromkeys(change.split(".")[0] for change in changes))
        raise ValueError(
            f"output: {output} holds {what} of other {changed} ({'; '.join(changes)}): set it "
            "back, choose another folder, or build anew with overwrite=true"
        )


def _changes(saved: Mapping[str, Any], now: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Each value that differs, by its dotted key."""
    found = []
    for key in {**saved, **now}:
        before, after = saved.get(key), now.get(key)
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            found += _changes(before, after, f"{prefix}{key}.")
        elif before != after:
            found.append(f"{prefix}{key}: saved {before!r:.200}, got {after!r:.200}")
    return found


def _pieces(
    settings: BuildSettings, sources: Sequence[Sequence[RowFile]], work: Path
) -> Iterator[Piece]:
    number = 0
    for source, files in zip(settings.sources, sources, strict=True):
        for file in files:
            named = tuple(Path(root).expanduser() for root in source.image_dir)
            task = Task(
                source=source.name,
                adapter=source.adapter,
                file=file.name,
                roots=named or (file.base_dir, *sorted(file.base_dir.glob("*.zip"))),
                where=source.where,
                labels=file.labels,
                clean=settings.clean,
                dedup=settings.dedup,
            )
            for chunk in file.chunks():
                yield Piece(task, chunk, work / f"{number:08}.arrow")
                number += 1


def _write_parts(
    settings: BuildSettings,
    sources: Sequence[Sequence[RowFile]],
    work: Path,
    report: Report | None,
) -> list[Path]:
    """The parts of all chunks, those that are missing written now."""
    sizes = [file.num_rows for files in sources for file in files]
    total = None if None in sizes else sum(size or 0 for size in sizes)
    parts: list[Path] = []
    num_rows = 0

    def missing() -> Iterator[Piece]:
        nonlocal num_rows
        for piece in _pieces(settings, sources, work):
            parts.append(piece.part)
            if piece.part.is_file():
                num_rows += piece.chunk.num_rows
            else:
                yield piece

    workers = settings.workers or len(os.sched_getaffinity(0))
    for piece, _ in ordered_map(prepare, missing(), workers):
        num_rows += piece.chunk.num_rows
        if report is not None:
            report(num_rows, total)
    return parts


def _join(
    settings: BuildSettings, parts: Sequence[Path], work: Path
) -> tuple[dict[str, Any], dict[str, str]]:
    """Write data and quarantine; returns the counts, and both files' checksums."""
    counts = {source.name: SourceCounts() for source in settings.sources}
    index = DuplicateIndex(settings.dedup.max_distance) if settings.dedup.enabled else None
    with (work / _QUARANTINE).open("w", encoding="utf-8") as quarantine:
        opened = map(read_part, parts)
        kept = (_kept(part, counts[part.source], index, quarantine) for part in opened)
        write_rows(work / _DATA, kept)
    checksums = {name: sha256_of(work / name) for name in (_DATA, _QUARANTINE)}
    return summary_of(settings.sources, counts), checksums


def _kept(
    part: Part, counts: SourceCounts, index: DuplicateIndex | None, quarantine: TextIO
) -> Any:
    """The table of a part's rows that are kept; the others go to the quarantine."""
    import pyarrow

    rows = part.rows()
    counts.add("read", count=len(rows) + part.num_filtered)
    counts.add("filtered", count=part.num_filtered)
    keeps = []
    for row in rows:
        duplicate = index.find_or_add(row) if index and not row["reason"] else None
        keeps.append(not row["reason"] and duplicate is None)
        if keeps[-1]:
            counts.keep(row)
        elif duplicate is None:
            counts.add("rejected", row["reason"])
            quarantine.write(rejected_line(part, row, row["reason"], row["detail"]))
        else:
            counts.add("duplicates", f"{duplicate.reason} of {duplicate.first_source}")
            detail = f"{row['origin']}: repeats {duplicate.first_id}"
            quarantine.write(rejected_line(part, row, duplicate.reason, detail))
    return part.table.filter(pyarrow.array(keeps, pyarrow.bool_()))
