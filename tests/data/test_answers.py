"""A row's key and options, in the forms that data sets have, or an error that names them; and cases
from public reports, which lie beside the repository: each was read wrongly once."""

import io
import json
from pathlib import Path
from typing import Any

import pytest

from care_train.config import Config, DataSettings
from care_train.data import RowError, Sample, load_samples, sample_from_row
from care_train.data.answers import AnswerType, option_key, options_in, read_options
from care_train.verifier.command import verify_lines
from care_train.verifier.responses import item_of
from care_train.verifier.verify import verify_in_process

BIRDS = ("owl", "crow", "wren")


def make(**columns: Any) -> Sample:
    row = {"prompt": "q", "answer": "B"} | columns
    return sample_from_row(row, location="r.jsonl: row 3", base_dir=Path(), id="r/3")


@pytest.mark.parametrize(
    "options",
    [
        ["owl", "crow", "wren"],
        ["A. owl", "B. crow", "C. wren"],
        ["(a) owl", "(b) crow", "(c) wren"],
        ["[A] owl", "[B] crow", "[C] wren"],
        ["\uff08A\uff09owl", "\uff08B\uff09crow", "\uff08C\uff09wren"],
        ["A\uff1aowl", "B\uff1acrow", "C\uff1awren"],
        ["1. owl", "2. crow", "3. wren"],
        {"A": "owl", "B": "crow", "C": "wren"},
        {"C": "wren", "A": "owl", "B": "crow", "D": None},
        {"0": "owl", "1": "crow", "2": "wren"},
        {"text": ["owl", "crow", "wren"], "label": ["A", "B", "C"]},
        {"label": ["1", "2", "3"], "text": ["owl", "crow", "wren"]},
        [
            {"label": "A", "text": "owl"},
            {"label": "B", "text": "crow"},
            {"key": "C", "value": "wren"},
        ],
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
    sample = make(options=options)
    assert sample.options == BIRDS
    for said, right in (("B", 1), ("(B) crow", 1), ("crow", 1), ("owl", 0), ("A", 0)):
        verdict = verify_in_process(item_of(said, sample))
        assert verdict is not None and verdict.accuracy == right, said


@pytest.mark.parametrize(
    ("options", "texts"),
    [
        (["A. x", "C. y"], ("A. x", "C. y")),
        (["A", "B"], ("A", "B")),
        ([1.5, True, 3], ("1.5", "True", "3")),
        (["1.5 m", "2.5 m"], ("1.5 m", "2.5 m")),
        (["x", "x"], ("x", "x")),
    ],
)
def test_only_marks_of_their_own_place_are_taken_off(options: Any, texts: tuple[str, ...]):
    """A letter or number that is not the option's own place belongs to its text."""
    assert read_options(options).texts == texts


@pytest.mark.parametrize(
    ("options", "answer", "key"),
    [
        ({"0": "owl", "1": "crow"}, "1", "B"),
        ({"1": "owl", "2": "crow"}, 2, "B"),
        ({"label": ["1", "2"], "text": ["2", "1"]}, "2", "B"),
        (["3", "5"], 5, "5"),
        (["True", "False"], False, "False"),
        (["yes", "no"], False, "no"),
        (["owl", "crow"], "b) CROW", "b) CROW"),
        (["owl", "crow"], "\\boxed{B}", "B"),
        (["owl", "crow"], "Option B", "Option B"),
        (["$\\frac{1}{2}$", "0.25"], "1/2", "1/2"),
        (["$3\\text{ cm}$", "4 cm"], "3 cm", "3 cm"),
        (["owl", "crow", "wren"], "A and C", "A and C"),
        (["owl", "owl", "wren"], "owl", "owl"),
    ],
)
def test_keys_that_name_an_option(options: Any, answer: Any, key: str):
    """By letter, text, both, several letters, or a label that the options carry."""
    assert make(options=options, answer=answer).answer == key


@pytest.mark.parametrize("answer", [1, "1", "E", "heron", "B. owl", "A. crow"])
def test_a_key_that_is_no_option_is_refused(answer: Any):
    """An index without labels, a letter or text beyond them, a letter with another's text."""
    with pytest.raises(RowError, match=r"^r\.jsonl: row 3: answer: got .*none of the 3 texts"):
        make(choices=list(BIRDS), answer=answer)


def test_a_type_of_its_own_lifts_the_check():
    """A row that says how its key is compared may have options that do not hold it."""
    assert make(options=["1", "2"], answer="7", answer_type="number").answer == "7"


def test_options_of_a_prompt_need_not_hold_the_key():
    """Options that are only read out of the prompt are taken where the key is one of them."""
    prompt = "Which?\nA. owl\nB. crow"
    assert make(prompt=prompt).options == ("owl", "crow")
    assert make(prompt=prompt, answer="7").options == ()
    assert make(prompt=prompt, answer="7", answer_type="number").options == ()


@pytest.mark.parametrize(
    ("prompt", "options"),
    [
        ("Which?\nA. red\nB. dark blue", ("red", "dark blue")),
        ("Which? (A) red (B) blue", ("red", "blue")),
        ("Choices: A: 80 B: 60 C: 50", ("80", "60", "50")),
        ("A. Smith met B. Jones", ()),
        ("Is A? or B? longer", ()),
        ("B. red\nC. blue", ()),
    ],
)
def test_options_of_prompts(prompt: str, options: tuple[str, ...]):
    """Options on lines of their own, in brackets, or three in a row; not initials."""
    assert options_in(prompt).texts == options


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"options": 3}, "options: got 3, wanted a list of the options' texts"),
        ({"options": "owl or crow"}, "options: got 'owl or crow', wanted a list"),
        ({"choices": [["a"], ["b"]]}, "choices: got an option that is ['a'], wanted text"),
        ({"options": {"A": "x", "C": "y"}}, "options: got options labelled A, C, wanted A, B, ..."),
        ({"options": {"text": ["a"], "label": []}}, "options: got 1 texts and 0 labels, wanted as"),
        ({"options": [{"name": "a"}]}, "options: got an option with name, wanted label and text"),
        ({"options": list("abcdefghijklmnopqrstuvwxyzz")}, "got 27 options, wanted at most 26"),
        ({"answer_type": "numeric"}, "answer_type: got 'numeric', wanted one of choice, number"),
        ({"answer_type": 3}, "answer_type: got 3, wanted one of choice"),
        ({"tolerance": "0.05"}, "tolerance: got '0.05', wanted a number in [0, 1)"),
        ({"tolerance": 5}, "tolerance: got 5, wanted a number in [0, 1)"),
        ({"tolerance": True}, "tolerance: got True, wanted a number in [0, 1)"),
    ],
)
def test_wrong_types_are_named(columns: dict[str, Any], message: str):
    """Options, answer_type and tolerance of another type: row, field, got and wanted."""
    with pytest.raises(RowError) as error:
        make(**columns)
    assert str(error.value).startswith("r.jsonl: row 3: ")
    assert message in str(error.value)


@pytest.mark.parametrize("nothing", [None, "", "  ", [], [None], {}, float("nan")], ids=repr)
@pytest.mark.parametrize(
    ("empty", "filled", "read"),
    [
        ("prompt", {"problem": "why?"}, lambda s: s.prompt == "why?"),
        ("answer", {"solution": "5"}, lambda s: s.answer == "5"),
        ("answer", {"reward_model": {"ground_truth": "5"}}, lambda s: s.answer == "5"),
        ("answer", {"response": "<answer>5</answer>"}, lambda s: s.answer == "5"),
        ("images", {"image": "a.png"}, lambda s: s.images == (Path("a.png"),)),
        ("options", {"choices": ["A", "B"]}, lambda s: s.options == ("A", "B")),
    ],
)
def test_nothing_hides_no_other_column(empty: str, filled: dict, read: Any, nothing: Any):
    """Merged sources have columns that hold nothing beside the one that holds the value."""
    assert read(make(**{empty: nothing}, **filled))


def test_choices_beyond_letters_are_no_key():
    """`option_key` tells by the options' number which letters there are."""
    options = read_options(["x", "y"])
    assert option_key("B", options) == "B"
    assert option_key("C", options) is None
    assert make(options=["x", "y"]).answer_type is None
    assert make(answer_type="choice").answer_type is AnswerType.CHOICE


CASES = Path(__file__).parents[3] / "shared" / "cases" / "inputs"
needs_cases = pytest.mark.skipif(not CASES.is_dir(), reason="the cases are not here")


def verdicts(case: str) -> list[float]:
    [path] = CASES.glob(f"{case}-*/in.jsonl")
    target = io.StringIO()
    verify_lines(Config(), io.StringIO(path.read_text()), target)
    return [json.loads(line)["acc"] for line in target.getvalue().splitlines()]


@needs_cases
def test_options_with_letters():
    """All four forms of the right answer are right."""
    assert set(verdicts("03")) == {1.0}


@needs_cases
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("07-*/rows.jsonl", "row 38: answer_type: got 'numeric', wanted one of"),
        ("17-*/1.jsonl", "the columns 'query', 'response', wanted"),
        ("17-*/2.jsonl", "the columns 'prompt', 'label', wanted"),
        ("17-*/3.jsonl", "with an <answer> span"),
        ("17-*/4.jsonl", "prompt: got nothing in 'prompt', and the columns"),
    ],
)
def test_bad_rows_are_named_before_the_first_step(name: str, message: str):
    """With the columns there are, and the names that are read."""
    [path] = CASES.glob(name)
    with pytest.raises(ValueError) as error:
        load_samples(DataSettings(path=str(path)))
    assert message in str(error.value)


@needs_cases
def test_an_index_into_options():
    """An index into the options' list is refused."""
    with pytest.raises(ValueError, match="none of the 4 texts in options"):
        verdicts("05")
