"""Peers from wheels in a folder, for machines on which nothing can be installed.

    pip download --no-deps -d .wheels liger-kernel==0.8.5 cut-cross-entropy==25.1.1 trl==1.16.0

A wheel is a zip archive of what would be installed: unpacked on the path of the measuring processes
its modules are importable, and its version can be asked for.
"""

import sys
import zipfile
from pathlib import Path

from bench.peers import installed_version

FOLDER = ".wheels"


def unpack_wheels(wheels: Path, into: Path) -> list[str]:
    """Unpack into one folder what this Python can import and has not installed; their names."""
    found = [wheel for wheel in sorted(wheels.glob("*.whl")) if _is_wanted(wheel)]
    for wheel in found:
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(into)
    return [wheel.name for wheel in found]


def _is_wanted(wheel: Path) -> bool:
    """By its name: distribution, version, then the tags of Python, ABI and platform."""
    distribution, *_, python, _, _ = wheel.stem.split("-")
    major, minor = sys.version_info[:2]
    fitting = {f"py{major}", f"py{major}{minor}", f"cp{major}{minor}"}
    return bool(fitting & set(python.split("."))) and installed_version(distribution) is None
