"""The verifier scores a response by its answer span alone, and mixes the two signals as Eq. 1."""

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from care_train.config import PromptSettings, RewardSettings
from care_train.data import Sample
from care_train.verifier import Score, Verifier

BLUE = Sample(id="a", prompt="what color?", answer="blue")
VERIFIER = Verifier(PromptSettings(), RewardSettings(format_weight=0.2))


@pytest.mark.parametrize(
    ("text", "accuracy", "form"),
    [
        ("<think>so</think><answer>blue</answer>", 1, 1),
        ("<think>so</think><answer>red</answer>", 0, 1),
        ("<answer>blue</answer>", 1, 0),
        ("<think>blue</think> blue", 0, 0),
        ("<think>so</think><answer>blue", 0, 0),
        ("<think>so <answer>blue</answer>", 1, 0),
        ("<think>so</think><answer>blue</answer><answer>red</answer>", 0, 0),
        ("<think>so</think><answer>red</answer><answer>blue</answer>", 1, 0),
        ("<think>so</think><answer>blue</answer><answer>re", 1, 0),
        ("blue", 0, 0),
        ("", 0, 0),
    ],
)
def test_signals(text: str, accuracy: float, form: float):
    """acc reads the last complete answer span, fmt the whole response; r = 0.8 acc + 0.2 fmt."""
    score = VERIFIER.score(text, BLUE)
    assert (score.accuracy, score.format_score) == (accuracy, form)
    assert score.reward == pytest.approx(0.8 * accuracy + 0.2 * form)


def test_cut_responses_have_no_format():
    """A response cut by the length limit has fmt 0, even if what is there looks complete."""
    text = "<think>so</think><answer>blue</answer>"
    cut = "cut by the length limit"
    assert VERIFIER.score(text, BLUE, finished=False) == Score(
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
    """The verifier reads the tags the prompt asks for."""
    verifier = Verifier(PromptSettings(think_tag="reasoning"), RewardSettings())
    text = "<reasoning>so</reasoning><answer>blue</answer>"
    assert verifier.score(text, BLUE).reward == pytest.approx(1.0)
    assert VERIFIER.score(text, BLUE).format_score == 0.0


@pytest.mark.parametrize("tags", [("answer", "answer"), ("", "answer"), ("think", "")])
def test_tags_must_differ(tags: tuple[str, str]):
    """Tags that could not be told apart are refused by their setting's name."""
    with pytest.raises(ValueError, match=r"^prompt\.think_tag, prompt\.answer_tag: got .*, wanted"):
        Verifier(PromptSettings(think_tag=tags[0], answer_tag=tags[1]), RewardSettings())


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
        "<answer>" * 300_000,
        "<answer>" * 150_000 + "</answer>" * 150_000,
        "</answer>" * 300_000,
        "<answer>" + "9" * 3_000_000 + "</answer>",
        "<think>" * 300_000 + "</answ" * 100_000,
    ],
    ids=["opening", "nested", "closing", "digits", "think"],
)
def test_hostile_responses_are_quick(text: str):
    """Megabytes of tags or digits are wrong within a second."""
    start = time.perf_counter()
    assert VERIFIER.score(text, BLUE).reward == 0.0
    assert time.perf_counter() - start < 1.0
