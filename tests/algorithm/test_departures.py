"""Promises the code does not keep yet. Each test fails today and is marked so, strictly.

Where one is kept, its mark comes off and `known_departure` in test_end_to_end.py loses its case.
"""

from dataclasses import replace

import pytest
import torch

from care_train.algorithm.care import select_subgroup, subgroup_update
from care_train.algorithm.reflection import reflection_prefix
from care_train.algorithm.selection import select_hard_negatives
from care_train.algorithm.settings import CareSettings
from care_train.algorithm.spans import parse_spans, token_spans
from care_train.algorithm.types import RolloutGroup, Subgroup
from care_train.config import build_config
from tests.algorithm.builders import (
    broken,
    make_group,
    make_rollout,
    make_subgroup,
    right,
    wrong,
)

SETTINGS = CareSettings()


def departs(reason: str):
    return pytest.mark.xfail(strict=True, raises=AssertionError, reason=reason)


def subgroup_of(group: RolloutGroup, care: CareSettings, seed: int = 0) -> Subgroup:
    subgroup = select_subgroup(group, care, torch.Generator().manual_seed(seed))
    assert isinstance(subgroup, Subgroup), subgroup
    return subgroup


@departs("care._train_sequence hands region_weights a pseudo-anchor as a plain negative")
def test_a_malformed_pseudo_anchor_earns_nothing():
    """care.malformed: penalize gives positives and pseudo-anchors weight 0 where malformed."""
    care = build_config({"care": {"rescue": {"require_format": False}}}).care
    group = make_group([broken(), wrong(), wrong()], log_prob_sums=[-1.0, -90.0, -90.0])
    sequence = subgroup_update(subgroup_of(group, care), care).sequences[0]
    assert sequence.role == "proxy_anchor" and sequence.advantage > 0
    assert sequence.token_weights.tolist() == [0.0] * 6


@departs("select_hard_negatives leaves the random selector's choice in random order")
def test_the_nearest_of_random_negatives_reflects():
    """Line 12 and care.reflection.negative: nearest: the smallest d_cos, whatever the selector."""
    care = build_config({"care": {"selector": "random", "max_negatives": 3}}).care
    group = make_group([right()] + [wrong()] * 4, [0, 10, 20, 30, 40])
    for seed in range(20):
        subgroup = subgroup_of(group, care, seed)
        assert subgroup.reflect_on is not None
        chosen = [member.index for member in subgroup.others]
        assert chosen[subgroup.reflect_on] == min(chosen)


@departs("merge_reflection reads accuracy whatever care.positive says")
@pytest.mark.parametrize("accuracy", [0.0, 0.5])
def test_by_reward_a_rewarded_reflection_is_a_success(accuracy):
    """preset: official counts reward > 0 as positive, for reflections as for rollouts."""
    care = build_config({"preset": "official"}).care
    subgroup = make_subgroup(right(), [broken(), broken()], reflect_on=0)
    reflected = make_rollout(accuracy, 1.0, reflected=True)
    update = subgroup_update(subgroup, care, reflected)
    assert [s.role for s in update.sequences] == ["anchor", "reflected_success", "negative"]


@departs("merge_reflection drops a partly correct reflection under every preset")
def test_a_partly_correct_reflection_fails_to_the_letter():
    """Lines 15-18 under preset: literal: what is not acc = 1 is a failed reflection."""
    care = build_config({"preset": "literal"}).care
    subgroup = make_subgroup(right(), [wrong()], reflect_on=0)
    update = subgroup_update(subgroup, care, make_rollout(0.5, 1.0, reflected=True))
    assert [s.role for s in update.sequences] == ["anchor", "negative", "reflected_failure"]


@departs("skip_before_forward skips every group with a partial answer and no positive")
def test_a_group_without_positives_is_rescued_to_the_letter():
    """Lines 4 and 21 under preset: literal: the rescue needs an empty P, and nothing more."""
    care = build_config({"preset": "literal"}).care
    assert subgroup_of(make_group([wrong(), wrong(), make_rollout(0.5)]), care).rescued


@departs("_last_pair pairs the last opening with the last closing, however many lie between")
@pytest.mark.parametrize(
    "text",
    [
        "<answer>1</answer></answer>",
        "<answer>1</answer> so </answer>",
        "<answer>1</answer>\n</answer>",
    ],
)
def test_a_stray_closing_tag_is_no_part_of_the_answer(text):
    """The last complete pair ends at the first closing tag after its opening."""
    spans = parse_spans(text)
    assert spans.answer_content is not None
    assert text[slice(*spans.answer_content)] == "1"


@departs("reflection_prefix keeps a stray </think> of a failure that never opened one")
def test_the_prefix_leaves_think_open():
    """Line 13: the cue stands inside the rationale. A lone </think> before it would close it."""
    negative = wrong(text="they are equal</think> <answer>3</answer>")
    prefix = reflection_prefix(negative, "look again:", "think", "answer")
    content = parse_spans(prefix).think_content
    assert content is not None and prefix[slice(*content)].endswith("look again:\n")


@departs("reflection_prefix cuts at the last answer pair and keeps earlier or unfinished ones")
@pytest.mark.parametrize(
    "text",
    [
        "<think>a <answer>1</answer> no <answer>2</answer>",
        "<think>a <answer>1",
        "a <answer>1</answer> no <answer>2</answer>",
    ],
)
def test_the_prefix_drops_every_failed_answer(text):
    """The failed answer is dropped: left in, the verifier would score it as the reflection's."""
    prefix = reflection_prefix(wrong(text=text), "look again:", "think", "answer")
    assert "<answer>" not in prefix


@departs("token_spans returns (0, 0), which counts as well-formed")
def test_an_answer_that_ends_with_the_prefix_is_none():
    """A range that ends before the first sampled token is None."""
    text = "<answer>1</answer>x"
    spans = token_spans(parse_spans(text), [8, 9, 18, 19], num_prefix_tokens=3)
    assert spans.answer is None and not spans.well_formed


@departs("GroupUpdate.equalize_factor carries rescue.scale as well")
def test_the_equalisation_factor_is_the_equalisation():
    """GroupUpdate.equalize_factor: sqrt(K / K_S), or 1."""
    care = build_config({"care": {"rescue": {"scale": 0.5}}}).care
    update = subgroup_update(subgroup_of(make_group([wrong()] * 5), care), care)
    assert update.equalize_factor == 1.0


@departs("S* is decided before rescue.scale is applied")
def test_a_rescue_of_scale_zero_trains_nothing():
    """Eq. 12: S* = {A != 0}; sequences of zero advantage would still be pulled by the KL."""
    care = build_config({"care": {"rescue": {"scale": 0.0}}}).care
    update = subgroup_update(subgroup_of(make_group([wrong()] * 3), care), care)
    assert update.sequences == ()


@pytest.mark.xfail(reason="fp32 products of equal rows differ in the last bit on some machines")
@pytest.mark.parametrize("selector", ["cosine_topk", "cosine_diverse"])
def test_equal_rationales_tie(selector):
    """Ties go to the lowest index: identical embeddings are at one distance from the anchor."""
    settings = replace(SETTINGS, selector=selector)
    for seed in range(20):
        for width in (8, 64, 896):
            generator = torch.Generator().manual_seed(seed)
            row = torch.nn.functional.normalize(torch.randn(width, generator=generator), dim=0)
            for size in (6, 9, 16):
                rows = row.repeat(size, 1)
                chosen = select_hard_negatives(range(1, size), 4, rows, 0, settings)
                assert chosen == [1, 2, 3, 4]


@departs("GroupSampler.reflect passes over a too long context without a trace")
def test_reflections_over_the_limit_are_counted():
    """Reflection over the length limit: skip for that group, count it."""
    from care_train.training.statistics import _KEYS

    assert any("reflection" in key and ("skip" in key or "long" in key) for key in _KEYS)


@departs("the reason calls a group with partial answers all wrong, or all correct")
@pytest.mark.parametrize("accuracies", [(0.0, 0.5), (1.0, 0.5)])
def test_the_reason_for_a_skip_is_true(accuracies):
    """A group is called all wrong or all correct only where every rollout is."""
    group = make_group([make_rollout(accuracy, 1.0) for accuracy in accuracies])
    assert select_subgroup(group, SETTINGS) not in ("all_wrong", "all_correct")
