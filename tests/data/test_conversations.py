"""Chat messages, responses with tags, and references to images."""

import base64
from pathlib import Path
from typing import Any, get_args

import pytest

from care_train.config import Adapter
from care_train.data import RowError, sample_from_row
from care_train.data.building.adapters import ADAPTERS
from care_train.data.conversations import read_conversation, split_response, split_solution
from care_train.data.images import image_refs


def test_parts_become_text_and_placeholders():
    """Images stand where their parts stood, with or without what they hold."""
    messages = [
        {"role": "system", "content": "Be brief."},
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "left "},
                {"type": "image", "image": "a.png"},
                {"type": "text", "text": " right "},
                {"type": "image"},
            ],
        },
    ]
    talk = read_conversation(messages, column="prompt", at="r: row 1")
    assert (talk.prompt, talk.system, talk.response) == (
        "left <image> right <image>",
        "Be brief.",
        None,
    )
    assert len(talk.images) == 1


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        (["hi"], "message 1: got 'hi', wanted role and content"),
        ([{"role": "user"}], "message 1: content: got nothing, wanted text or a list of parts"),
        ([{"role": "user", "content": [3]}], "got a part of type 3, wanted text or image"),
        (
            [{"role": "user", "content": [{"type": "video", "video": "a.mp4"}]}],
            "got a part of type 'video', wanted text or image",
        ),
        ([{"role": "assistant", "content": "x"}], "got 0 user and 1 assistant turns"),
    ],
)
def test_other_messages_are_named(messages: list[Any], message: str):
    """Row, column, message, got and wanted."""
    with pytest.raises(RowError) as error:
        read_conversation(messages, column="messages", at="r.jsonl: row 4")
    assert str(error.value).startswith("r.jsonl: row 4: messages: ")
    assert message in str(error.value)


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
    ("answer", "inner"),
    [
        ("\\boxed{A}", "A"),
        (" $\\boxed{\\frac{1}{2}}$ ", "\\frac{1}{2}"),
        ("\\boxed{1} or \\boxed{2}", "\\boxed{1} or \\boxed{2}"),
        ("x = \\boxed{3}", "3"),
        ("12 more <<3*4=12>>12\n#### 10", "10"),
        ("#### 7", "7"),
    ],
)
def test_a_box_holds_the_answer(answer: str, inner: str):
    """Only a box around the whole answer goes."""
    assert split_solution(answer)[1] == inner


def test_damaged_base64_is_named():
    """Text that begins like an encoded image and breaks off."""
    encoded = base64.b64encode(b"\x89PNG" + bytes(60)).decode()
    for text in (encoded[:-3] + "!!", "data:image/png;base64,@@"):
        with pytest.raises(RowError, match=r"r: row 2: image: got damaged base64"):
            image_refs(text, column="image", base_dir=Path(), at="r: row 2")


def test_long_paths_are_no_base64():
    """A path of base64's letters is a path."""
    path = "abcd" * 20 + "/image"
    assert image_refs(path, column="image", base_dir=Path("/x"), at="r") == (Path("/x") / path,)


def test_an_answer_of_the_row_wins_over_the_response():
    """A response is a solution to learn; the key stands in its own column where there is one."""
    row = {
        "messages": [
            {"role": "user", "content": "q"},
            {"role": "assistant", "content": "<think>so</think><answer>2</answer>"},
        ],
        "answer": "two",
    }
    sample = sample_from_row(row, location="r: row 1", base_dir=Path(), id="1")
    assert (sample.answer, sample.rationale) == ("two", "so")


def test_adapters_are_settings():
    """The settings accept every adapter and no other."""
    assert set(get_args(Adapter)) == set(ADAPTERS)
