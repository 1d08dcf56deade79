"""The manifest: of what a data set was built, with what, and what came out."""

import json
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from care_train.config import BuildSettings
from care_train.data.building.table import FORMAT_VERSION

QUARANTINE = "quarantine.jsonl"
"""The file of rejected rows."""

_LIBRARIES = ("pyarrow", "datasets", "pillow", "imagehash", "numpy", "scipy")
"""Those whose versions the output may depend on."""

_FREE = ("output", "overwrite", "workers")
"""Settings that change nothing in the output."""


def fingerprint_of(settings: BuildSettings, inputs: list[list[dict[str, Any]]]) -> dict[str, Any]:
    """Settings, inputs and versions: two builds that agree in them write the same bytes."""
    names = [source.name for source in settings.sources]
    return {
        "format": FORMAT_VERSION,
        "settings": {k: v for k, v in asdict(settings).items() if k not in _FREE},
        "inputs": dict(zip(names, inputs, strict=True)),
        "libraries": {name: version(name) for name in _LIBRARIES},
    }


def manifest_of(
    fingerprint: dict[str, Any], counts: dict[str, Any], checksums: dict[str, str]
) -> dict[str, Any]:
    """What lies beside the data; the same for the same fingerprint."""
    return {**fingerprint, "counts": counts, "sha256": checksums}


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of a finished build; None where there is none."""
    path = folder / "manifest.json"
    return json.loads(path.read_text()) if path.is_file() else None
