"""The build: streams in, workers prepare, duplicates go, parts out; at the end one file."""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from care_train.config.build import BuildSettings, SourceSettings
from care_train.data.building.adapters import ADAPTERS
from care_train.data.building.dedup import DuplicateIndex
from care_train.data.building.prepare import Prepared, PreparedChunk, Rejected, Task, prepare_chunk
from care_train.data.building.state import BuildState, changes_of, summary_of
from care_train.data.building.table import FORMAT_VERSION, join_parts, write_part
from care_train.data.columns import check_row
from care_train.data.easy_vqa import easy_vqa_rows
from care_train.data.files import file_checksums, open_rows, sha256_of
from care_train.data.rows import Chunk, ListedRows, RowFile
from care_train.killable import ordered_map

_WORK = ".unfinished"

_QUARANTINE = "quarantine.jsonl"

_LIBRARIES = ("pyarrow", "datasets", "pillow", "imagehash", "numpy", "scipy")
"""Those whose versions the output may depend on."""

_FREE = ("output", "overwrite", "workers")
"""Settings that change nothing in the output."""

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
    sources = [_open_source(source) for source in settings.sources]
    for source, files in zip(settings.sources, sources, strict=True):
        _check_schema(source, files)
    output = Path(settings.output).expanduser()
    # Two builds that agree in this write the same bytes.
    fingerprint = {
        "format": FORMAT_VERSION,
        "settings": {k: v for k, v in asdict(settings).items() if k not in _FREE},
        "inputs": {
            source.name: [checksum for file in files for checksum in file_checksums(file)]
            for source, files in zip(settings.sources, sources, strict=True)
        },
        "libraries": {name: version(name) for name in _LIBRARIES},
    }
    path = output / "manifest.json"
    if path.is_file() and not settings.overwrite:
        return _same_build(output, json.loads(path.read_text()), fingerprint)
    state = BuildState(output / _WORK, settings, fingerprint)
    try:
        for name in ("manifest.json", settings.file_name, _QUARANTINE):
            (output / name).unlink(missing_ok=True)
        _write_parts(settings, sources, state, output / _WORK, report)
        return _finish(settings, state, output, fingerprint)
    finally:
        state.close()


def _open_source(source: SourceSettings) -> list[RowFile]:
    """The files of a source, in the order of their rows."""
    if source.adapter == "easy_vqa":
        return [ListedRows(f"easy_vqa {source.split}", easy_vqa_rows(source.split))]
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


def _pieces(
    settings: BuildSettings, sources: list[list[RowFile]], start: tuple[int, int, int]
) -> Iterator[_Piece]:
    for source_number, (source, files) in enumerate(zip(settings.sources, sources, strict=True)):
        for file_number, file in enumerate(files):
            if (source_number, file_number) < start[:2]:
                continue
            first = start[2] if (source_number, file_number) == start[:2] else 0
            task = _task(settings, source, file)
            for chunk in file.chunks(first):
                yield _Piece(source_number, file_number, task, chunk)


def _task(settings: BuildSettings, source: SourceSettings, file: RowFile) -> Task:
    named = tuple(Path(root).expanduser() for root in source.image_dir)
    return Task(
        source=source.name,
        adapter=source.adapter,
        file=file.name,
        roots=named or (file.base_dir, *sorted(file.base_dir.glob("*.zip"))),
        where=source.where,
        labels=file.labels,
        clean=settings.clean,
        hash_size=settings.dedup.hash_size,
    )


def _work(piece: _Piece) -> PreparedChunk:
    return prepare_chunk(piece.task, piece.chunk)


def _write_parts(
    settings: BuildSettings,
    sources: list[list[RowFile]],
    state: BuildState,
    folder: Path,
    report: Report | None,
) -> None:
    known = [file.num_rows for files in sources for file in files]
    total = None if None in known else sum(count or 0 for count in known)
    index = DuplicateIndex(state.connection, settings.dedup)
    workers = settings.workers or len(os.sched_getaffinity(0))
    for piece, result in ordered_map(_work, _pieces(settings, sources, state.position), workers):
        counts = state.counts[piece.task.source]
        counts.add("read", count=len(result.rows) + result.num_filtered)
        counts.add("filtered", count=result.num_filtered)
        kept: list[Prepared] = []
        rejected: list[dict[str, Any]] = []
        for row in result.rows:
            if isinstance(row, Rejected):
                counts.add("rejected", row.reason)
                rejected.append(_quarantined(piece, row, row.reason, row.detail))
            elif (duplicate := index.find(row)) is not None:
                counts.add("duplicates", f"{duplicate.reason} of {duplicate.first_source}")
                detail = f"{row.sample.location}: repeats {duplicate.first_id}"
                rejected.append(_quarantined(piece, row, duplicate.reason, detail))
            else:
                index.add(row)
                counts.keep(row)
                kept.append(row)
        _write_part_files(folder, state.next_part, kept, rejected)
        state.commit((piece.source, piece.file, piece.chunk.first - 1 + piece.chunk.num_rows))
        if report is not None:
            report(sum(one.of("read") for one in state.counts.values()), total)


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
    # A rejected row may hold what no encoding takes.
    (folder / f"{number:08}.jsonl").write_text(lines, encoding="utf-8", errors="replace")
    write_part(folder / f"{number:08}.arrow", [row.sample for row in kept])


def _finish(
    settings: BuildSettings, state: BuildState, output: Path, fingerprint: dict[str, Any]
) -> dict[str, Any]:
    counts = summary_of(settings.sources, state.counts)
    work = output / _WORK
    numbers = range(state.next_part)
    with (work / _QUARANTINE).open("wb") as joined:
        for number in numbers:
            joined.write((work / f"{number:08}.jsonl").read_bytes())
    if not counts["total"]["kept"]:
        os.replace(work / _QUARANTINE, output / _QUARANTINE)
        raise ValueError(f"output: no row is usable; {output / _QUARANTINE} says why")
    data = work / settings.file_name
    join_parts([work / f"{number:08}.arrow" for number in numbers], data, settings.row_group)
    checksums = {path.name: sha256_of(path) for path in (data, work / _QUARANTINE)}
    manifest = {**fingerprint, "counts": counts, "sha256": checksums}
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
    if changes := changes_of({key: finished.get(key) for key in now}, now):
        changed = ", ".join(dict.fromkeys(change.split(".")[0] for change in changes))
        raise ValueError(
            f"output: {output} holds a build of other {changed} ({'; '.join(changes)}): choose "
            "another folder, or build anew with overwrite=true"
        )
    return finished
