"""Attacks on the verifier: from the working folder, through answers, through the judge."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

# What a worker would import first: standard modules, its dependencies, and this package.
_MODULES = ("json", "re", "fractions", "pickle", "math_verify", "sympy", "latex2sympy2_extended")


@pytest.mark.parametrize("path", ["", "."], ids=["unset", "dot"])
def test_a_working_folder_changes_no_verdict(tmp_path: Path, path: str):
    """Files in the folder where a run is started are not imported by its worker processes."""
    for name in _MODULES:
        (tmp_path / f"{name}.py").write_text(
            f"open({str(tmp_path / 'seen')!r}, 'a').write(__file__)"
        )
    rewards = tmp_path / "own" / "rewards.py"
    rewards.parent.mkdir()
    rewards.write_text("import json\n\ndef f(completions):\n    return [json.loads('1.0')]\n")
    line = {"response": "<answer>1/\\sqrt{2}</answer>", "answer": "\\frac{\\sqrt{2}}{2}"}
    # A console script or `python -P` keeps the folder from the first process.
    code = (
        f"import sys; sys.path += {[path] if path else []}; from care_train.cli import main; main()"
    )
    for more in ([], [f"reward.functions=[{{function: {rewards}:f}}]"]):
        done = subprocess.run(
            [sys.executable, "-P", "-c", code, "verify", *more],
            cwd=tmp_path,
            input=json.dumps(line),
            capture_output=True,
            text=True,
        )
        assert json.loads(done.stdout)["acc"] == 1.0, done.stderr
    assert not (tmp_path / "seen").exists()
