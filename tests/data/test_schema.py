"""Rows become samples, or an error that says which row, which field and what to do."""

import base64
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from care_train.data import RowError, Sample, sample_from_row
from care_train.data.conversations import read_conversation, split_response, split_solution


def make(row: dict[str, Any]) -> Sample:
    return sample_from_row(row, location="rows.jsonl: row 12", base_dir=Path("/data"), id="rows/12")


def asked(**columns: Any) -> Sample:
    return make({"prompt": "q", "answer": "x"} | columns)


@pytest.mark.parametrize("column", ["prompt", "problem", "question", "query"])
def test_prompt_columns(column: str):
    """The prompt is read from any of its usual columns; other columns are kept."""
    sample = make({column: "why?", "answer": "x", "level": 3})
    assert sample.prompt == "why?"
    assert sample.columns == {"level": 3}
    assert sample.location == "rows.jsonl: row 12"


@pytest.mark.parametrize(
    ("value", "text"),
    [("blue", "blue"), (7, "7"), (-2, "-2"), (1e-07, "0.0000001"), (True, "yes"), (False, "no")],
)
def test_answers_become_text(value: Any, text: str):
    """Text, numbers (without exponents) and booleans are answers."""
    assert asked(answer=value).answer == text


def user(content: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": content}]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"answer": ["blue", "red"]}, "answer: got ['blue', 'red'], wanted text"),
        ({"answer": {"a": 1}}, "answer: got an object with 'a', wanted text"),
        (
            {"answer": None},
            "answer: got nothing in 'answer', and the columns 'prompt', 'ans",
        ),
        ({"answer": ""}, "answer: got empty text, wanted"),
        ({"answer": float("nan")}, "answer: got nan, wanted"),
        ({"answer": float("inf")}, "answer: got inf, wanted"),
        ({"prompt": None}, "prompt: got nothing in 'prompt', and the columns 'prompt', 'answer'"),
        ({"prompt": None, "question": "  "}, "question: got empty text"),
        ({"prompt": ["q"]}, "prompt: got ['q'], wanted text or chat"),
        ({"prompt": [{"role": "user"}]}, "prompt: message 1: content: got nothing, wanted text or"),
        ({"prompt": [*user("q"), "hi"]}, "prompt: message 2: got 'hi', wanted role and content"),
        ({"messages": user([3]), "prompt": ""}, "messages: message 1: content: got a part of type"),
        (
            {"prompt": user([{"type": "video", "video": "a.mp4"}])},
            "got a part of type 'video', wanted text or image",
        ),
        ({"prompt": [{"role": ["u"], "content": "x"}]}, "role: got ['u'], wanted one of user"),
        (
            {"prompt": [{"role": "assistant", "content": "x"}]},
            "prompt: got 0 user and 1 assistant turns, wanted one question",
        ),
        ({"rationale": 3}, "rationale: got 3, wanted text"),
        ({"image": 3}, "image: got 3, wanted a path"),
        ({"images": [None]}, "images: got nothing"),
        ({"image": {"bytes": None, "path": None}}, "image: got nothing"),
        (
            {"prompt": "<image> <image>", "image": "a.png"},
            "got 2 <image> placeholders for 1",
        ),
        ({"prompt": "<image>"}, "prompt: got 1 <image> placeholders for 0"),
        (
            {"image": base64.b64encode(b"\x89PNG" + bytes(60)).decode()[:-3] + "!!"},
            "image: got damaged base64",
        ),
        ({"image": "data:image/png;base64,@@"}, "image: got damaged base64"),
        (
            {"image": "https://x.org/a.png"},
            "image: got 'https://x.org/a.png': URLs",
        ),
        ({"image": "file://far/a.png"}, "image: got 'file://far/a.png': URLs are not fetched"),
    ],
)
def test_unusable_rows_are_named(row: dict[str, Any], message: str):
    """Each way a row can break the schema has its own message."""
    with pytest.raises(RowError) as error:
        asked(**row)
    assert str(error.value).startswith("rows.jsonl: row 12: ")
    assert message in str(error.value)


def test_a_row_of_no_columns_is_named():
    """With what it has in their place."""
    with pytest.raises(RowError, match="row 12: prompt: got no columns, wanted"):
        make({})
    with pytest.raises(RowError, match="row 12: prompt: got the columns 'answer', wanted text"):
        make({"answer": "x"})


@pytest.mark.parametrize("field", ["prompt", "answer", "rationale", "options"])
def test_lone_surrogates_are_named(field: str):
    """Half of a surrogate pair, which JSON can spell and no tokenizer takes."""
    value = ["x\udc80", "x"] if field == "options" else "x\udc80"
    with pytest.raises(RowError, match=rf"row 12: {field}: got a lone surrogate .* character 2"):
        asked(**{field: value})


def test_images_stay_compressed():
    """Relative paths start at the base folder, bytes stay as they are; none is decoded."""
    picture, path = Image.new("RGB", (2, 2)), "abcd" * 20 + "/image"
    images = ["a.png", "/else/b.png", "file:///else/c%20d.png", b"raw", path]
    images += [{"bytes": b"raw", "path": "c.png"}, {"bytes": None, "path": "d.png"}, picture]
    assert asked(images=images).images == (
        Path("/data/a.png"),
        Path("/else/b.png"),
        Path("/else/c d.png"),
        b"raw",
        # Base64's letters alone make no image.
        Path("/data") / path,
        b"raw",
        Path("/data/d.png"),
        picture,
    )


def test_blank_rationales_count_as_missing():
    """A blank rationale is none, so that the cold start does not learn empty reasoning."""
    sample = asked(rationale=" ", failed_rationale="no")
    assert sample.rationale is None
    assert sample.failed_rationale == "no"


def test_parts_become_text_and_placeholders():
    """Images stand where their parts stood, with or without what they hold."""
    parts = [
        {"type": "text", "text": "left "},
        {"type": "image", "image": "a.png"},
        {"type": "text", "text": " right "},
        {"type": "image"},
    ]
    messages = [{"role": "system", "content": "Be brief."}, *user(parts)]
    talk = read_conversation(messages, column="prompt", at="r: row 1")
    assert (talk.prompt, talk.system) == ("left <image> right <image>", "Be brief.")
    assert talk.response is None and len(talk.images) == 1


def test_empty_images_do_not_hide_those_of_the_messages():
    """As Qwen's format has them, with an images column that a merge left empty."""
    messages = user([{"type": "image", "image": "a.png"}, {"type": "text", "text": "q"}])
    assert asked(prompt=messages, images=[]).images == (Path("/data/a.png"),)


def test_an_answer_of_the_row_wins_over_the_response():
    """A response is a solution to learn; the key stands in its own column where there is one."""
    response = {"role": "assistant", "content": "<think>so</think><answer>2</answer>"}
    sample = make({"messages": [*user("q"), response], "answer": "two"})
    assert (sample.answer, sample.rationale) == ("two", "so")


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("<think>a</think><answer>b</answer>", ("a", "b")),
        ("<reasoning>a</reasoning> <answer> **Final Answer:** b </answer>", ("a", "b")),
        ("<think>a</think><answer>x</answer> no: <answer>Final answer: y</answer>", ("a", "y")),
        ("<think> </think><answer></answer>", (None, None)),
        ("<answer>b</answer>", (None, "b")),
        ("<think>a</answer>", (None, None)),
    ],
)
def test_split_response(text: str, parts: tuple[str | None, str | None]):
    """The rationale of any reasoning tag, the last answer, None for what is not there."""
    assert split_response(text) == parts


@pytest.mark.parametrize(
    ("answer", "parts"),
    [
        ("\\boxed{A}", (None, "A")),
        (" $\\boxed{\\frac{1}{2}}$ ", (None, "\\frac{1}{2}")),
        ("So the length is $\\boxed{\\frac{2}{3}}$ m.", (None, "\\frac{2}{3}")),
        ("\\boxed{1} or \\boxed{2}", (None, "\\boxed{1} or \\boxed{2}")),
        ("4 + 5 = <<4+5=9>>9 apples\n#### 9", ("4 + 5 = 9 apples", "9")),
        ("#### 1,250", (None, "1,250")),
        ("<think>so</think> <answer>Final answer: 4</answer>", ("so", "4")),
    ],
)
def test_the_final_answer_of_a_solution(answer: str, parts: tuple[str | None, str]):
    """GSM8K's `####`, one box, or tags: the key alone is compared; also in a list of one."""
    assert split_solution(answer) == parts
    sample = asked(answer=[answer])
    assert (sample.rationale, sample.answer) == parts
