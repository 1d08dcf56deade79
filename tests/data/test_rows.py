"""Rows, in the forms that data sets have, become samples, or an error that names row and field."""

import base64
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from care_train.data import RowError, Sample, sample_from_row
from care_train.data.answers import AnswerType
from care_train.data.options import options_in, read_options
from care_train.verifier.responses import item_of
from care_train.verifier.verify import verify_in_process

PARTS = [{"type": "image", "image": "a.png"}, {"type": "text", "text": "q"}]
RESPONSE = {"role": "assistant", "content": "<think>so</think><answer>2</answer>"}
COMPLETION = [RESPONSE | {"content": [{"type": "text", "text": RESPONSE["content"]}]}]
SYSTEM, IMAGE = {"role": "system", "content": "Be brief."}, {"type": "image"}
WHICH = "Which?\nA. owl\nB. crow"
PIXELS = base64.b64encode(b"\x89PNG" + bytes(60)).decode()
BOX, GOAL = [1, 2, 3, 4], {"target": ["x"]}
DAMAGED = PIXELS[:-3] + "!!"


def sample(row: dict[str, Any]) -> Sample:
    return sample_from_row(row, location="r.jsonl: row 3", base_dir=Path("/data"), id="r/3")


def make(**columns: Any) -> Sample:
    """A plain row with these columns added; None takes one away."""
    row = {"prompt": "q", "answer": "x"} | columns
    return sample({name: value for name, value in row.items() if value is not None})


def user(content: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": content}]


@pytest.mark.parametrize(
    ("columns", "read"),
    [
        ({"prompt": None, "problem": "why?", "level": 3}, {"prompt": "why?"}),
        ({"prompt": None, "question": "why?"}, {"prompt": "why?"}),
        ({"prompt": None, "query": "why?", "level": 3}, {"columns": {"level": 3}}),
        # Text, numbers (without exponents) and booleans are answers.
        ({"answer": -2}, {"answer": "-2"}),
        ({"answer": 1e-07}, {"answer": "0.0000001"}),
        ({"answer": True}, {"answer": "yes"}),
        ({"answer": False}, {"answer": "no"}),
        # As `DataFrame.to_dict` gives what Parquet holds.
        ({"answer": np.float32(0.5)}, {"answer": "0.5"}),
        ({"answer": None, "reward_model": {"ground_truth": np.array(["5"])}}, {"answer": "5"}),
        ({"answer_type": math.nan, "tolerance": math.nan}, {"answer_type": None}),
        ({"image": math.nan, "image_path": np.nan}, {"images": ()}),
        # A file's name where text is read is text.
        ({"answer": None, "solution": "plot.png"}, {"answer": "plot.png", "images": ()}),
        ({"choices": ["so.gif", "no.gif"], "answer": "B"}, {"options": ("so.gif", "no.gif")}),
        ({"options": ["owl", "crow", math.nan], "answer": "B"}, {"options": ("owl", "crow")}),
        ({"image": "a.png", "image_path": "a.png"}, {"images": (Path("/data/a.png"),)}),
        ({"images": np.array(["a.png"])}, {"images": (Path("/data/a.png"),)}),
        ({"prompt": np.array([*user("why?")])}, {"prompt": "why?", "is_conversation": True}),
        # The key alone of a solution: GSM8K's `####`, one box, or the last answer's tags.
        ({"answer": " $\\boxed{\\frac{1}{2}}$ "}, {"answer": "\\frac{1}{2}", "rationale": None}),
        ({"answer": ["It is $\\boxed{A}$ m."]}, {"answer": "A"}),
        ({"answer": "\\boxed{1} or \\boxed{2}"}, {"answer": "\\boxed{1} or \\boxed{2}"}),
        ({"answer": "4 + 5 = <<4+5=9>>9\n#### 9"}, {"answer": "9", "rationale": "4 + 5 = 9"}),
        # verl's key of one as JSON; MMMU's and VQA's lists of several, any of which is right.
        ({"answer": '["\\\\frac{1}{2}"]'}, {"answer": "\\frac{1}{2}"}),
        ({"answer": "['1', '2']"}, {"answer": "['1', '2']", "right_answer": "1"}),
        ({"answer": ["1", "2"]}, {"answer": '["1", "2"]', "answer_type": None}),
        ({"answer": ["1", "2"], "answer_type": "set"}, {"answer": "1, 2"}),
        ({"answer": "['a', 'b']", "answer_type": "list"}, {"answer": "a, b"}),
        (
            {"answer": ["$1,200", "(1,200)", "-5", "2,50"], "answer_type": "list"},
            {"answer": "$1200, (1,200), -5, 2,50"},
        ),
        # What only a reward function reads: boxes, objects, a solution without one marked answer.
        *(
            ({"answer": key}, {"answer": text, "answer_type": "function", "key": stands})
            for key, text, stands in (
                (BOX, "[1, 2, 3, 4]", BOX),
                (GOAL, '{"target": ["x"]}', GOAL),
                ('[{"box": 1}]', '[{"box": 1}]', None),
            )
        ),
        (
            {"answer": None, "reward_model": '{"ground_truth": {"box": 1}}'},
            {"answer": '{"box": 1}', "answer_type": "function"},
        ),
        ({"answer": None, "solution": "so " * 101}, {"answer_type": "function"}),
        ({"answer": ["A", "C"]}, {"answer": '["A", "C"]', "answer_type": "function"}),
        ({"choices": ["x", "y"], "answer": "['x', 'y']"}, {"answer_type": "function"}),
        ({"answer": None, "final_answer": "2", "r1_solution_1": "so"}, {"answer": "2"}),
        (
            {"answer": None, "solution": "\\boxed{5}", "expected_answer": "n/a"},
            {"answer": "5"},
        ),
        # A row's own type stands.
        ({"answer": '{"box": 1}', "answer_type": "text"}, {"answer_type": "text"}),
        ({"answer": ["A", "C"], "answer_type": "choice"}, {"answer_type": "choice"}),
        # Another data set's own words.
        ({"answer_type": "Float"}, {"answer_type": None}),
        (
            {"options": ["owl", "crow"], "answer": "crow", "answer_type": "text"},
            {"answer_type": None},
        ),
        # VLMEvalKit's tables have a column for each option, SEED-Bench names it.
        ({"A": "owl", "B": 2, "C": math.nan, "answer": "B"}, {"options": ("owl", "2")}),
        ({"choice_a": "owl", "choice_b": "crow", "answer": "a"}, {"options": ("owl", "crow")}),
        # LMM-R1's messages are JSON text.
        (
            {"prompt": None, "message": json.dumps(user(PARTS))},
            {"prompt": "<image>q", "images": (Path("/data/a.png"),)},
        ),
        ({"prompt": None, "message": "hi", "messages": user("why?")}, {"prompt": "why?"}),
        *(({"prompt": text}, {"prompt": text}) for text in ('{"a": 1}', '["pear", "apple"]')),
        # A file's name in a column of another kind is what the text is about.
        ({"source": "scan_1.png", "task": "Draw it into out.png"}, {"images": ()}),
        ({"sound": b"RIFF\0\0\0\0WAVEfmt "}, {"images": ()}),
        ({"answer": "#### 1,250"}, {"answer": "1,250", "rationale": None}),
        (
            {"answer": "<reasoning>so</reasoning> <answer> **Final Answer:** 4 </answer>"},
            {"answer": "4", "rationale": "so"},
        ),
        ({"answer": "<answer>x</answer> no: <answer>Final answer: y</answer>"}, {"answer": "y"}),
        # A response is a solution to learn; the key is that of a column of its own.
        ({"prompt": None, "messages": [*user("q"), RESPONSE], "answer": None}, {"answer": "2"}),
        (
            {"prompt": None, "messages": [*user("q"), RESPONSE], "answer": "two"},
            {"answer": "two", "rationale": "so"},
        ),
        # TRL's, whose content may be parts; what is no message has no response.
        ({"completion": COMPLETION, "answer": None}, {"answer": "2", "rationale": "so"}),
        ({"completion": [RESPONSE, "hi"]}, {"answer": "x", "rationale": None}),
        # The cold start must not learn empty reasoning.
        ({"rationale": " ", "failed_rationale": "no"}, {"rationale": None}),
        ({"failed_rationale": "no"}, {"failed_rationale": "no"}),
        # Qwen's format, with an images column that a merge of data sets left empty.
        ({"prompt": user(PARTS), "images": []}, {"images": (Path("/data/a.png"),)}),
        # Images stand where their parts stood, without what they hold too.
        (
            {"prompt": [SYSTEM, *user([PARTS[1], IMAGE, PARTS[1], IMAGE])], "image": ["a.png"] * 2},
            {"prompt": "q<image>q<image>", "columns": {"system": "Be brief."}},
        ),
        # transformers' own parts.
        (
            {"prompt": user([{"type": "image", "base64": PIXELS}])},
            {"images": (base64.b64decode(PIXELS),), "prompt": "<image>"},
        ),
        ({"answer_type": "choice"}, {"answer_type": AnswerType.CHOICE}),
        ({"tolerance": 0.1}, {"tolerance": 0.1}),
        # Its own type says that the key need not be an option.
        ({"options": ["1", "2"], "answer": "7", "answer_type": "number"}, {"answer": "7"}),
        # Options that are read out of the prompt count where the key is one of them.
        ({"prompt": WHICH, "answer": "B"}, {"options": ("owl", "crow")}),
        ({"prompt": WHICH, "answer": "7"}, {"options": ()}),
        ({"prompt": WHICH, "answer": "7", "answer_type": "number"}, {"options": ()}),
        # A key names an option by letter, text, both, several letters, or the option's label.
        ({"options": {"0": "owl", "1": "crow"}, "answer": "1"}, {"answer": "B"}),
        ({"options": {"1": "owl", "2": "crow"}, "answer": 2}, {"answer": "B"}),
        ({"options": {"label": ["1", "2"], "text": ["2", "1"]}, "answer": "2"}, {"answer": "B"}),
        ({"options": ["3", "5"], "answer": 5}, {"answer": "5"}),
        ({"options": ["True", "False"], "answer": False}, {"answer": "False"}),
        ({"options": ["yes", "no"], "answer": False}, {"answer": "no"}),
        ({"options": ["owl", "crow"], "answer": "b) CROW"}, {"answer": "b) CROW"}),
        ({"options": ["owl", "crow"], "answer": "\\boxed{B}"}, {"answer": "B"}),
        ({"options": ["owl", "crow"], "answer": "Option B"}, {"answer": "Option B"}),
        ({"options": ["$\\frac{1}{2}$", "0.2"], "answer": "1/2"}, {"answer": "1/2"}),
        ({"options": ["$3\\text{ cm}$", "4 cm"], "answer": "3 cm"}, {"answer": "3 cm"}),
        ({"options": ["owl", "crow", "wren"], "answer": "A and C"}, {"answer": "A and C"}),
        ({"options": ["owl", "owl"], "answer": "owl"}, {"answer": "owl"}),
    ],
    ids=str,
)
def test_what_is_read_of_a_row(columns: dict[str, Any], read: dict[str, Any]):
    """Prompt, key, rationale, images and options, from any of their usual columns."""
    found = make(**columns)
    assert {name: getattr(found, name) for name in read} == read


@pytest.mark.parametrize(
    ("changes", "reason", "message"),
    [
        ({"answer": b"x"}, "answer_type", "answer: got b'x', wanted text, a number or a boolean"),
        ({"answer": float("inf")}, "answer_type", "answer: got inf, wanted a finite number"),
        ({"answer": ""}, "empty_answer", "answer: got empty text, wanted text, a number"),
        ({"answer": float("nan")}, "empty_answer", "answer: got nothing in 'answer', and the"),
        ({"answer": None, "label": "3"}, "empty_answer", "got the columns 'prompt', 'label',"),
        ({"answer": None, "response": "3"}, "empty_answer", "with an <answer> span"),
        ({"answer": None, "response": "<answer> </answer>"}, "empty_answer", "answer: got"),
        ({"answer": None, "response": "<think>3</answer>"}, "empty_answer", "answer: got"),
        ({"prompt": None, "text": "q"}, "no_prompt", "got the columns 'answer', 'text', wanted"),
        ({"prompt": " "}, "empty_prompt", "prompt: got empty text, wanted some"),
        ({"prompt": 3}, "prompt_type", "prompt: got 3, wanted text or chat messages"),
        ({"prompt": ["q"]}, "prompt_type", "prompt: got ['q'], wanted text or chat messages"),
        ({"prompt": [{"role": "user"}]}, "message", "prompt: message 1: content: got nothing"),
        ({"prompt": [*user("q"), "hi"]}, "message", "message 2: got 'hi', wanted role and content"),
        ({"prompt": "", "messages": user([3])}, "message", "messages: message 1: content: got a"),
        ({"prompt": user([{"type": "video"}])}, "message", "a part of type 'video', wanted text"),
        ({"prompt": [{"role": ["u"], "content": "x"}]}, "message", "role: got ['u'], wanted"),
        ({"prompt": [RESPONSE]}, "several_turns", "got 0 user and 1 assistant turns, wanted one"),
        ({"prompt": user("q") * 2}, "several_turns", "got 2 user and 0 assistant turns"),
        ({"rationale": 3}, "text_type", "rationale: got 3, wanted text"),
        ({"image": 3}, "image_type", "image: got 3, wanted a path"),
        ({"images": [None]}, "image_type", "images: got nothing"),
        ({"image": {"bytes": None, "path": None}}, "image_type", "image: got nothing"),
        ({"image": DAMAGED}, "image_unreadable", "image: got damaged base64"),
        ({"image": "data:image/png;base64,@@"}, "image_unreadable", "image: got damaged base64"),
        # As MMMU, VQA exports and the datasets library name them: unread they would be unseen.
        *(
            ({column: image}, "image_column", f"{column}: got an image or video in a row")
            for column, image in (
                ("image_1", {"bytes": b"\x89PNG", "path": None}),
                ("image_path", "pictures/1.JPG"),
                ("videos", ["clips/1.mp4"]),
                *((name, "a.png") for name in ("chart", "plots", "page", "scan", "thumbnail")),
                ("extra_info", {"image": "a.png", "index": 3}),
                ("picture", b"\x89PNG\r\n"),
                ("x", "UklGRiQAAABXRUJQVlA4IBgAAAAwAQCdASo="),
                ("img", ["data:image/png;base64,iVBORw0KGgo="]),
            )
        ),
        ({"image": "https://x.org/a.png"}, "image_url", "got 'https://x.org/a.png': URLs are not"),
        ({"image": "file://far/a.png"}, "image_url", "got 'file://far/a.png': URLs are"),
        ({"prompt": "<image>"}, "placeholders", "prompt: got 1 <image> placeholders for 0"),
        ({"prompt": "<image> <image>", "image": "a.png"}, "placeholders", "got 2 <image>"),
        ({"prompt": "x\udc80"}, "not_unicode", "prompt: got a lone surrogate '\\udc80' at"),
        ({"answer": "x\udc80"}, "not_unicode", "answer: got a lone surrogate"),
        ({"options": ["x\udc80", "x"]}, "not_unicode", "options: got a lone surrogate"),
        ({"options": 3}, "options", "options: got 3, wanted a list of the options' texts"),
        ({"options": "owl or crow"}, "options", "options: got 'owl or crow', wanted a list"),
        ({"choices": [["a"], ["b"]]}, "options", "choices: got an option that is ['a'], wanted"),
        ({"options": ["owl", math.nan, "crow"]}, "options", "got an option that is nothing"),
        ({"options": {"A": "x", "C": "y"}}, "options", "labelled A, C, wanted A, B, ..."),
        ({"options": {"text": ["a"], "label": []}}, "options", "got 1 texts and 0 labels, wanted"),
        ({"options": [{"name": "a"}]}, "options", "got an option with name, wanted label and text"),
        ({"options": ["a"] * 27}, "options", "options: got 27 options, wanted at most 26"),
        ({"answer_type": 3}, "answer_type", "answer_type: got 3, wanted one of choice"),
        ({"tolerance": "0.05"}, "tolerance", "tolerance: got '0.05', wanted a number in [0, 1)"),
        ({"tolerance": 1}, "tolerance", "tolerance: got 1, wanted a number in [0, 1)"),
        ({"tolerance": True}, "tolerance", "tolerance: got True, wanted a number in [0, 1)"),
        # An index without labels, a letter or text beyond them, a letter with another's text.
        *(
            ({"choices": ["owl", "crow"], "answer": key}, "key_is_no_option", "none of the 2 texts")
            for key in (1, "1", "C", "A and C", "heron", "B. owl")
        ),
    ],
    ids=str,
)
def test_unusable_rows_are_named(changes: dict[str, Any], reason: str, message: str):
    """Each way in which a row can break the schema: row, field, what it got and wanted."""
    with pytest.raises(RowError) as error:
        make(**changes)
    assert str(error.value).startswith("r.jsonl: row 3: ")
    assert message in str(error.value) and error.value.reason == reason


def test_columns_that_hold_nothing_are_told_from_those_that_are_missing():
    """A row of no columns, and one whose column is there but empty."""
    with pytest.raises(RowError, match="row 3: prompt: got no columns, wanted"):
        sample({})
    with pytest.raises(RowError, match="prompt: got nothing in 'prompt', and the columns"):
        sample({"prompt": None, "answer": "x"})


@pytest.mark.parametrize(
    ("empty", "filled", "read"),
    [
        ("prompt", {"problem": "why?"}, lambda s: s.prompt == "why?"),
        ("answer", {"solution": "5"}, lambda s: s.answer == "5"),
        ("answer", {"reward_model": {"ground_truth": "5"}}, lambda s: s.answer == "5"),
        ("answer", {"response": "<answer>5</answer>"}, lambda s: s.answer == "5"),
        ("images", {"image": "a.png"}, lambda s: s.images == (Path("/data/a.png"),)),
        ("options", {"choices": ["x", "y"]}, lambda s: s.options == ("x", "y")),
    ],
)
def test_nothing_hides_no_other_column(empty: str, filled: dict, read: Any):
    """Merged sources have columns that hold nothing beside the one that holds the value."""
    for nothing in ("", "  ", [], [None], {}, float("nan")):
        assert read(make(**{empty: nothing}, **filled)), nothing
    assert read(sample({"prompt": "q", "answer": "x", empty: None} | filled))


def test_images_stay_compressed():
    """Relative paths start at the base folder, bytes stay as they are; none is decoded."""
    picture, path = Image.new("RGB", (2, 2)), "abcd" * 20 + "/image"
    images = ["a.png", "/else/b.png", "file:///else/c%20d.png", b"raw", path]
    images += [{"bytes": b"raw", "path": "c.png"}, {"bytes": None, "path": "d.png"}, picture]
    paths = [Path(name) for name in ("/data/a.png", "/else/b.png", "/else/c d.png", "/data/d.png")]
    # Base64's letters alone make no image.
    wanted = (*paths[:3], b"raw", Path("/data") / path, b"raw", paths[3], picture)
    assert make(images=images).images == wanted


BIRDS = ("owl", "crow", "wren")


@pytest.mark.parametrize(
    "options",
    [
        list(BIRDS),
        ["A. owl", "B. crow", "C. wren"],
        ["(a) owl", "(b) crow", "(c) wren"],
        ["\uff08A\uff09owl", "\uff08B\uff09crow", "\uff08C\uff09wren"],
        ["A\uff1aowl", "B\uff1acrow", "C\uff1awren"],
        ["1. owl", "2. crow", "3. wren"],
        {"C": "wren", "A": "owl", "B": "crow", "D": None},
        {"0": "owl", "1": "crow", "2": "wren"},
        {"text": ["owl", "crow", "wren"], "label": ["A", "B", "C"]},
        {"label": ["1", "2", "3"], "text": ["owl", "crow", "wren"]},
        [{"label": "A", "text": "owl"}, {"key": "B", "value": "crow"}, {"id": "C", "text": "wren"}],
        [["owl", "crow", "wren"]],
        ["owl", "crow", "wren", None, None],
        "['owl', 'crow', 'wren']",
        '["owl", "crow", "wren"]',
        "{'A': 'owl', 'B': 'crow', 'C': 'wren'}",
        "A. owl\nB. crow\nC. wren",
    ],
    ids=str,
)
def test_options_in_every_form(options: Any):
    """Whatever the form, the letter, the text and both together name the second option."""
    asked = make(options=options, answer="B")
    assert asked.options == BIRDS
    for said, right in (("B", 1), ("(B) crow", 1), ("B. crow", 1), ("crow", 1), ("owl", 0)):
        verdict = verify_in_process(item_of(said, asked))
        assert verdict is not None and verdict.accuracy == right, said


@pytest.mark.parametrize(
    ("options", "texts"),
    [
        (["A. x", "C. y"], ("A. x", "C. y")),
        (["A", "B"], ("A", "B")),
        ([1.5, True, 3], ("1.5", "True", "3")),
        (["1.5 m", "2.5 m"], ("1.5 m", "2.5 m")),
    ],
)
def test_only_marks_of_their_own_place_are_taken_off(options: Any, texts: tuple[str, ...]):
    """A letter or number that is not the option's own place belongs to its text."""
    assert read_options(options).texts == texts


@pytest.mark.parametrize(
    ("prompt", "options"),
    [
        ("Which?\nA. red\nB. dark blue", ("red", "dark blue")),
        ("Which? (A) red (B) blue", ("red", "blue")),
        ("Choices: A: 80 B: 60 C: 50", ("80", "60", "50")),
        ("Which of (a) iron, (b) steel?", ("iron,", "steel?")),
        ("(A)red (B)blue", ("red", "blue")),
        ("A\uff0e30\u00b0 B\uff0e45\u00b0 C\uff0e60\u00b0", ("30\u00b0", "45\u00b0", "60\u00b0")),
        ("f(a) is (A) or (b)", ()),
        ("A. Smith met B. Jones", ()),
        ("Is A? or B? longer", ()),
        ("B. red\nC. blue", ()),
    ],
)
def test_options_of_prompts(prompt: str, options: tuple[str, ...]):
    """Only those that are plain to see."""
    assert options_in(prompt).texts == options
