"""Every command ends as docs/failures.md says: its status, one line that says what to do, and no
traceback, whatever is wrong around it."""

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from care_train.cli import main
from care_train.training.failures import DISK_FULL_STATUS, INPUT_STATUS
from tests.security.conftest import at_step, one_rank
from tests.train.runs import mounted_disk, text_run_arguments


def _arguments(rows: Path, out: Path) -> list[str]:
    return [
        *(*text_run_arguments(out, rows), "algorithm=grpo", "train.steps=2"),
        *("train.schedule=constant", "train.save_every=1", "logging.report_to=[tensorboard]"),
    ]


def _one(*arguments: str, before: str = "") -> tuple[int | None, str]:
    status, errors = one_rank(*arguments, before=before)
    assert "Traceback" not in errors, errors
    return status, errors


@pytest.mark.parametrize("other", ["run.yaml", "other.yaml"])
def test_files_that_extend_each_other_are_an_error(other, tmp_path, capsys):
    """Itself, and one that extends it: the circle is named."""
    (tmp_path / "run.yaml").write_text(f"extends: {other}\n")
    (tmp_path / "other.yaml").write_text("extends: run.yaml\n")
    assert main(["train", "--config", str(tmp_path / "run.yaml")]) == INPUT_STATUS
    errors = capsys.readouterr().err
    assert "extends" in errors and str(tmp_path) in errors


@pytest.fixture
def disk(tmp_path) -> Iterator[Path]:
    """A disk of 8 MiB."""
    with mounted_disk(tmp_path / "disk", "size=8m,nr_inodes=400") as folder:
        yield folder


@pytest.fixture
def read_only(tmp_path) -> Iterator[Path]:
    """A disk that nobody can write to, root neither."""
    with mounted_disk(tmp_path / "disk", "size=1m,ro") as folder:
        yield folder


def _writing(command: str, rows: Path, out: Path, tmp_path: Path) -> list[str]:
    """Arguments with which a command writes into `out`; what it needs is in `tmp_path`."""
    if command == "export":
        status, errors = _one(*_arguments(rows, tmp_path), "train.steps=1")
        assert status == 0, errors
        return ["export", f"--run={tmp_path / 'run'}", f"--out={out / 'out'}"]
    if command == "data":
        (tmp_path / "build.yaml").write_text(f"sources:\n- {{name: rows, path: {rows}}}\n")
        return ["data", "build", f"--config={tmp_path / 'build.yaml'}", f"output={out / 'o'}"]
    return [command, *_arguments(rows, out)[1:]]


OTHERS = ["sft", "eval", "export", "data"]
# In training, from before the folder is made to the final model.
FULL = [("train", kib) for kib in (0, 12, 150, 1500)] + [(command, 8) for command in OTHERS]


@pytest.mark.parametrize(("command", "kib"), FULL)
def test_a_disk_that_is_full_anywhere_is_status_74(command, kib, rows, disk, tmp_path):
    """With so much room left, whatever a command was about to write: it says what to do."""
    arguments = _writing(command, rows, disk, tmp_path)
    (disk / "ballast").write_bytes(bytes((8 << 20) - (kib << 10)))
    status, errors = _one(*arguments)
    assert status == DISK_FULL_STATUS, errors
    assert "No space left" in errors or "disk is full" in errors, errors


@pytest.mark.parametrize("command", ["train", *OTHERS])
def test_a_read_only_output_is_status_2_under_every_command(command, rows, read_only, tmp_path):
    """The folder is named, and that it cannot be written."""
    status, errors = _one(*_writing(command, rows, read_only, tmp_path))
    assert status == INPUT_STATUS, errors
    assert "Read-only file system" in errors and str(read_only) in errors, errors


CLOSE = """
import subprocess
for options in (["--bind", {disk!r}], ["-o", "remount,bind,ro"]):
    subprocess.run(["mount", *options, {disk!r}], check=True)
"""


def test_an_output_that_becomes_read_only_ends_the_run(rows, disk):
    """As a disk with errors does: the file that could not be written is named."""
    before = at_step(1, CLOSE.format(disk=str(disk)))
    status, errors = _one(*_arguments(rows, disk), "train.steps=4", before=before)
    subprocess.run(["umount", "-l", disk], check=True)
    assert status == INPUT_STATUS and "Read-only file system" in errors, errors
    assert str(disk / "run") in errors, errors


def test_an_odd_name_is_shown_as_it_is(rows, tmp_path, capsys):
    """The terminal's markup, HTML and Markdown in a run's name: a run that ends well shows it to
    the letter."""
    name = "[/red][bold]x<img src=x onerror=alert(1)>a|b`c`"
    status, errors = _one(*_arguments(rows, tmp_path), f"name={json.dumps(name)}", "train.steps=1")
    assert status == 0, errors
    shown = (tmp_path / name / "report.md").read_text().partition("```")[0]
    assert "<img" not in shown and shown.count("\n# ") == 0, shown
    # A line break and an escape sequence are refused.
    for name in ("a\nb", "\x1b[31mx"):
        assert main([*_arguments(rows, tmp_path), f"name={json.dumps(name)}"]) == INPUT_STATUS
        assert "name: got " in capsys.readouterr().err
