"""What counts as the form asked for."""

import time

import pytest

from care_train.verifier import format_score

GOOD = "<think>so</think><answer>x</answer>"

RIGHT = [
    GOOD,
    " \n<think>\nso\n</think>\n\n<answer> x </answer>\n",
    "<think>a < b > c </b></think><answer><x></answer>",
]

WRONG = {
    "empty": "",
    "no tags": "so x",
    "no think": "<answer>x</answer>",
    "no answer": "<think>so</think>",
    "empty think": "<think> \n</think><answer>x</answer>",
    "empty answer": "<think>so</think><answer> </answer>",
    "unclosed think": "<think>so<answer>x</answer>",
    "unclosed answer": "<think>so</think><answer>x",
    "unopened think": "so</think><answer>x</answer>",
    "text before": "Sure! " + GOOD,
    "text between": "<think>so</think> hence <answer>x</answer>",
    "text after": GOOD + " done",
    "two answers": GOOD + "<answer>y</answer>",
    "two thinks": "<think>so</think>" + GOOD,
    "nested think": "<think><think>so</think></think><answer>x</answer>",
    "nested answer": "<think>so</think><answer><answer>x</answer></answer>",
    "answer inside think": "<think>so <answer>x</answer></think>",
    "answer first": "<answer>x</answer><think>so</think>",
    "overlapping": "<think>so<answer>x</think>y</answer>",
    "closing first": "</think>so<think><answer>x</answer>",
    "stray closing": "<think>so</think></think><answer>x</answer>",
    "other case": "<Think>so</Think><answer>x</answer>",
    "spaced tag": "< think>so</think><answer>x</answer>",
}


@pytest.mark.parametrize("text", RIGHT)
def test_right_form(text: str):
    """One think span, then one answer span, whitespace around them."""
    assert format_score(text) == 1.0


@pytest.mark.parametrize("text", WRONG.values(), ids=WRONG.keys())
def test_wrong_form(text: str):
    """Anything else scores 0."""
    assert format_score(text) == 0.0


def test_tags_are_settings():
    """Other tag names, even ones that hold pattern characters, are taken as they are."""
    text = "<reasoning>so</reasoning><a.b>x</a.b>"
    assert format_score(text, "reasoning", "a.b") == 1.0
    assert format_score(text, "reasoning", "aXb") == 0.0
    assert format_score(text) == 0.0


@pytest.mark.parametrize(
    "text",
    [
        "<think>" * 300_000,
        "<think>" + "<" * 2_000_000,
        "<think>" + " " * 2_000_000 + "x",
        "<think>a</think>" + " " * 2_000_000 + "<answer>",
        "<think>" + "</thin" * 300_000 + "</think><answer>x</answer> y",
        "<answer></answer>" * 100_000,
    ],
    ids=["tags", "brackets", "spaces", "gap", "near-tags", "pairs"],
)
def test_hostile_text_takes_linear_time(text: str):
    """Megabytes of near-tags are scored in a fraction of a second."""
    start = time.perf_counter()
    assert format_score(text) == 0.0
    assert time.perf_counter() - start < 1.0
