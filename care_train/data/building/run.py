"""The build: streams in, workers prepare, duplicates go, parts out; at the end one file."""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from care_train.config import BuildSettings, SourceSettings
from care_train.data.building.adapters import ADAPTERS
from care_train.data.building.counts import summary_of
from care_train.data.building.dedup import DuplicateIndex
from care_train.data.building.files import InputFile, file_checksums, open_source, sha256_of
from care_train.data.building.kinds import check_columns
from care_train.data.building.manifest import QUARANTINE, fingerprint_of, manifest_of, read_manifest
from care_train.data.building.prepare import Prepared, PreparedChunk, Rejected, Task, prepare_chunk
from care_train.data.building.readers import Chunk
from care_train.data.building.state import BuildState
from care_train.data.building.table import join_parts, write_part
from care_train.killable import ordered_map

_WORK = ".unfinished"

Report = Callable[[int, int | None], None]
"""Called with rows done, and all rows where that is known."""


@dataclass(frozen=True)
class _Piece:
    """A chunk and where it comes from."""

    source: int
    file: int
    task: Task
    chunk: Chunk


def build(settings: BuildSettings, report: Report | None = None) -> dict[str, Any]:
    """Build a data set; a killed build goes on where it was, a finished one is left alone.

    Args:
        settings: sources, cleaning, duplicates, output.
        report: told how far it has come, for a progress bar.

    Returns:
        The manifest, which also lies beside the data.

    Raises:
        ValueError: a source is missing or not of its published schema (source, file, column, got,
            wanted); the output holds another build; no row is usable.
    """
    sources = [open_source(source) for source in settings.sources]
    for source, files in zip(settings.sources, sources, strict=True):
        _check_schema(source, files)
    output = Path(settings.output).expanduser()
    fingerprint = fingerprint_of(settings, [list(file_checksums(files)) for files in sources])
    finished = read_manifest(output)
    if finished is not None and not settings.overwrite:
        return _same_build(output, finished, fingerprint)
    state = BuildState(output / _WORK, settings, fingerprint)
    try:
        for name in ("manifest.json", settings.file_name, QUARANTINE):
            (output / name).unlink(missing_ok=True)
        _write_parts(settings, sources, state, output / _WORK, report)
        return _finish(settings, state, output, fingerprint)
    finally:
        state.close()


def _check_schema(source: SourceSettings, files: list[InputFile]) -> None:
    columns = ADAPTERS[source.adapter].columns
    for file in files:
        where = f"source {source.name} ({source.adapter}): {file.name}"
        found = file.stream.kinds()
        check_columns(where, columns, found)
        if unknown := [name for name in source.where if name not in found]:
            have = ", ".join(found)
            raise ValueError(
                f"sources.{source.name}.where: {file.name}: got column {unknown[0]!r}, wanted one "
                f"of {have}"
            )


def _pieces(
    settings: BuildSettings, sources: list[list[InputFile]], start: tuple[int, int, int]
) -> Iterator[_Piece]:
    for source_number, (source, files) in enumerate(zip(settings.sources, sources, strict=True)):
        for file_number, file in enumerate(files):
            if (source_number, file_number) < start[:2]:
                continue
            first = start[2] if (source_number, file_number) == start[:2] else 0
            task = _task(settings, source, file)
            for chunk in file.stream.chunks(first):
                yield _Piece(source_number, file_number, task, chunk)


def _task(settings: BuildSettings, source: SourceSettings, file: InputFile) -> Task:
    path = file.stream.path
    own = path if path.is_dir() else path.parent
    named = tuple(Path(root).expanduser() for root in source.image_dir)
    roots = named or (own, *sorted(own.glob("*.zip")))
    return Task(
        source=source.name,
        adapter=source.adapter,
        file=file.name,
        roots=roots,
        where=source.where,
        labels=file.stream.labels,
        clean=settings.clean,
        hash_size=settings.dedup.hash_size,
    )


def _work(piece: _Piece) -> PreparedChunk:
    return prepare_chunk(piece.task, piece.chunk)


def _write_parts(
    settings: BuildSettings,
    sources: list[list[InputFile]],
    state: BuildState,
    folder: Path,
    report: Report | None,
) -> None:
    known = [file.stream.num_rows for files in sources for file in files]
    total = None if None in known else sum(count or 0 for count in known)
    index = DuplicateIndex(state.connection, settings.dedup)
    workers = settings.workers or len(os.sched_getaffinity(0))
    for piece, result in ordered_map(_work, _pieces(settings, sources, state.position), workers):
        counts = state.counts[settings.sources[piece.source].name]
        counts.read += len(result.rows) + result.num_filtered
        counts.filtered += result.num_filtered
        kept: list[Prepared] = []
        rejected: list[dict[str, Any]] = []
        for row in result.rows:
            if isinstance(row, Rejected):
                counts.reject(row)
                rejected.append(_quarantined(piece, row, row.reason, row.detail))
            elif (duplicate := index.find(row)) is not None:
                counts.repeat(duplicate)
                detail = f"{row.sample.location}: repeats {duplicate.first_id}"
                rejected.append(_quarantined(piece, row, duplicate.reason, detail))
            else:
                index.add(row)
                counts.keep(row)
                kept.append(row)
        _write_part_files(folder, state.next_part, kept, rejected)
        state.commit((piece.source, piece.file, piece.chunk.first - 1 + piece.chunk.num_rows))
        if report is not None:
            report(sum(one.read for one in state.counts.values()), total)


def _quarantined(
    piece: _Piece, row: Prepared | Rejected, reason: str, detail: str
) -> dict[str, Any]:
    said = row if isinstance(row, Rejected) else row.sample
    return {
        "source": piece.task.source,
        "file": piece.task.file,
        "row": row.number,
        "reason": reason,
        "detail": detail,
        "prompt": said.prompt[:200],
        "answer": said.answer[:200],
    }


def _write_part_files(
    folder: Path, number: int, kept: list[Prepared], rejected: list[dict[str, Any]]
) -> None:
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rejected)
    (folder / f"{number:08}.jsonl").write_text(lines, encoding="utf-8")
    write_part(folder / f"{number:08}.arrow", kept)


def _finish(
    settings: BuildSettings, state: BuildState, output: Path, fingerprint: dict[str, Any]
) -> dict[str, Any]:
    counts = summary_of(settings.sources, state.counts)
    work = output / _WORK
    numbers = range(state.next_part)
    with (work / QUARANTINE).open("wb") as joined:
        for number in numbers:
            joined.write((work / f"{number:08}.jsonl").read_bytes())
    if not counts["total"]["kept"]:
        os.replace(work / QUARANTINE, output / QUARANTINE)
        raise ValueError(f"output: no row is usable; {output / QUARANTINE} says why")
    data = work / settings.file_name
    join_parts([work / f"{number:08}.arrow" for number in numbers], data, settings.row_group)
    checksums = {path.name: sha256_of(path) for path in (data, work / QUARANTINE)}
    manifest = manifest_of(fingerprint, counts, checksums)
    for name in checksums:
        os.replace(work / name, output / name)
    # Last: a folder with a manifest is whole.
    (work / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")
    os.replace(work / "manifest.json", output / "manifest.json")
    state.close()
    shutil.rmtree(work)
    return manifest


def _same_build(
    output: Path, finished: dict[str, Any], fingerprint: dict[str, Any]
) -> dict[str, Any]:
    now = json.loads(json.dumps(fingerprint))
    changed = [key for key in now if finished.get(key) != now[key]]
    if changed:
        raise ValueError(
            f"output: {output} holds a build of other {', '.join(changed)}: choose another folder, "
            "or build anew with overwrite=true"
        )
    return finished
