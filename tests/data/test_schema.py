"""Rows become samples, or an error that says which row, which field and what to do."""

from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from care_train.data import Sample, sample_from_row


def make(row: dict[str, Any]) -> Sample:
    return sample_from_row(row, location="rows.jsonl: row 12", base_dir=Path("/data"), id="rows/12")


@pytest.mark.parametrize("column", ["prompt", "problem", "question"])
def test_prompt_columns(column: str):
    """The prompt is read from any of its three usual columns; other columns are kept."""
    sample = make({column: "why?", "answer": "x", "level": 3})
    assert sample.prompt == "why?"
    assert sample.columns == {"level": 3}
    assert sample.location == "rows.jsonl: row 12"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("blue", "blue"),
        (7, "7"),
        (-2, "-2"),
        (0.5, "0.5"),
        (1e-07, "0.0000001"),
        (True, "yes"),
        (False, "no"),
    ],
)
def test_answers_become_text(value: Any, text: str):
    """Text, numbers (without exponents) and booleans are answers."""
    assert make({"prompt": "q", "answer": value}).answer == text


@pytest.mark.parametrize(
    ("value", "got"),
    [
        (["blue", "red"], r"\['blue', 'red'\]"),
        ({"a": 1}, "an object with 'a'"),
        (None, "nothing in 'answer', and the columns 'prompt', 'answer'"),
        ("", "empty text"),
        (float("nan"), "nan"),
        (float("inf"), "inf"),
    ],
)
def test_wrong_answers_are_named(value: Any, got: str):
    """An answer of the wrong type says row, field, what it is and what was wanted."""
    with pytest.raises(ValueError, match=rf"rows\.jsonl: row 12: answer: got {got}, wanted .+"):
        make({"prompt": "q", "answer": value})


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"answer": "x"}, "row 12: prompt: got the columns 'answer', wanted text or chat"),
        ({}, "row 12: prompt: got no columns, wanted"),
        ({"question": "  ", "answer": "x"}, "row 12: question: got empty text"),
        ({"prompt": ["q"], "answer": "x"}, "row 12: prompt: got ['q'], wanted text or chat"),
        (
            {"prompt": [{"role": "user"}], "answer": "x"},
            "row 12: prompt: message 1: content: got nothing, wanted text or a list of parts",
        ),
        ({"prompt": "q", "answer": "x", "rationale": 3}, "row 12: rationale: got 3"),
        ({"prompt": "q", "answer": "x", "image": 3}, "row 12: image: got 3, wanted a path"),
        ({"prompt": "q", "answer": "x", "images": [None]}, "row 12: images: got nothing"),
        (
            {"prompt": "q", "answer": "x", "image": {"bytes": None, "path": None}},
            "row 12: image: got nothing",
        ),
        (
            {"prompt": "<image> <image>", "answer": "x", "image": "a.png"},
            "row 12: prompt: got 2 <image> placeholders for 1 images",
        ),
        ({"prompt": "<image>", "answer": "x"}, "row 12: prompt: got 1 <image> placeholders for 0"),
    ],
)
def test_unusable_rows_are_named(row: dict[str, Any], message: str):
    """Each way a row can break the schema has its own message."""
    with pytest.raises(ValueError) as error:
        make(row)
    assert message in str(error.value)


def test_images_stay_compressed():
    """Relative paths start at the base folder, bytes stay as they are; none is decoded."""
    picture = Image.new("RGB", (2, 2))
    row = {
        "prompt": "q",
        "answer": "x",
        "images": [
            "a.png",
            "/else/b.png",
            b"raw",
            {"bytes": b"raw", "path": "c.png"},
            {"bytes": None, "path": "d.png"},
            picture,
        ],
    }
    assert make(row).images == (
        Path("/data/a.png"),
        Path("/else/b.png"),
        b"raw",
        b"raw",
        Path("/data/d.png"),
        picture,
    )


def test_blank_rationales_count_as_missing():
    """A blank rationale is none, so that the cold start does not learn empty reasoning."""
    sample = make({"prompt": "q", "answer": "x", "rationale": " ", "failed_rationale": "no"})
    assert sample.rationale is None
    assert sample.failed_rationale == "no"
