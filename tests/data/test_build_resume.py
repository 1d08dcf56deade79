"""The same bytes on any number of workers and after a kill; no build is mistaken for another."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from care_train.cli import main
from care_train.data.building import run
from care_train.data.building.run import CHUNK_ROWS
from tests.data.published import build_from, drawing, write_jsonl

NAMES = ("train.parquet", "quarantine.jsonl", "manifest.json")


def contents(output: Path) -> list[bytes]:
    return [(output / name).read_bytes() for name in NAMES]


def many_rows(folder: Path, count: int) -> list[dict[str, Any]]:
    """A source of several chunks with duplicates and rejected rows in most."""
    for number in range(40):
        drawing(number).save(folder / f"{number}.png")
    rows = [
        {"prompt": f"What is {i % 700}?", "answer": str(i % 7), "image": f"{i % 45}.png"}
        for i in range(count)
    ]
    path = write_jsonl(folder / "rows.jsonl", rows)
    return [{"name": "mine", "path": str(path)}]


def test_a_build_stopped_anywhere_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Stopped before or after any file is written, or while joining: the end is the same."""
    sources = many_rows(tmp_path, 3 * CHUNK_ROWS + 5)
    _, whole = build_from(tmp_path, sources, output=tmp_path / "whole")

    class StopError(Exception):
        pass

    def stop_at(name: str, call: int, after: bool) -> None:
        function, calls = getattr(run, name), iter(range(1, 1000))

        def stopping(*args: Any) -> Any:
            now = next(calls) == call
            if now and not after:
                raise StopError
            result = function(*args)
            if now:
                raise StopError
            return result

        monkeypatch.setattr(run, name, stopping)

    cases = [("prepare", 1, False), ("prepare", 3, True), ("sha256_of", 2, True)]
    cases += [("write_rows", 1, False), ("write_rows", 1, True), ("kept_rows", 2, False)]
    for number, case in enumerate(cases):
        output = tmp_path / f"stopped{number}"
        with monkeypatch.context():
            stop_at(*case)
            with pytest.raises(StopError):
                build_from(tmp_path, sources, output=output)
            monkeypatch.undo()
        assert not (output / "manifest.json").exists()
        build_from(tmp_path, sources, output=output)
        assert contents(output) == contents(whole), case
        assert sorted(path.name for path in output.iterdir()) == sorted(NAMES)


def test_a_killed_command_goes_on_and_leaves_no_process(tmp_path: Path):
    """SIGKILL amid the chunks ends the two workers too; the command again ends with the bytes that
    one process writes."""
    sources = many_rows(tmp_path, 12 * CHUNK_ROWS)
    _, whole = build_from(tmp_path, sources, output=tmp_path / "whole")
    output, config = tmp_path / "killed", tmp_path / "killed.yaml"
    config.write_text(json.dumps({"output": str(output), "workers": 2, "sources": sources}))
    arguments = ["data", "build", "--config", str(config)]
    process = subprocess.Popen([sys.executable, "-m", "care_train", *arguments])
    deadline = time.monotonic() + 120
    while len(list(output.glob(".unfinished/*.arrow"))) < 3:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    workers = psutil.Process(process.pid).children(recursive=True)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert workers and not psutil.wait_procs(workers, timeout=30)[1]
    assert not (output / "train.parquet").exists()
    assert main(arguments) == 0
    assert contents(output) == contents(whole)


def test_a_finished_build_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """The same settings do nothing, others are an error unless overwrite says so."""
    sources = many_rows(tmp_path, 50)
    manifest, output = build_from(tmp_path, sources)
    written = (output / "train.parquet").stat().st_mtime_ns
    assert build_from(tmp_path, sources, workers=2)[0] == manifest
    assert (output / "train.parquet").stat().st_mtime_ns == written
    with pytest.raises(ValueError, match=r"a build of other settings .*, choose another folder"):
        build_from(tmp_path, sources, clean={"max_answer_chars": 9})
    write_jsonl(tmp_path / "rows.jsonl", [{"prompt": "q", "answer": "1"}])
    with pytest.raises(ValueError, match="holds a build of other inputs"):
        build_from(tmp_path, sources)
    manifest, _ = build_from(tmp_path, sources, overwrite=True)
    assert manifest["counts"]["total"]["kept"] == 1


def test_an_unfinished_build_is_its_own_settings_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """A second process on the same output would write over the first one's parts; going on under
    other settings would mix two data sets, so the changed key is named."""
    sources = many_rows(tmp_path, 50)
    config = tmp_path / "build.yaml"

    def other_build(*_: Any) -> None:
        command = [sys.executable, "-m", "care_train", "data", "build", "--config", str(config)]
        said = subprocess.run(command, capture_output=True, text=True)
        assert said.returncode == 2
        assert "does another process build there?" in said.stderr
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(run, "write_rows", other_build)
        with pytest.raises(KeyboardInterrupt):
            build_from(tmp_path, sources)
    with pytest.raises(ValueError, match=r"settings\.clean\.max_answer_chars: saved 256, got 9"):
        build_from(tmp_path, sources, clean={"max_answer_chars": 9})
    build_from(tmp_path, sources)


def test_the_command_reports(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Counts as a table, the expected number; user errors exit with 2 and name the setting."""
    config = tmp_path / "c.yaml"
    values = {"output": str(tmp_path / "out"), "workers": 1, "sources": many_rows(tmp_path, 50)}
    config.write_text(json.dumps(values))
    arguments = ["data", "build", "--config", str(config)]
    assert main([*arguments, "sources.mine.expected_rows=51"]) == 0
    assert "mine: 45 usable rows, expected 51" in capsys.readouterr().out
    for override, message in (
        ("sources.mine.colour=red", "unknown key 'sources.0.colour'"),
        ("sources.yours.path=x", "sources.yours: no such source, there are mine"),
        ("dedup.max_distance=16", "dedup.max_distance: got 16, wanted an integer in [0, 16)"),
    ):
        assert main([*arguments, override]) == 2
        assert message in capsys.readouterr().err
