"""What a folder holds, file by file, with checksums: how damage is found before it is loaded."""

import hashlib
import json
from pathlib import Path

from care_train.distributed import gather, is_main, rank, world_size
from care_train.training.folders import sync

MANIFEST_FILE = "manifest.json"


def write_manifest(folder: Path) -> None:
    """Record size and BLAKE2b of every file in `folder`; ranks share the reading."""
    files = gather(_files(folder) if is_main() else [])[0]
    own = {name: _describe(folder / name) for name in files[rank() :: world_size()]}
    entries = {name: entry for part in gather(own) for name, entry in part.items()}
    if is_main():
        manifest = {"format": 1, "files": dict(sorted(entries.items()))}
        (folder / MANIFEST_FILE).write_text(json.dumps(manifest, indent=1))


def find_damage(folder: Path) -> str | None:
    """Why `folder` is not what its manifest says, or None; every rank gets the same answer."""
    entries = gather(_read(folder) if is_main() else None)[0]
    if isinstance(entries, str):
        return entries
    assert entries is not None
    names = sorted(entries)
    problems = [_compare(folder, name, entries[name]) for name in names[rank() :: world_size()]]
    found = sorted(text for part in gather(problems) for text in part if text is not None)
    return found[0] if found else None


def _read(folder: Path) -> dict[str, dict[str, int | str]] | str:
    """The manifest's entries, or what is wrong with it."""
    path = folder / MANIFEST_FILE
    if not path.is_file():
        return f"no {MANIFEST_FILE}: it is incomplete"
    try:
        entries = json.loads(path.read_text())["files"]
        if all({"size", "blake2b"} <= entry.keys() for entry in entries.values()):
            return entries
    except (ValueError, KeyError, TypeError, AttributeError):
        pass
    return f"{MANIFEST_FILE} is damaged"


def _compare(folder: Path, name: str, entry: dict[str, int | str]) -> str | None:
    path = folder / name
    if not path.is_file():
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
        path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()
    )
