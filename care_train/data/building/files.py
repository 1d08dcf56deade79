"""Which files a source is: a path's own, a folder's of one split, or a download's."""

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from care_train.config import SourceSettings
from care_train.data.building.readers import (
    ArrowFolderStream,
    JsonLinesStream,
    JsonStream,
    ParquetStream,
    RowListStream,
    RowStream,
)
from care_train.data.easy_vqa import easy_vqa_samples

_READERS = {".parquet": ParquetStream, ".jsonl": JsonLinesStream, ".json": JsonStream}

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")

# What a repository has beside its rows.
_NO_ROWS = {"dataset_infos.json", "dataset_info.json", "state.json", "dataset_dict.json"}


@dataclass(frozen=True)
class InputFile:
    """One file of a source."""

    name: str
    """As errors, ids and the manifest name it."""
    stream: RowStream


def open_source(source: SourceSettings) -> list[InputFile]:
    """The files of a source, in the order of their rows.

    Raises:
        ValueError: none there, an unknown kind, or a download that failed, naming the source's key.
    """
    if source.adapter == "easy_vqa":
        name = f"easy_vqa {source.split}"
        return [InputFile(name, RowListStream(Path(name), _easy_vqa_rows(source.split)))]
    paths = [source.path] if isinstance(source.path, str) else source.path
    files = []
    for path in paths:
        files += _open_path(source, path)
    return files


def file_checksums(files: list[InputFile]) -> Iterator[dict[str, Any]]:
    """Name, size and SHA-256 of each input; of a data set's folder, those of its Arrow files.

    Rows that come with a package are known by their number.
    """
    for file in files:
        path = file.stream.path
        if not path.exists():
            yield {"name": file.name, "rows": file.stream.num_rows}
            continue
        parts = sorted(path.glob("*.arrow")) if path.is_dir() else [path]
        for part in parts:
            name = file.name if part == path else f"{file.name}/{part.name}"
            yield {"name": name, "bytes": part.stat().st_size, "sha256": sha256_of(part)}


def sha256_of(path: Path) -> str:
    """A file's checksum."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _open_path(source: SourceSettings, text: str) -> list[InputFile]:
    key, path = f"sources.{source.name}.path", Path(text).expanduser()
    if not path.exists():
        if not _HUB_ID.fullmatch(text):
            raise ValueError(f"{key}: {text} does not exist, and is no Hugging Face id")
        path = _download(source, text, key)
    if path.is_dir():
        return _open_folder(source, path, key)
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise ValueError(f"{key}: {path} ends with {path.suffix!r}, wanted {', '.join(_READERS)}")
    return [InputFile(path.name, reader(path))]


def _download(source: SourceSettings, hub_id: str, key: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        folder = snapshot_download(hub_id, repo_type="dataset", revision=source.revision)
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        first = str(error).strip().splitlines()[0]
        raise ValueError(
            f"{key}: {hub_id} could not be downloaded ({first}): download it elsewhere with "
            f"`hf download --repo-type dataset {hub_id}` and give its folder"
        ) from None
    return Path(folder)


def _open_folder(source: SourceSettings, folder: Path, key: str) -> list[InputFile]:
    if (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file():
        return [_open_saved(source, folder, key)]
    found = sorted(
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in _READERS
        and path.name not in _NO_ROWS
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )
    named = [path for path in found if _names_split(path.relative_to(folder), source.split)]
    others = [path for path in found if not _names_any_split(path.relative_to(folder))]
    chosen = named or others
    if not chosen:
        names = ", ".join(str(path.relative_to(folder)) for path in found[:5]) or "none"
        raise ValueError(
            f"{key}: {folder} has no files of split {source.split!r}, wanted "
            f"{', '.join(_READERS)}; it has {names}"
        )
    return [
        InputFile(str(path.relative_to(folder)), _READERS[path.suffix.lower()](path))
        for path in chosen
    ]


def _open_saved(source: SourceSettings, folder: Path, key: str) -> InputFile:
    import datasets

    loaded = datasets.load_from_disk(str(folder))
    if isinstance(loaded, datasets.DatasetDict):
        if source.split not in loaded:
            raise ValueError(
                f"{key[: -len('path')]}split: got {source.split!r}, {folder} has "
                f"{', '.join(map(str, loaded))}"
            )
        return InputFile(
            f"{folder.name}/{source.split}",
            ArrowFolderStream(folder / source.split, loaded[source.split]),
        )
    return InputFile(folder.name, ArrowFolderStream(folder, loaded))


def _names_split(path: Path, split: str) -> bool:
    """Hub repositories name the split in a file's or a folder's name: `data/train-00000-of-3`."""
    pattern = re.compile(rf"(?:^|[-_.]){re.escape(split)}(?:$|[-_.])", re.IGNORECASE)
    return any(pattern.search(part) for part in (*path.parts[:-1], path.stem))


def _names_any_split(path: Path) -> bool:
    return any(_names_split(path, split) for split in ("train", "test", "val", "validation", "dev"))


def _easy_vqa_rows(split: str) -> list[dict[str, Any]]:
    return [
        {
            "prompt": sample.prompt,
            "answer": sample.answer,
            "images": [str(image) for image in sample.images],
            "rationale": sample.rationale,
            "failed_rationale": sample.failed_rationale,
        }
        for sample in easy_vqa_samples(split)
    ]
