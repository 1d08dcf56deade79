"""The wheel by itself, in an empty folder: shipped configurations are found by their names."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_a_shipped_configuration_is_named_after_a_wheel_install(tmp_path: Path):
    """`care-train plan --config care` from the installed package, which has configs/ inside."""
    installed, empty = install_wheel(tmp_path), tmp_path / "empty"
    empty.mkdir()
    code = (
        "import care_train, sys; assert 'site' in care_train.__file__.split('/'), sys.path\n"
        "from care_train.__main__ import main\n"
        "sys.exit(main())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "plan", "--config", "care_no_rgr", "--json"],
        cwd=empty,
        env=os.environ | {"PYTHONPATH": str(installed)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["model"] == "Qwen2.5-VL-3B-Instruct"
    wrong = subprocess.run(
        [sys.executable, "-c", code, "verify", "--config", "caer"],
        cwd=empty,
        env=os.environ | {"PYTHONPATH": str(installed)},
        capture_output=True,
        text=True,
    )
    assert wrong.returncode == 2
    assert "--config: got caer, wanted a YAML file or one of care, care_no_rgr" in wrong.stderr


def install_wheel(folder: Path) -> Path:
    """Build the wheel in `folder` and install it without what it needs; a path for PYTHONPATH."""
    build = (sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--quiet")
    subprocess.run([*build, "--wheel-dir", folder, ROOT], check=True)
    (wheel,) = folder.glob("*.whl")
    site = folder / "site"
    install = (sys.executable, "-m", "pip", "install", "--no-deps", "--quiet", "--target")
    subprocess.run([*install, site, wheel], check=True)
    return site
