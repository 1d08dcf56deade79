"""What a step logs of its tokens and advantages, by hand."""

from dataclasses import replace

import pytest
import torch

from care_train.algorithm.types import Credit, Rollout, TrainSequence
from care_train.training.groups import Group
from care_train.training.log_probs import TokenOutcome, TrainItem
from care_train.training.metrics import step_metrics, token_metrics
from tests.algorithm.builders import right, wrong
from tests.algorithm.fakes import sampled_group

_CPU = torch.device("cpu")


def _item(group: Group, rollout: Rollout, advantage: float, clipped: tuple[int, ...] = ()):
    """A trained sequence whose tokens `clipped` met the lower bound."""
    length = len(rollout.token_ids)
    low = torch.zeros(length, dtype=torch.bool)
    low[list(clipped)] = True
    zeros = torch.zeros(length)
    outcome = TokenOutcome(zeros - 2.0, None, zeros, low, torch.zeros_like(low))
    sequence = TrainSequence(rollout, advantage, Credit((0, 0), (0, 0), False))
    return TrainItem(group, sequence, group.sequence(rollout), outcome=outcome)


def test_the_reward_deviates_within_groups():
    """Population deviations of {1, 0.1} and {1, 1}: 0.45 and 0, whatever lies between groups."""
    groups = [sampled_group([right(), wrong()], "a"), sampled_group([right(), right()], "b")]
    assert token_metrics(groups, [], _CPU) == {}
    assert step_metrics(groups, [], _CPU)["reward_std"] == pytest.approx(0.225)


def test_entropy_is_the_sampled_tokens_surprise():
    """-log pi_old over all rollouts' tokens; a baseline's are the update's own."""
    known = [
        replace(rollout, old_log_probs=torch.full((len(rollout.token_ids),), -value))
        for rollout, value in ((right(think=None, answer=1), 1.0), (wrong(), 0.5))
    ]
    lengths = [len(rollout.token_ids) for rollout in known]
    expected = (lengths[0] + 0.5 * lengths[1]) / sum(lengths)
    values = token_metrics([sampled_group(known, "a")], [], _CPU)
    assert values["entropy"] == pytest.approx(expected)
    group = sampled_group([right()], "b")
    items = [_item(group, group.rollouts[0], 1.0)]
    assert token_metrics([group], items, _CPU)["entropy"] == pytest.approx(2.0)


def test_clipped_tokens_of_negatives_answers():
    """Fig. 6, left: of an answer's tokens with a negative advantage; rationales do not count."""
    group = sampled_group([right(), wrong(think=3, answer=2)], "a")
    anchor, negative = group.rollouts
    first, last = negative.spans.answer
    items = [_item(group, anchor, 1.0, (0, 6)), _item(group, negative, -0.5, (1, first))]
    values = token_metrics([group], items, _CPU)
    assert values["clipped_negative_answer"] == pytest.approx(1 / (last - first))


def test_the_variance_ratio_of_advantages():
    """Fig. 6, right: Var{-0.1, -0.3} / Var{1, 2} = 0.01 / 0.25."""
    group = sampled_group([right(), right(), wrong(), wrong()], "a")
    pairs = zip(group.rollouts, (1.0, 2.0, -0.1, -0.3), strict=True)
    values = token_metrics([group], [_item(group, *pair) for pair in pairs], _CPU)
    assert values["advantage_variance_ratio"] == pytest.approx(0.04)
