"""Which files of rows a path means: its own, a folder's of one split, or a download's.

The datasets library takes seconds to load, so it is imported where it is needed.
"""

import hashlib
import logging
import re
import stat
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, Union

from care_train.config import FROM_PYTHON, Source, hub_data
from care_train.data.arrow_rows import ArrowRows, ParquetRows
from care_train.data.rows import READ_BYTES, JsonLines, JsonList, ListedRows, RowFile, parsed
from care_train.hub import snapshot

if TYPE_CHECKING:
    import datasets

logger = logging.getLogger(__name__)

# A class in quotes takes no `|`.
Rows: TypeAlias = Union["datasets.Dataset", Sequence[Mapping[str, Any]]]
"""Rows that a program hands over: of the datasets library, or a list of mappings."""

TRAINING, HELD_OUT = ("train",), ("test", "validation", "val", "dev")
"""The splits that are read where none is named, the first one that is there: training rows are
never read for an evaluation unasked."""

_SUFFIXES = (".parquet", ".jsonl", ".ndjson", ".json")
_WANTED = "a Parquet, JSON lines or JSON file, a folder of them, or one of Dataset.save_to_disk"

# What a repository, a saved data set or a finished build has beside its rows.
_NO_ROWS = {"dataset_infos.json", "dataset_info.json", "state.json", "dataset_dict.json"}
_OF_A_BUILD = {"manifest.json", "quarantine.jsonl"}

_SPLITS = (*TRAINING, *HELD_OUT)


def open_rows(
    source: str,
    *,
    key: str,
    split: str | None = None,
    default_splits: Sequence[str] = TRAINING,
    subsets: Sequence[str] = (),
    download: Sequence[str] = (),
    revision: str | None = None,
) -> list[RowFile]:
    """The files of a data set, in the order of their rows.

    Args:
        source: a file; a folder of files, such as a downloaded repository; a folder written by
            Dataset.save_to_disk; or the id of a data set on the Hugging Face Hub.
        key: the setting that names it, such as `data.path`, for errors.
        split: which split, where there are several.
        default_splits: those looked for, in this order, without `split`.
        subsets: folders to read, where the source has them: a published data set's configurations.
        download: patterns of the files that are downloaded of an id; none: ids are not accepted.
        revision: of an id; None: the newest.

    Raises:
        ValueError: nothing there, an unknown kind, no such split, or a download that failed.
    """
    path = Path(source).expanduser()
    # An empty text would be the working folder: `data.path=$UNSET`.
    if not source or not path.exists():
        if not (download and hub_data(source) == (source, None)):
            also = ", or the id of a data set on the Hub" if download else ""
            raise ValueError(
                f"{key}: {source or 'empty text'} does not exist: wanted {_WANTED}{also}"
            )
        path = snapshot(source, "dataset", revision, key, download)
    if not path.is_dir():
        return [_open_file(path, path.name, key)]
    splits = default_splits if split is None else (split,)
    if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
        return [_open_saved(path, splits, key)]
    roots = [path / subset for subset in subsets if (path / subset).is_dir()] or [path]
    files = _distinct([file for root in roots for file in _row_files(root)])
    chosen = _of_split(path, files, splits, must=split is not None, key=key)
    return [_open_file(file, str(file.relative_to(path)), key) for file in chosen]


def _open_file(path: Path, name: str, key: str) -> RowFile:
    """A Parquet file, JSON lines or one JSON list, told by its bytes, whatever its name says."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise ValueError(f"{path}: got a device or pipe, wanted a file")
        return _file_class(path)(path, name)
    except (ValueError, OSError) as error:
        raise ValueError(f"{key}: {error}") from None


def _file_class(path: Path) -> type[RowFile]:
    with path.open("rb") as file:
        start = file.read(READ_BYTES)
    text, suffix = start.removeprefix(b"\xef\xbb\xbf").lstrip(), path.suffix.lower()
    if start.startswith(b"PAR1") or suffix == ".parquet":
        return ParquetRows
    if text.startswith(b"["):
        return JsonList
    if text.startswith(b"{") and suffix == ".json" and not _are_lines(text):
        raise ValueError(
            f"{path}: got an object at the top, wanted a list of rows: save the list alone"
        )
    if text.startswith(b"{") or suffix in (".jsonl", ".ndjson"):
        return JsonLines
    raise ValueError(
        f"{path}: begins with {start[:12]!r}, wanted a Parquet file, JSON lines or one JSON list"
    )


def _are_lines(text: bytes) -> bool:
    """Whether a file's beginning is that of JSON lines, and not of one object over several."""
    first, _, rest = text.partition(b"\n")
    return rest.lstrip().startswith(b"{") and isinstance(parsed(first), Mapping)


def given_rows(path: str, given: Mapping[str, Rows], key: str) -> RowFile:
    """The rows that a program hands over for `path`; images' paths start from the working folder.

    Raises:
        ValueError: none of this name, or nothing that can be indexed as rows; `key` names them.
    """
    if path not in given:
        raise ValueError(
            f"{key}: {path} stands for rows that a program handed over (CareTrainer): run it from "
            "there, or set the path of a file"
        )
    rows, name = given[path], path.removeprefix(FROM_PYTHON)
    if isinstance(rows, Sequence) and not isinstance(rows, str):
        return ListedRows(name, rows)
    import datasets

    if isinstance(rows, datasets.Dataset):
        return ArrowRows(Path.cwd(), rows, name)
    hint = f": choose one of {', '.join(map(str, rows))}" if isinstance(rows, Mapping) else ""
    raise ValueError(
        f"{name}: got a {type(rows).__name__}, wanted a datasets.Dataset or a list of "
        f"mappings{hint}"
    )


def file_checksums(file: RowFile) -> list[dict[str, object]]:
    """Name, size and SHA-256 of an input; of a data set's folder, those of its Arrow files."""
    path = file.path
    parts = sorted(path.glob("*.arrow")) if path.is_dir() else [path]
    return [
        {
            "name": file.name if part == path else f"{file.name}/{part.name}",
            "bytes": part.stat().st_size,
            "sha256": sha256_of(part),
        }
        for part in parts
    ]


def sha256_of(path: Path) -> str:
    """A file's checksum."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def open_hub_rows(source: Source, default_splits: Sequence[str], key: str) -> RowFile | None:
    """The rows of a data set of the Hub, as the datasets library reads it; None: it is no id.

    Args:
        source: `ORG/NAME[:CONFIG]`, with its split and revision.
        default_splits: those looked for, in this order, where no split is named.
        key: the setting, for errors.

    Raises:
        ValueError: no such data set, configuration or split, or it cannot be read.
    """
    path, split, revision = source
    if (found := hub_data(path)) is None:
        return None
    repo, name = found
    folder = snapshot(repo, "dataset", revision, key, ("*",))
    import datasets
    from datasets.exceptions import DatasetsError

    try:
        loaded = datasets.load_dataset(str(folder), name=name)
    except (ValueError, OSError, DatasetsError) as error:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise ValueError(f"{key}: {path}: the datasets library cannot read it: {reason}") from None
    assert isinstance(loaded, datasets.DatasetDict)
    chosen = _split_of(loaded, default_splits if split is None else (split,), f"{key}: {path}")
    return ArrowRows(folder, loaded[chosen], f"{repo}@{chosen}")


def _open_saved(folder: Path, splits: Sequence[str], key: str) -> RowFile:
    import datasets

    try:
        loaded = datasets.load_from_disk(str(folder))
    except (OSError, ValueError) as error:
        raise ValueError(f"{key}: {folder} is no whole saved data set ({error})") from None
    if not isinstance(loaded, datasets.DatasetDict):
        return ArrowRows(folder, loaded)
    chosen = _split_of(loaded, splits, f"{key}: {folder}")
    return ArrowRows(folder / chosen, loaded[chosen], f"{folder.name}/{chosen}")


def _split_of(loaded: Mapping[Any, Any], splits: Sequence[str], where: str) -> str:
    """The first of the splits that there is."""
    for split in splits:
        if split in loaded:
            return split
    raise ValueError(
        f"{where}: got no split {' or '.join(map(repr, splits))}, wanted one of "
        f"{', '.join(map(str, loaded))}: append @SPLIT"
    )


def _row_files(folder: Path) -> list[Path]:
    """All files of rows below a folder, by name."""
    return [
        path
        for path in sorted(folder.rglob("*"))
        if path.suffix.lower() in _SUFFIXES
        and path.is_file()
        and path.name not in _NO_ROWS
        and not (path.name in _OF_A_BUILD and (path.parent / "manifest.json").is_file())
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    ]


def _distinct(files: Sequence[Path]) -> list[Path]:
    """Without further copies of a table: the same bytes, or the same name in another form."""
    kept: dict[Path, Path] = {}
    for file in sorted(files, key=lambda file: _SUFFIXES.index(file.suffix.lower())):
        kept.setdefault(file.with_suffix(""), file)
    sizes = Counter(file.stat().st_size for file in kept.values())
    distinct: dict[object, Path] = {}
    for file in sorted(kept.values()):
        may_repeat = sizes[file.stat().st_size] > 1
        distinct.setdefault(sha256_of(file) if may_repeat else file, file)
    return list(distinct.values())


def _of_split(
    folder: Path, files: Sequence[Path], splits: Sequence[str], *, must: bool, key: str
) -> Sequence[Path]:
    """The files of the first split there is; else those that name no split."""
    names = {file: file.relative_to(folder) for file in files}
    for names_it in (_is_split, _mentions_split):
        for split in splits:
            if chosen := [file for file in files if names_it(names[file], split)]:
                return chosen
    others = {split for split in _SPLITS if any(_mentions_split(names[f], split) for f in files)}
    if chosen := [f for f in files if not any(_mentions_split(names[f], s) for s in others)]:
        return chosen
    # All files are named for one split that was not asked for by name: there is nothing to choose.
    if len(others) == 1 and not must:
        logger.warning(
            "warning: %s: %s has no %s, only files named %s, which are read",
            *(key, folder, " or ".join(splits), next(iter(others))),
        )
        return files
    shown = ", ".join(map(str, list(names.values())[:5])) or "none"
    raise ValueError(
        f"{key}: {folder} has no files of split {' or '.join(map(repr, splits))}, wanted "
        f"{_WANTED}; it has {shown}"
    )


def _is_split(path: Path, split: str) -> bool:
    """Hub repositories name the split: `data/train-00000-of-00003.parquet`, `train/0.parquet`."""
    stem = path.stem.lower()
    return stem == split or stem.startswith(f"{split}-") or split in path.parts[:-1]


def _mentions_split(path: Path, split: str) -> bool:
    pattern = re.compile(rf"(?:^|[-_.]){re.escape(split)}(?:$|[-_.])", re.IGNORECASE)
    return any(pattern.search(part) for part in (*path.parts[:-1], path.stem))
