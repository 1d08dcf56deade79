"""Reflection-guided resampling (Sec. 3.6; Algorithm 1, lines 11-20)."""

from dataclasses import replace

import pytest
import torch

from care_train.algorithm.selection import (
    choose_reflected_negative,
    merge_reflection,
    reflection_prefix,
)
from care_train.algorithm.spans import parse_spans
from care_train.config import CareSettings, ReflectionSettings
from tests.algorithm.builders import care, make_rollout, make_subgroup, right, wrong

SETTINGS = ReflectionSettings()
CARE = CareSettings()
NEGATIVES = [wrong(verdict="a"), wrong(verdict="b"), wrong(verdict="c")]
SUBGROUP = make_subgroup(right(), NEGATIVES, reflect_on=0)
PREFIX = "<think>the sides are equal\nlook again:\n"


def prefix_of(text: str, think_tag: str = "think", answer_tag: str = "answer") -> str:
    return reflection_prefix(wrong(text=text), "look again:", think_tag, answer_tag)


def test_the_hardest_negative_reflects():
    """Line 12: the smallest d_cos; S lists its negatives nearest first."""
    assert choose_reflected_negative(3, SETTINGS) == 0


def test_a_random_negative_reflects():
    """`negative: random`: any of them, the same for the same seed."""
    settings = replace(SETTINGS, negative="random")

    def draw(seed: int) -> int | None:
        return choose_reflected_negative(3, settings, torch.Generator().manual_seed(seed))

    drawn = [draw(seed) for seed in range(30)]
    assert set(drawn) == {0, 1, 2}
    assert drawn == [draw(seed) for seed in range(30)]


def test_no_reflection_when_off():
    """Line 11."""
    assert choose_reflected_negative(3, replace(SETTINGS, enabled=False)) is None


def test_the_default_cue_is_the_papers():
    """Sec. 3.6's repair cue, word for word."""
    assert SETTINGS.cue == (
        "Your previous reasoning was incorrect. Identify the failing operation, correct it, and "
        "re-derive the necessary quantities. Keep this section concise. Do not restate the "
        "question."
    )


@pytest.mark.parametrize(
    "text",
    [
        "<think>the sides are equal</think> <answer>3</answer>",
        "<think>\n the sides are equal \n</think>\n<answer>3</answer>",
        "<think>the sides are equal<answer>3</answer>",
        "<think>the sides are equal <answer>3</answer></think>",
        "<think>the sides are equal",
        "the sides are equal <answer>3</answer>",
        "the sides are equal",
        "the sides are equal</think> <answer>3</answer>",
        "<think>the sides are equal<answer>1</answer> no <answer>2</answer>",
        "<think>the sides are equal<answer>1",
        "the sides are equal<answer>1</answer> no <answer>2</answer>",
        "<think>the sides are equal</answer> or <think>not</think>",
        "<think>the sides are equal<think></th<answer>ink>",
        "<answer>3</answer> <think>the sides are equal</think>",
    ],
)
def test_the_prompt_is_failed_rationale_and_cue_with_think_left_open(text):
    """Line 13: `<think>`, what the failure reasoned, the cue; its answer is dropped.

    Only an answer that begins after `<think>` cuts the rationale.
    """
    assert prefix_of(text) == PREFIX


def test_an_empty_rationale_leaves_the_cue():
    """A failure that only answered contributes no text."""
    assert prefix_of("<answer>3</answer>") == "<think>\nlook again:\n"


def test_the_prompt_uses_the_configured_tags():
    """Sec. 8.2: Qwen3-VL reasons in <reasoning>."""
    text = "<reasoning>the sides are equal</reasoning> <final>3</final>"
    assert prefix_of(text, "reasoning", "final") == PREFIX.replace("think", "reasoning")


def test_the_reflected_response_continues_the_open_rationale():
    """What is sampled after the prefix closes the span that the prefix opened."""
    text = prefix_of("<think>the sides are equal</think> <answer>3</answer>")
    text += "they are not</think> <answer>7</answer>"
    spans = parse_spans(text)
    assert spans.think_content is not None and spans.answer_content is not None
    assert text[slice(*spans.think_content)].endswith("look again:\nthey are not")
    assert text[slice(*spans.answer_content)] == "7"


@pytest.mark.parametrize(
    ("accuracy", "format_score", "changes", "others"),
    [
        # Lines 15-16: a success, which acc alone makes, takes its negative's place.
        (1.0, 1.0, [], "aRc"),
        (1.0, 0.0, [], "aRc"),
        # Lines 17-18: a failure joins S; in the released code it replaces its negative.
        (0.0, 1.0, [], "abcr"),
        (0.0, 1.0, ["failed_reflection=replace"], "arc"),
        # 0 < acc < 1 is neither; to the letter whatever is no success failed.
        (0.5, 1.0, [], "abc"),
        (0.5, 1.0, ["partial=literal"], "abcr"),
        # `positive: reward` reads reward > 0, for reflections as for rollouts.
        (0.0, 1.0, ["positive=reward"], "aRc"),
        (0.5, 0.0, ["positive=reward"], "aRc"),
        (0.0, 0.0, ["positive=reward"], "abcr"),
    ],
)
def test_how_a_reflection_joins_the_subgroup(accuracy, format_score, changes, others):
    """Negatives a, b, c of which b reflects; r is the reflection as a negative, R as a success."""
    reflected = make_rollout(accuracy, format_score, reflected=True, verdict="r")
    subgroup = replace(SUBGROUP, reflect_on=1)
    merged = merge_reflection(subgroup, reflected, care(*changes)).others
    assert "".join(m.rollout.verdict for m in merged) == others.lower()
    assert [not m.is_negative for m in merged] == [letter == "R" for letter in others]
    for member in merged:
        if member.rollout is reflected:
            assert (member.shaped_reward, member.index) == (reflected.reward, None)


@pytest.mark.parametrize("accuracy", [0.0, 1.0])
def test_the_anchor_stays(accuracy):
    """A reflected rollout never becomes the anchor, however short and well-formed."""
    reflected = make_rollout(accuracy, 1.0, think=0, answer=0, reflected=True)
    assert merge_reflection(SUBGROUP, reflected, CARE).anchor is SUBGROUP.anchor
