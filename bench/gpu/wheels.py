"""Peers from wheels in a folder, for machines on which nothing can be installed.

    pip download --no-deps -d .wheels liger-kernel==0.8.5 cut-cross-entropy==25.1.1 trl==1.16.0

A wheel of pure Python is a zip archive of what would be installed: unpacked on the path of the
measuring processes it is importable, and its version can be asked for.
"""

import zipfile
from pathlib import Path

FOLDER = ".wheels"


def unpack_wheels(wheels: Path, into: Path) -> list[str]:
    """Unpack every wheel into one folder; returns their names."""
    found = sorted(wheels.glob("*.whl"))
    for wheel in found:
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(into)
    return [wheel.name for wheel in found]
