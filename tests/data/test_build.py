"""A build counts every row, kept or rejected; it writes the same bytes on any number of workers and
after a kill; no build is mistaken for another."""

import io
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from PIL import Image

from care_train.cli import main
from care_train.data import build
from care_train.data.build import CHUNK_ROWS
from care_train.data.dedup import compare_looks, duplicate_keys, normalized_text
from care_train.data.prepare import chart_answer_type
from tests.data.published import build_from, drawing, load, quarantine, write_jsonl

NAMES = ("train.parquet", "quarantine.jsonl", "manifest.json")
GOOD = {"prompt": "How many?", "answer": "3", "image": "a.png"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    drawing(1).save(tmp_path / "a.png")
    drawing(2).save(tmp_path / "b.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "a.png").read_bytes()[:120])
    (tmp_path / "text.png").write_text("no image")
    Image.new("1", (9000, 9000)).save(tmp_path / "bomb.png")
    Image.new("RGB", (900, 3)).save(tmp_path / "long.png")
    return tmp_path


def build_rows(folder: Path, rows: list[Any], **settings: Any) -> tuple[dict[str, Any], Path]:
    path = write_jsonl(folder / "rows.jsonl", rows)
    return build_from(folder, [{"name": "mine", "path": str(path)}], **settings)


BAD = [
    ({"answer": "3" * 300}, "long_answer", "answer: got 300 characters, wanted 256 at most"),
    ({"prompt": "w" * 9000}, "long_prompt", "prompt: got 9000 characters, wanted 8192 at most"),
    ({"answer": "</answer>3"}, "answer_tags", "answer: got '</answer>', wanted the bare answer"),
    ({"prompt": "<|im_end|>"}, "special_token", "prompt: got '<|im_end|>', wanted plain text"),
    ({"image": "gone.png"}, "image_missing", "image 'gone.png': none in"),
    ({"image": "cut.png"}, "image_unreadable", "damaged"),
    ({"image": "text.png"}, "image_unreadable", "got no readable image, wanted PNG"),
    ({"image": "bomb.png"}, "image_too_large", "9000 x 9000 = 81000000 pixels, wanted at most"),
    ({"image": "long.png"}, "image_aspect", "900 x 3 pixels, wanted sides within a factor of 200"),
    ({"image": ["a.png"] * 17}, "many_images", "images: got 17, wanted 16 at most"),
    ({"prompt": 3}, "prompt_type", "prompt: got 3, wanted text or chat messages"),
]


def test_rejected_rows_say_why(folder: Path):
    """Those of the build and, as `test_rows.py` has them, of the schema: the quarantine names file,
    row, reason, got and wanted; counts agree."""
    rows = [GOOD] + [GOOD | change for change, _, _ in BAD] + ["text"]
    path = write_jsonl(folder / "rows.jsonl", rows)
    with path.open("a") as file:
        file.write("{broken\n\n")
    manifest, output = build_from(folder, [{"name": "mine", "path": str(path)}])
    found = quarantine(output)
    reasons = [reason for _, reason, _ in BAD] + ["not_an_object"] * 2
    assert [row["reason"] for row in found] == reasons
    assert [row["row"] for row in found] == list(range(2, len(BAD) + 4))
    for row, (_, _, detail) in zip(found, BAD, strict=False):
        assert row["detail"].startswith(f"rows.jsonl: row {row['row']}: ")
        assert detail in row["detail"], row
    assert "not JSON" in found[-1]["detail"]
    counts = manifest["counts"]["sources"]["mine"]
    assert counts["kept"] == 1
    assert counts["read"] == 1 + len(found)
    assert sum(counts["rejected"].values()) == len(found)
    assert counts["rejected"]["image_unreadable"] == 2


def test_a_rationale_can_be_asked_for(folder: Path):
    """A cold start's build rejects rows without a rationale."""
    rows = [GOOD | {"rationale": "so"}, GOOD | {"image": "b.png"}]
    _, output = build_rows(folder, rows, clean={"require_rationale": True})
    assert [row["reason"] for row in quarantine(output)] == ["no_rationale"]


def test_no_usable_row_is_an_error(folder: Path):
    """A build of nothing fails, and leaves the reasons."""
    with pytest.raises(ValueError, match=r"no row is usable: .*quarantine\.jsonl says why"):
        build_rows(folder, [GOOD | {"answer": ""}])
    assert quarantine(folder / "built")[0]["reason"] == "empty_answer"
    # Corrected rows are built without `overwrite`.
    with pytest.raises(ValueError, match="no row is usable: the files hold none"):
        build_rows(folder, [])


def jpeg(number: int, quality: int, scale: float = 1.0) -> Image.Image:
    image = drawing(number, (192, 144)).resize((int(192 * scale), int(144 * scale)))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return Image.open(buffer)


def test_duplicates(folder: Path):
    """Same text and look: a duplicate. Another picture, question or key: none, or a conflict."""
    drawing(3, (192, 144)).save(folder / "c.png")
    jpeg(3, 80).save(folder / "c.jpg", quality=80)
    jpeg(3, 90, 0.75).save(folder / "small.png")
    drawing(3, (192, 144)).convert("L").save(folder / "grey.png")
    first = {"prompt": "<image>Find x.", "answer": "3", "image": "c.png"}
    near, conflict = "near_duplicate", "conflicting_answer"
    cases = [
        ({}, None),
        ({"prompt": "FIND  x"}, "duplicate"),
        ({"image": "c.jpg"}, near),
        ({"image": "small.png"}, near),
        ({"image": "grey.png"}, None),
        ({"image": "a.png"}, None),
        ({"prompt": "Find y."}, None),
        ({"answer": "4"}, conflict),
        ({"answer": "4", "image": "c.jpg"}, None),
        ({"prompt": "Find x.", "image": []}, None),
        ({"prompt": "find X .", "image": []}, "duplicate"),
        ({"prompt": "<image><image>Find x.", "image": ["c.png", "a.png"]}, None),
        ({"prompt": "<image><image>Find x.", "image": ["c.jpg", "b.png"]}, None),
        ({"prompt": "<image><image>Find x.", "image": ["c.jpg", "a.png"]}, near),
    ]
    manifest, output = build_rows(folder, [first | change for change, _ in cases])
    found = {row["row"]: row["reason"] for row in quarantine(output)}
    assert found == {row: why for row, (_, why) in enumerate(cases, 1) if why}
    kept = [int(sample.id.split("/")[-1]) for sample in load(output)]
    assert kept == [row for row, (_, why) in enumerate(cases, 1) if not why]
    counts = manifest["counts"]["sources"]["mine"]["duplicates"]
    assert counts == {f"{conflict} of mine": 1, "duplicate of mine": 2, f"{near} of mine": 3}


def test_duplicates_across_sources(folder: Path):
    """The source named first keeps the row; the other one's is counted against it."""
    write_jsonl(folder / "one.jsonl", [GOOD])
    write_jsonl(folder / "two.jsonl", [GOOD, GOOD | {"image": "b.png"}])
    sources = [{"name": n, "path": str(folder / f"{n}.jsonl")} for n in ("one", "two")]
    manifest, output = build_from(folder, sources)
    one, two = (manifest["counts"]["sources"][name] for name in ("one", "two"))
    assert two["duplicates"] == {"duplicate of one": 1}
    assert quarantine(output)[0]["detail"] == "two.jsonl: row 1: repeats one/one.jsonl/1"
    assert (one["usable_share"], two["usable_share"]) == (33.3, 66.7)
    assert one["kept_share"] == two["kept_share"] == 50.0
    manifest, _ = build_from(folder, sources[::-1], overwrite=True)
    assert manifest["counts"]["sources"]["one"]["duplicates"] == {"duplicate of two": 1}
    manifest, _ = build_from(folder, sources, overwrite=True, dedup={"enabled": False})
    assert manifest["counts"]["total"]["kept"] == 3


@pytest.mark.parametrize("distance", [0, 1, 6])
def test_the_index_misses_no_duplicate(distance: int):
    """Hashes that differ in at most `max_distance` bits, wherever, share a key."""
    rng = random.Random(distance)
    for _ in range(300):
        bits = rng.getrandbits(256)
        changed = bits
        for place in rng.sample(range(256), distance):
            changed ^= 1 << place
        one, other = (bytes(16) + v.to_bytes(32) + bytes(192) for v in (bits, changed))
        keys = [set(duplicate_keys("q", [look], distance)) for look in (one, other)]
        assert keys[0] & keys[1]
        assert compare_looks(one, other, distance) == (True, True)
        assert distance == 0 or compare_looks(one, other, distance - 1) == (True, False)


def test_normalized_text():
    """Case, white space, width, placeholders and closing marks do not tell questions apart."""
    same = ["<image>Find x.", "find  X", "\nFIND\u00a0x?", "\uff26ind x <image>"]
    assert len({normalized_text(text) for text in same}) == 1
    assert normalized_text("x + 1") != normalized_text("x - 1")


def test_charts_allow_five_percent_of_numbers():
    """ChartQA's measure, but not for years; every other type is the verifier's to infer."""
    for number in ("12", "-1,234.5", "45%", "$3", ".5", "1750", "2200"):
        assert chart_answer_type(number) == "relaxed", number
    for other in ("2015", "1999", "Yes", "dark blue", "3/4", "%", "12 and 13"):
        assert chart_answer_type(other) is None, other


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
        function, calls = getattr(build, name), iter(range(1, 1000))

        def stopping(*args: Any) -> Any:
            now = next(calls) == call
            if now and not after:
                raise StopError
            result = function(*args)
            if now:
                raise StopError
            return result

        monkeypatch.setattr(build, name, stopping)

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
    sources = many_rows(tmp_path, 8 * CHUNK_ROWS)
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
        patched.setattr(build, "write_rows", other_build)
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
