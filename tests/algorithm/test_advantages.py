"""Sequence-level advantages: Eqs. 5-10, 14 and the equalisation (lines 24-39), and the baselines'.

The paper's Table 5 with them.
"""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from care_kernels import Cispo, Clip, Sapo
from care_kernels.region_weights import THINK_WEIGHT
from care_train.algorithm.advantages import (
    RESCUE_DELTA,
    equalize_factor,
    normalize_rewards,
    rescue_rewards,
)
from care_train.algorithm.baselines import baseline_updates, has_mixed_outcomes, without_truncated
from care_train.algorithm.spans import overlong_penalty
from care_train.algorithm.types import skipped_update
from care_train.config import TABLE_5, build_config
from care_train.training.update import surrogate_of
from tests.algorithm.builders import (
    broken,
    make_rollout,
    right,
    token_advantages,
    token_weights,
    wrong,
)


def normalized(*rewards: float, eps: float = 0.0) -> list[float]:
    return normalize_rewards(torch.tensor(rewards, dtype=torch.float64), eps).tolist()


def test_raw_advantages_by_hand():
    """Eqs. 5-7: r = (1, .1, .4): mu = .5, sigma^2 = (.25 + .16 + .01) / 3 = .14.

    eps is outside the root: of (3, 1), eps = 1 halves the advantages. Equal rewards give 0.
    """
    sigma = math.sqrt(0.14) + 1e-6
    expected = [0.5 / sigma, -0.4 / sigma, -0.1 / sigma]
    assert normalized(1.0, 0.1, 0.4, eps=1e-6) == pytest.approx(expected)
    assert normalized(3.0, 1.0, eps=1.0) == pytest.approx([0.5, -0.5])
    assert normalized(*[0.1] * 4, eps=1e-6) == pytest.approx([0] * 4)


@pytest.mark.parametrize("num_negatives", [1, 2, 7])
@given(low=st.floats(0, 0.4), gap=st.floats(0.05, 1))
def test_two_level_rewards_show_the_signature(num_negatives, low, gap):
    """Eq. 10 and Corollary 1: A_raw = sqrt(K') and -1/sqrt(K') exactly, whatever the two levels.

    Equalised with K = 7, the negatives' total is -sqrt(7) whatever K' is (Sec. 3.4). The
    pseudo-rewards of a rescue, delta and -delta / K', show the same (Eq. 14, Corollary 2).
    """
    root = math.sqrt(num_negatives)
    expected = [root] + [-1 / root] * num_negatives
    raw = normalized(low + gap, *[low] * num_negatives)
    assert raw == pytest.approx(expected, rel=1e-6)
    rescue = rescue_rewards(num_negatives, delta=gap).tolist()
    assert rescue == pytest.approx([gap] + [-gap / num_negatives] * num_negatives)
    assert normalized(*rescue) == pytest.approx(expected, rel=1e-5)
    assert sum(raw[1:]) * equalize_factor(num_negatives, 7) == pytest.approx(-math.sqrt(7))


@pytest.mark.parametrize("negatives", [(0.0, 0.1), (0.1, 0.1, 0.0, 0.0), (0.0, 0.3, 0.1, 0.2, 0.5)])
def test_spread_among_negatives_attenuates_the_signature(negatives):
    """Eq. 9: A_raw = alpha sqrt(K'), alpha = (1 + (K' + 1) Var / Delta^2)^(-1/2).

    With the group's own mean and population variance of the negatives it is exact.
    """
    count = len(negatives)
    mean = sum(negatives) / count
    variance = sum((x - mean) ** 2 for x in negatives) / count
    alpha = (1 + (count + 1) * variance / (1 - mean) ** 2) ** -0.5
    raw = normalized(1.0, *negatives)
    assert 0 < alpha < 1
    assert raw[0] == pytest.approx(alpha * math.sqrt(count))
    assert sum(raw[1:]) / count == pytest.approx(-alpha / math.sqrt(count))


@pytest.mark.parametrize("k", [1, 2, 5])
def test_expected_variance_of_proposition_1(k):
    """Proposition 1: E[sigma_S^2] = (K'^2 Var + K' Delta^2) / (K' + 1)^2 for i.i.d. negatives.

    Negatives of 0 or 0.5 with equal odds have m = 1/4 and Var = 1/16; all 2^K' groups are formed.
    sigma_S is read off the advantages: the reward gap over the advantage gap.
    """
    squares = []
    for negatives in itertools.product([0.0, 0.5], repeat=k):
        raw = normalized(1.0, *negatives)
        squares.append(((1.0 - negatives[0]) / (raw[0] - raw[1])) ** 2)
    expected = (k**2 / 16 + k * 0.75**2) / (k + 1) ** 2
    assert sum(squares) / len(squares) == pytest.approx(expected)


# Rewards 1, 1, .1, 0: mean .525, population variance .226875; lengths 10, 8, 9, 6.
GROUP = [right(), right(think=1), wrong(think=2), broken()]
LENGTHS = [10, 8, 9, 6]
Z_SCORES = [x / math.sqrt(0.226875) for x in (0.475, 0.475, -0.425, -0.525)]


def updates_of(name, groups, kept: bool = True, total=lambda values: values):
    """The call the training step makes for a baseline, on one rank."""
    return baseline_updates(
        groups,
        name,
        total,
        length_normalized=name in ("grpo", "gspo", "sapo"),
        keep_without_signal=kept,
    )


def update_of(name, rollouts=GROUP, kept: bool = True):
    return updates_of(name, [rollouts], kept)[0]


def advantages(update) -> list[float]:
    return [sequence.advantage for sequence in update.sequences]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        *[(name, Z_SCORES) for name in ("grpo", "dapo", "gspo", "cispo", "sapo")],
        # r_i less the mean, without the std.
        ("dr_grpo", [0.475, 0.475, -0.425, -0.525]),
        # r_i less the mean of the other three: 1.1 / 3, 2 / 3, .7.
        ("rloo", [1 - 1.1 / 3, 1 - 1.1 / 3, 0.1 - 2 / 3, 0 - 2.1 / 3]),
    ],
)
def test_baselines_by_hand(name, expected):
    """All G train and count, with the source's advantage; token weights of 1/T or 1."""
    assert [rollout.reward for rollout in GROUP] == pytest.approx([1, 1, 0.1, 0])
    update = update_of(name)
    assert [s.rollout for s in update.sequences] == GROUP
    assert (update.num_sequences, update.num_tokens) == (4, sum(LENGTHS))
    assert advantages(update) == pytest.approx(expected, rel=1e-5)
    assert [s.raw_advantage for s in update.sequences] == advantages(update)
    for sequence, length in zip(update.sequences, LENGTHS, strict=True):
        weight = 1 / length if name in ("grpo", "gspo", "sapo") else 1.0
        assert token_weights(sequence).tolist() == pytest.approx([weight] * length)


@pytest.mark.parametrize("name", ["grpo", "dapo", "dr_grpo", "rloo"])
def test_equal_rewards_have_no_policy_gradient(name):
    """Token advantages are exactly 0: the only gradient is the KL's. Without a KL no sequence is
    forwarded, and the mean over all sampled sequences stays one."""
    group = [wrong() for _ in range(7)]
    update = update_of(name, group)
    assert len(update.sequences) == 7
    assert not any(token_advantages(sequence).any() for sequence in update.sequences)
    silent = update_of(name, group, kept=False)
    assert (silent.sequences, silent.num_sequences, silent.skipped) == ((), 7, "no_signal")
    assert silent.num_tokens == update.num_tokens


def test_reinforce_plus_plus():
    """arXiv:2501.03262: the z-score over the whole batch, each token with its response's reward.

    Rewards 1, .1 and 1, 1, of 10 tokens each: mean .775. So a group of equal rewards has a gradient
    where others of the batch did worse, on this rank or on another.
    """
    groups = [[right(), wrong()], [right(), right()]]
    std = math.sqrt((3 * 0.225**2 + 0.675**2) / 4)
    wanted = [[0.225 / std, -0.675 / std], [0.225 / std] * 2]
    found = [advantages(u) for u in updates_of("reinforce_pp", groups, kept=False)]
    assert found == [pytest.approx(row, rel=1e-5) for row in wanted]
    sums: list[list[float]] = []
    for group in groups:
        updates_of("reinforce_pp", [group], total=lambda own: sums.append(own) or own)
    both = [a + b for a, b in zip(*sums, strict=True)]
    (update,) = updates_of("reinforce_pp", groups[:1], total=lambda own: both)
    assert advantages(update) == pytest.approx(wanted[0], rel=1e-5)
    # A response counts as often as it has tokens: 1 with 14 and 0 with 6, mean .7, variance .21.
    (update,) = updates_of("reinforce_pp", [[right(think=7), broken()]])
    wanted = [0.3 / math.sqrt(0.21), -0.7 / math.sqrt(0.21)]
    assert advantages(update) == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("level", [right, wrong, broken])
def test_a_batch_of_equal_rewards_has_no_signal(level):
    """Whatever the sums over the batch round to: of 0.1 some are not exact."""
    for count in range(2, 20):
        group = [level(think=size) for size in range(count)]
        (update,) = updates_of("reinforce_pp", [group], kept=False)
        assert update.skipped == "no_signal", count


def test_truncated_responses_leave_the_loss():
    """loss.mask_truncated: their rewards stay in the group's, their tokens leave loss and counts.

    A group of cut responses alone is skipped, and says why.
    """
    group = (right(), right(finished=False), wrong())
    update = update_of("grpo", group)
    masked = without_truncated(update, group)
    assert masked.sequences == (update.sequences[0], update.sequences[2])
    assert (masked.num_sequences, masked.num_tokens) == (2, 20)
    silent = without_truncated(update_of("dapo", group[:2], kept=False), group[:2])
    assert (silent.num_sequences, silent.num_tokens, silent.skipped) == (1, 10, "no_signal")
    cut = [right(finished=False), wrong(finished=False)]
    masked = without_truncated(update_of("grpo", cut), cut)
    assert (masked.sequences, masked.num_sequences, masked.skipped) == ((), 0, "truncated")
    assert without_truncated(skipped_update("all_wrong"), []).skipped == "all_wrong"


def test_dapos_overlong_punishment_and_dynamic_sampling():
    """DAPO, Eq. 13: 0 up to L_max - L_cache = 80, then falling to -1 at L_max = 100. A group is
    kept where 0 < number of right answers < G, whatever the format."""
    penalties = [overlong_penalty(n, 100, 0.2) for n in (10, 80, 85, 90, 100)]
    assert penalties == pytest.approx([0, 0, -0.25, -0.5, -1])
    mixed = {(1, 0): 1, (1, 1, 0, 0): 1, (1, 1): 0, (0, 0): 0, (0.5, 0): 0, (1, 0.5): 1}
    for accuracies, expected in mixed.items():
        assert has_mixed_outcomes([make_rollout(float(a)) for a in accuracies]) == expected
    assert not has_mixed_outcomes([right(), make_rollout(1.0, 0.0)])


@pytest.mark.parametrize(
    ("name", "clip", "kl_coef", "level", "aggregation"),
    [
        ("care", Clip(0.20, 0.28), 0.02, "token", "sequence"),
        ("grpo", Clip(0.20, 0.20), 0.02, "token", "sequence"),
        ("dapo", Clip(0.20, 0.28), 0.0, "token", "token"),
        ("gspo", Clip(3e-4, 4e-4), 0.0, "sequence", "sequence"),
        ("dr_grpo", Clip(0.20, 0.20), 0.0, "token", "max_length"),
        ("rloo", None, None, "token", "max_length"),
        ("reinforce_pp", None, None, "token", "token"),
        ("cispo", Cispo(5.0, 0.0), None, "token", "token"),
        ("sapo", Sapo(1.0, 1.05), None, "token", "sequence"),
    ],
)
def test_table_5(name, clip, kl_coef, level, aggregation):
    """Table 5's clip ranges and KL coefficients; each method's ratio and what its sum is over."""
    config = build_config({"algorithm": name})
    loss = config.loss
    assert (loss.ratio_level, loss.aggregation) == (level, aggregation)
    assert clip is None or surrogate_of(loss) == clip
    assert kl_coef is None or loss.kl_coef == kl_coef
    assert loss.kl_estimator == "k3"
    assert config.rollout.group_size == 8 and name in TABLE_5


def test_table_5_row_of_care():
    """Table 5 and Sec. 8.2: K = 4, M = 6, s = 0.5, delta = 0.1, gamma+ = 0.005, one resample; and
    Sec. 3.6's repair cue, word for word."""
    care = build_config({}).care
    assert (care.max_negatives, care.preselect_size, care.neg_scale) == (4, 6, 0.5)
    assert (care.rescue, RESCUE_DELTA) == (1.0, 0.1)
    assert care.think_weight == THINK_WEIGHT == 0.005
    assert care.reflection.enabled and care.reflect_scale == 0.25
    assert care.reflection.cue == (
        "Your previous reasoning was incorrect. Identify the failing operation, correct it, and "
        "re-derive the necessary quantities. Keep this section concise. Do not restate the "
        "question."
    )
