"""Reflection-guided resampling (Sec. 3.6; Algorithm 1, lines 11-20)."""

from dataclasses import replace

import pytest
import torch

from care_train.algorithm.reflection import (
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
    assert choose_reflected_negative(SUBGROUP, SETTINGS) == 0


def test_a_random_negative_reflects():
    """`negative: random`: any of them, the same for the same seed."""
    settings = replace(SETTINGS, negative="random")

    def draw(seed: int) -> int | None:
        return choose_reflected_negative(SUBGROUP, settings, torch.Generator().manual_seed(seed))

    drawn = [draw(seed) for seed in range(30)]
    assert set(drawn) == {0, 1, 2}
    assert drawn == [draw(seed) for seed in range(30)]


def test_no_reflection_in_a_rescue_or_when_off():
    """Sec. 3.6: RGR is disabled in all-negative groups; line 11: and where it is off."""
    assert choose_reflected_negative(replace(SUBGROUP, rescued=True), SETTINGS) is None
    assert choose_reflected_negative(SUBGROUP, replace(SETTINGS, enabled=False)) is None


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
    ],
    ids=[
        "plain",
        "blanks",
        "unclosed",
        "answer inside",
        "cut",
        "never thought",
        "no tags",
        "never opened",
        "two answers",
        "answer cut",
        "never thought, two answers",
        "stray tags",
        "tags in pieces",
    ],
)
def test_the_prompt_is_failed_rationale_and_cue_with_think_left_open(text):
    """Line 13: `<think>`, what the failure reasoned, the cue; its answer is dropped."""
    assert prefix_of(text) == PREFIX


def test_an_empty_rationale_leaves_the_cue():
    """A failure that only answered contributes no text."""
    assert prefix_of("<answer>3</answer>") == "<think>\nlook again:\n"


def test_an_answer_before_the_rationale_is_no_end_of_it():
    """Only an answer that begins after `<think>` cuts the rationale."""
    assert prefix_of("<answer>3</answer> <think>the sides are equal</think>") == PREFIX


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


def test_a_success_replaces_its_negative():
    """Lines 15-16: S loses the failure it came from and gains a positive with its own reward."""
    repaired = right(reflected=True)
    merged = merge_reflection(replace(SUBGROUP, reflect_on=1), repaired, CARE)
    assert [m.rollout for m in merged.others] == [NEGATIVES[0], repaired, NEGATIVES[2]]
    assert [m.is_negative for m in merged.others] == [True, False, True]
    assert merged.others[1].shaped_reward == repaired.reward
    assert merged.others[1].index is None


def test_a_success_without_format_is_a_success():
    """Line 15 reads acc alone."""
    repaired = make_rollout(1.0, 0.0, reflected=True)
    merged = merge_reflection(SUBGROUP, repaired, CARE)
    assert merged.num_negatives == 2 and not merged.others[0].is_negative


def test_a_failure_joins_the_subgroup():
    """Lines 17-18: S keeps the original failure and gains the reflected one."""
    failed = wrong(reflected=True)
    merged = merge_reflection(SUBGROUP, failed, CARE)
    assert [m.rollout for m in merged.others] == [*NEGATIVES, failed]
    assert merged.num_negatives == 4


def test_a_failure_may_replace_its_negative():
    """`failed_reflection: replace`: the released code's rule."""
    failed = wrong(reflected=True)
    merged = merge_reflection(SUBGROUP, failed, care("failed_reflection=replace"))
    assert [m.rollout for m in merged.others] == [failed, *NEGATIVES[1:]]
    assert merged.others[0].is_negative


def test_a_partly_correct_reflection_is_neither():
    """0 < acc < 1 is neither success nor failure, and S stays as it was."""
    partial = make_rollout(0.5, 1.0, reflected=True)
    assert merge_reflection(SUBGROUP, partial, CARE) == SUBGROUP


def test_a_partly_correct_reflection_failed_to_the_letter():
    """`partial: literal`: lines 15-18 know success and failure only."""
    partial = make_rollout(0.5, 1.0, reflected=True)
    merged = merge_reflection(SUBGROUP, partial, care("partial=literal"))
    assert merged.others[-1].rollout is partial and merged.others[-1].is_negative


@pytest.mark.parametrize(
    ("accuracy", "format_score", "success"), [(0.0, 1.0, True), (0.5, 0.0, True), (0, 0, False)]
)
def test_success_by_reward(accuracy, format_score, success):
    """`positive: reward` counts reward > 0 as success, for reflections as for rollouts."""
    reflected = make_rollout(accuracy, format_score, reflected=True)
    merged = merge_reflection(SUBGROUP, reflected, care("positive=reward"))
    assert (merged.others[0].rollout is reflected) == success
    assert len(merged.others) == (3 if success else 4)


@pytest.mark.parametrize("accuracy", [0.0, 1.0])
def test_the_anchor_stays(accuracy):
    """A reflected rollout never becomes the anchor, however short and well-formed."""
    reflected = make_rollout(accuracy, 1.0, think=0, answer=0, reflected=True)
    assert merge_reflection(SUBGROUP, reflected, CARE).anchor is SUBGROUP.anchor
