"""The project as its wheel installs it."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def install_wheel(folder: Path) -> Path:
    """Build the wheel in `folder` and install it without what it needs; a path for PYTHONPATH."""
    build = (sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--quiet")
    subprocess.run([*build, "--wheel-dir", folder, ROOT], check=True)
    (wheel,) = folder.glob("*.whl")
    site = folder / "site"
    install = (sys.executable, "-m", "pip", "install", "--no-deps", "--quiet", "--target")
    subprocess.run([*install, site, wheel], check=True)
    return site
