"""Rejected rows, duplicates and answer types: each counted, none lost."""

import io
import random
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from care_train.config import DataSettings
from care_train.data import load_samples
from care_train.data.building.dedup import compare_looks, duplicate_keys, normalized_text
from care_train.data.building.prepare import chart_answer_type
from tests.data.published import build_from, drawing, quarantine, write_jsonl

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
    samples = list(load_samples(DataSettings(path=str(output / "train.parquet"))))
    kept = [int(sample.id.split("/")[-1]) for sample in samples]
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
