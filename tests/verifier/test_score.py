"""acc reads the answer span alone, fmt the whole response, and Eq. 1 mixes the two."""

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from care_train.config import PromptSettings, RewardSettings
from care_train.data import Sample
from care_train.verifier import Score, Verifier, format_score

GOOD = "<think>so</think><answer>blue</answer>"
BLUE = Sample(id="a", prompt="what color?", answer="blue")
VERIFIER = Verifier(PromptSettings(), RewardSettings(format_weight=0.2))


@pytest.mark.parametrize(
    ("text", "accuracy", "form"),
    [
        (GOOD, 1, 1),
        (" \n<think>\nso\n</think>\n\n<answer> blue </answer>\n", 1, 1),
        ("<think>a < b > c </b></think><answer><x></answer>", 0, 1),
        ("", 0, 0),
        ("blue", 0, 0),
        ("<answer>blue</answer>", 1, 0),
        ("<think> \n</think><answer>blue</answer>", 1, 0),
        ("<think>so</think><answer> </answer>", 0, 0),
        ("<think>so<answer>blue</answer>", 1, 0),
        ("<think>so</think><answer>blue", 0, 0),
        ("<think>so</think> hence <answer>blue</answer>", 1, 0),
        (GOOD + " done", 1, 0),
        ("<think>so</think><answer>red</answer><answer>blue</answer>", 1, 0),
        ("<think>so</think>" + GOOD, 1, 0),
        ("<think>so</think><answer><answer>blue</answer></answer>", 1, 0),
        ("<think>so <answer>blue</answer></think>", 1, 0),
        ("<answer>blue</answer><think>so</think>", 1, 0),
        ("<think>so<answer>blue</think>y</answer>", 0, 0),
        ("<think>so</think></think><answer>blue</answer>", 1, 0),
        ("<Think>so</Think><answer>blue</answer>", 1, 0),
    ],
)
def test_signals(text: str, accuracy: float, form: float):
    """acc of the last complete answer span; fmt of one think and one answer span with nothing
    around them; r = 0.8 acc + 0.2 fmt."""
    score = VERIFIER.score(text, BLUE)
    assert (score.accuracy, score.format_score, format_score(text)) == (accuracy, form, form)
    assert score.reward == pytest.approx(0.8 * accuracy + 0.2 * form)


def test_cut_responses_have_no_format():
    """A response cut by the length limit has fmt 0, even if what is there looks complete."""
    cut = "cut by the length limit"
    assert VERIFIER.score(GOOD, BLUE, finished=False) == Score(
        1.0, 0.0, 0.8, "exact match", cut, 1.0, (("verifier", 1.0),)
    )
    reason = VERIFIER.score("<think>so", BLUE, finished=False).reason
    assert reason == "no complete <answer> span: cut by the length limit"


def test_reasons():
    """The reason tells a missing span from a wrong answer."""
    assert VERIFIER.score("blue", BLUE).reason == "no complete <answer> span"
    assert VERIFIER.score("<answer>red</answer>", BLUE).reason == "got 'red', wanted 'blue'"
    assert VERIFIER.score("<answer> </answer>", BLUE).reason == "empty answer"


def test_tags_are_settings():
    """Other tag names, even ones that hold pattern characters, are taken as they are."""
    verifier = Verifier(PromptSettings(tags=["reasoning", "a.b"]), RewardSettings())
    text = "<reasoning>so</reasoning><a.b>blue</a.b>"
    assert verifier.score(text, BLUE).reward == pytest.approx(1.0)
    assert format_score(text, "reasoning", "aXb") == format_score(text) == 0.0


@given(
    st.lists(st.sampled_from(["<think>", "</think>", "<answer>", "</answer>", "blue", " ", "5%"])),
    st.booleans(),
)
def test_any_response_gets_a_bounded_score(pieces: list[str], finished: bool):
    """No arrangement of tags raises, and every signal stays in [0, 1]."""
    score = VERIFIER.score("".join(pieces), BLUE, finished)
    for signal in (score.accuracy, score.format_score, score.reward):
        assert 0.0 <= signal <= 1.0


@pytest.mark.parametrize(
    "text",
    [
        "<think>" * 300_000 + "</answ" * 100_000,
        "<think>" + "<" * 2_000_000,
        "<think>" + " " * 2_000_000 + "x",
        "<think>a</think>" + " " * 2_000_000 + "<answer>",
        "<think>" + "</thin" * 300_000 + "</think><answer>x</answer> y",
        "<answer></answer>" * 100_000,
        "<answer>" * 150_000 + "</answer>" * 150_000,
        "</answer>" * 300_000,
        "<answer>" + "9" * 3_000_000 + "</answer>",
    ],
    ids="think brackets spaces gap near pairs nested closing digits".split(),
)
def test_hostile_responses_take_linear_time(text: str):
    """Megabytes of tags, spaces or digits are wrong within a second."""
    start = time.perf_counter()
    assert VERIFIER.score(text, BLUE).reward == 0.0
    assert time.perf_counter() - start < 1.0
