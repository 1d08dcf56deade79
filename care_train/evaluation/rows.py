"""A benchmark's rows: from the Hugging Face Hub, a downloaded repository, or a file.

Images stay as they are stored, and rows are read one at a time.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from care_train.data.row_files import RowFile
from care_train.data.row_files import open_rows as open_row_file

Read = Callable[[int], Mapping[str, Any]]

_SUFFIXES = (".parquet", ".jsonl", ".json")


@dataclass(frozen=True)
class Rows:
    """Rows not read yet."""

    name: str
    """The file, or the data set and its subset."""
    base_dir: Path
    """Where relative image paths start."""
    count: int
    read: Read

    def location(self, place: int) -> str:
        """File and row, counted from 1, for errors."""
        return f"{self.name}: row {place + 1}"


def open_rows(source: str, subsets: Sequence[str], split: str) -> list[Rows]:
    """All rows of a data set, one part per file or subset.

    Args:
        source: a .parquet, .jsonl or .json file; a folder that holds such files, named after the
            split (a downloaded repository) and in folders named after the subsets; a folder written
            by Dataset.save_to_disk; or the id of a data set on the Hub.
        subsets: which of its configurations; none: its only one, or all.
        split: which split.

    Raises:
        ValueError: no such file, folder or data set, or no rows in it.
    """
    path = Path(source).expanduser()
    if path.is_file():
        parts = [_open_file(path, path.name)]
    elif path.is_dir():
        parts = _open_folder(path, subsets, split)
    elif source.count("/") == 1 and not path.suffix:
        parts = _open_hub(source, subsets, split)
    else:
        raise ValueError(
            f"{source}: no such file or folder; wanted a {', '.join(_SUFFIXES)} file, a folder of "
            "them, or a data set's id such as AI4Math/MathVista"
        )
    if not sum(part.count for part in parts):
        raise ValueError(f"{source}: got no rows of split {split!r}, wanted at least 1")
    return parts


def _open_file(path: Path, name: str) -> Rows:
    if path.suffix.lower() not in _SUFFIXES:
        raise ValueError(f"{path}: ends with {path.suffix!r}, wanted {', '.join(_SUFFIXES)}")
    return _from_row_file(open_row_file(path, ""), name, path.parent)


def _from_row_file(rows: RowFile, name: str, base_dir: Path) -> Rows:
    def read(place: int) -> Mapping[str, Any]:
        try:
            row = rows.read(place)
        except ValueError as error:
            raise ValueError(f"{name}: row {place + 1}: not JSON ({error})") from None
        if not isinstance(row, Mapping):
            raise ValueError(
                f"{name}: row {place + 1}: got a {type(row).__name__}, wanted an object with named "
                "columns"
            )
        return row

    return Rows(name, base_dir, len(rows.numbers), read)


def _open_folder(path: Path, subsets: Sequence[str], split: str) -> list[Rows]:
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        return [_from_row_file(open_row_file(path, split), path.name, path)]
    folders = [path / subset for subset in subsets if (path / subset).is_dir()] or [path]
    files = [file for folder in folders for file in _split_files(folder, split)]
    if not files:
        raise ValueError(
            f"{path}: no {split}.parquet, {split}-*.parquet, {split}.jsonl or {split}.json in it "
            "or its folders: wanted a downloaded data set, or one saved by Dataset.save_to_disk"
        )
    return [_open_file(file, str(file.relative_to(path))) for file in files]


def _split_files(folder: Path, split: str) -> Iterator[Path]:
    for file in sorted(folder.rglob("*")):
        is_named = file.stem == split or file.stem.startswith(f"{split}-")
        if is_named and file.suffix in _SUFFIXES and file.is_file():
            yield file


def _open_hub(source: str, subsets: Sequence[str], split: str) -> list[Rows]:
    import datasets

    names = subsets or datasets.get_dataset_config_names(source)
    return [
        _from_datasets(datasets.load_dataset(source, name, split=split), f"{source} {name} {split}")
        for name in names
    ]


def _from_datasets(loaded: Any, name: str) -> Rows:
    # Arrow rows keep images as they were stored; the plain format would decode them.
    rows = loaded.with_format("arrow")
    return Rows(name, Path(), len(loaded), lambda place: rows[place].to_pylist()[0])
