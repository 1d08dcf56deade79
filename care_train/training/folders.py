"""Folders that appear whole or not at all, and the checksums by which damage to one is found."""

import hashlib
import json
import shutil
from collections.abc import Callable
from errno import EACCES, EPERM, EROFS
from pathlib import Path

from safetensors import SafetensorError

from care_train.distributed import gather, is_main, of_first_rank, own_share
from care_train.reporting.files import PARTIAL, sync
from care_train.training.failures import DISK_FULL_STATUS, INPUT_STATUS, RunError
from care_train.training.timer import timer

REPLACED = ".replaced"
"""Ends the name of a folder while the new one of its name is put in its place."""
DELETED = ".deleted"
"""Ends the name of a folder on its way out."""
MANIFEST_FILE = "manifest.json"


class SaveError(RunError):
    """A folder could not be written; what it was to replace is untouched."""

    status = DISK_FULL_STATUS


def write_folder(folder: Path, *writes: Callable[[Path], None], needed: int = 0) -> None:
    """Let all ranks fill a temporary sibling of `folder`, which then takes its name.

    Args:
        folder: where to; an older one is replaced once the new one is whole.
        writes: called in turn with the temporary folder, by every rank; the next one starts when
            all ranks are done with the one before. Where one raises an `OSError` all ranks stop.
        needed: bytes the folder will take, about; checked against the disk's free ones first.

    Raises:
        SaveError: it could not be written. The temporary folder is gone.
    """
    partial = folder.with_name(folder.name + PARTIAL)
    steps = (lambda: _begin(partial, folder, needed), *(lambda w=w: w(partial) for w in writes))
    try:
        with timer("save"):
            for step in (*steps, lambda: _finish(partial, folder)):
                _together(step, folder, needed)
    except BaseException:
        if is_main():
            _put_back(folder)
            shutil.rmtree(partial, ignore_errors=True)
        raise


def remove_folder(folder: Path) -> None:
    """Delete `folder` so that a kill leaves it whole, or as a leftover that `clean_up` knows."""
    if folder.exists():
        doomed = folder.with_name(folder.name + DELETED)
        shutil.rmtree(doomed, ignore_errors=True)
        folder.rename(doomed)
        shutil.rmtree(doomed)


def clean_up(folder: Path) -> None:
    """Delete what killed writes and deletions left in `folder`; put back what has no successor."""
    for path in folder.glob(f"*{REPLACED}"):
        _put_back(path.with_name(path.name.removesuffix(REPLACED)))
    for suffix in (PARTIAL, REPLACED, DELETED):
        for path in folder.glob(f"*{suffix}"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def write_manifest(folder: Path) -> None:
    """Record size and BLAKE2b of every file in `folder`; ranks share the reading."""
    files = of_first_rank(_files(folder) if is_main() else [])
    own = {name: _describe(folder / name) for name in own_share(files)}
    entries = {name: entry for part in gather(own) for name, entry in part.items()}
    if is_main():
        manifest = {"format": 1, "files": dict(sorted(entries.items()))}
        (folder / MANIFEST_FILE).write_text(json.dumps(manifest, indent=1))


def find_damage(folder: Path) -> str | None:
    """Why `folder` is not what its manifest says, or None; every rank gets the same answer."""
    entries = of_first_rank(_read(folder) if is_main() else None)
    if isinstance(entries, str):
        return entries
    assert entries is not None
    names = sorted({*entries, *_files(folder)} - {MANIFEST_FILE})
    problems = [_compare(folder, name, entries.get(name)) for name in own_share(names)]
    found = sorted(text for part in gather(problems) for text in part if text is not None)
    return found[0] if found else None


def _read(folder: Path) -> dict[str, dict[str, int | str]] | str:
    """The manifest's entries, or what is wrong with it."""
    path = folder / MANIFEST_FILE
    if not path.is_file():
        return f"no {MANIFEST_FILE}: it is incomplete"
    try:
        entries = json.loads(path.read_text())["files"]
        are_whole = all({"size", "blake2b"} <= entry.keys() for entry in entries.values())
        are_within = not any(name.startswith("/") or ".." in Path(name).parts for name in entries)
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{MANIFEST_FILE} is damaged"
    return entries if are_whole and are_within else f"{MANIFEST_FILE} is damaged"


def _compare(folder: Path, name: str, entry: dict[str, int | str] | None) -> str | None:
    path = folder / name
    if entry is None:
        return f"{name} is not in {MANIFEST_FILE}"
    if path.is_symlink() or not path.is_file():
        return f"{name} is missing"
    size = path.stat().st_size
    if size != entry["size"]:
        return f"{name} has {size} bytes, wanted {entry['size']}"
    if _digest(path) != entry["blake2b"]:
        return f"{name} does not match its checksum"
    return None


def _describe(path: Path) -> dict[str, int | str]:
    sync(path)
    return {"size": path.stat().st_size, "blake2b": _digest(path)}


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=32)).hexdigest()


def _files(folder: Path) -> list[str]:
    return sorted(
        path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir()
    )


def _together(action: Callable[[], None], folder: Path, needed: int) -> None:
    """Run `action`; where it fails on one rank, all ranks raise: none is left waiting."""
    problem = None
    try:
        action()
    except (OSError, SafetensorError) as error:
        is_refused = isinstance(error, OSError) and error.errno in (EACCES, EPERM, EROFS)
        # torch's and safetensors' writers do not say more; nearly always it is room.
        problem = str(error), INPUT_STATUS if is_refused else DISK_FULL_STATUS
    if problems := list(filter(None, gather(problem))):
        reason, status = problems[0]
        size = f"needs about {needed:,} bytes, " if needed else ""
        error = SaveError(
            f"{folder}: could not be saved ({reason}): {size}"
            f"{_free_bytes(folder):,} bytes are free there; older ones are untouched"
        )
        error.status = status
        raise error


def _begin(partial: Path, folder: Path, needed: int) -> None:
    if not is_main():
        return
    _put_back(folder)
    shutil.rmtree(partial, ignore_errors=True)
    partial.parent.mkdir(parents=True, exist_ok=True)
    if needed > _free_bytes(partial):
        raise OSError("the disk is full")
    partial.mkdir()


def _finish(partial: Path, folder: Path) -> None:
    if not is_main():
        return
    for path in [*partial.rglob("*"), partial]:
        sync(path)
    # The old folder stays whole until the new one has its name: a kill between the two renames
    # leaves it to `_put_back`.
    replaced = folder.with_name(folder.name + REPLACED)
    shutil.rmtree(replaced, ignore_errors=True)
    if folder.exists():
        folder.rename(replaced)
    partial.rename(folder)
    sync(folder.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def _put_back(folder: Path) -> None:
    """Give a folder its name again where `_finish` was cut off between its two renames."""
    replaced = folder.with_name(folder.name + REPLACED)
    if replaced.exists() and not folder.exists():
        replaced.rename(folder)


def _free_bytes(path: Path) -> int:
    """Free bytes of the disk that holds `path`, or will."""
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free
