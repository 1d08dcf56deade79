"""What the surrogate's rows are divided by (Eqs. 12-13; Algorithm 1, lines 41-43)."""

from dataclasses import replace

import pytest
import torch

from care_train.algorithm.types import GroupUpdate, TrainSequence, skipped_update
from care_train.config import LossSettings
from care_train.training.engine import rows_with_a_say
from care_train.training.update import (
    Denominators,
    local_denominators,
    loss_rows,
    sequence_scale,
)
from tests.algorithm.builders import credit_of, make_rollout
from tests.algorithm.fakes import train


def sequence(advantage: float, num_tokens: int) -> TrainSequence:
    """A sequence of S* whose weights are uniform and sum to 1."""
    rollout = make_rollout(think=None, answer=num_tokens - 3)
    assert len(rollout.token_ids) == num_tokens
    return TrainSequence(rollout, advantage, credit_of([1.0] * num_tokens))


def rows_of(sequence: TrainSequence, scale: float, loss: LossSettings) -> dict[str, torch.Tensor]:
    return loss_rows([sequence], [scale], loss, torch.device("cpu"))


def group(*sequences: TrainSequence) -> GroupUpdate:
    tokens = sum(len(s.rollout.token_ids) for s in sequences)
    return GroupUpdate(sequences, len(sequences), tokens)


# Group A trains 2 sequences of 4 and 6 tokens, B one of 10; C is skipped.
A = group(sequence(2.0, 4), sequence(-1.0, 6))
B = group(sequence(3.0, 10))
C = skipped_update("all_correct")
TOTALS = Denominators(sequences=3.0, tokens=20.0, groups=2.0)


def test_denominators_count_s_star():
    """|S*|, its tokens and the groups that train; a skipped group counts in none."""
    assert local_denominators([A, B, C]) == [3.0, 20.0, 2.0]
    assert local_denominators([C]) == [0.0, 0.0, 0.0]
    assert local_denominators([]) == [0.0, 0.0, 0.0]


def test_a_baselines_silent_group_counts_its_sequences():
    """GRPO's mean is over all sampled sequences, trained or not."""
    silent = GroupUpdate((), 8, 100, skipped="no_signal")
    assert local_denominators([A, silent]) == [10.0, 110.0, 1.0]


@pytest.mark.parametrize(
    ("aggregation", "per_group", "scale_a", "scale_b"),
    [
        ("sequence", False, 1 / 3, 1 / 3),
        ("sequence", True, 1 / 4, 1 / 2),
        ("token", False, 1 / 20, 1 / 20),
        ("max_length", False, 1 / 96, 1 / 96),
    ],
)
def test_scale_of_each_aggregation(aggregation, per_group, scale_a, scale_b):
    """1/|S*| over the step (Eq. 12); per group 1/(|S*_g| groups); per token; times the limit 32."""
    loss = LossSettings(aggregation=aggregation)
    scales = [sequence_scale(u, TOTALS, loss, 32, per_group=per_group) for u in (A, B)]
    assert scales == pytest.approx([scale_a, scale_b])


def test_rows_by_hand():
    """Eqs. 11-13: a_t / |S*|; the KL's share of a token is beta / (T |S*|)."""
    rollout = replace(make_rollout(), token_ids=(1, 2, 3))
    credit = credit_of([0.0, 0.25, 0.75], normalize=False)
    rows = rows_of(TrainSequence(rollout, -2.0, credit), 0.1, LossSettings(kl_coef=0.6))
    assert rows["advantages"].tolist() == pytest.approx([0.0, -0.05, -0.15])
    assert rows["kl_weights"].tolist() == pytest.approx([0.6 * 0.1 / 3] * 3)
    assert "entropy_weights" not in rows


@pytest.mark.parametrize("aggregation", ["token", "max_length"])
def test_under_a_token_mean_every_token_has_the_same_kl_share(aggregation):
    """Long sequences then count for more, in the KL as in the surrogate."""
    loss = LossSettings(kl_coef=0.5, entropy_coef=0.2, aggregation=aggregation)
    rows = rows_of(sequence(1.0, 5), 0.1, loss)
    assert rows["kl_weights"].tolist() == pytest.approx([0.05] * 5)
    assert rows["entropy_weights"].tolist() == pytest.approx([0.02] * 5)


def test_no_coefficient_no_rows():
    """beta = 0 asks for no KL, and so for no reference."""
    rows = rows_of(sequence(1.0, 5), 0.1, LossSettings(kl_coef=0.0))
    assert set(rows) == {"advantages"}


def test_rows_with_a_say():
    """An advantage, a share of the KL, or one of the entropy bonus."""
    zero = torch.zeros(3)
    advantages, kl = torch.tensor([1.0, 0.0, 0.0]), torch.tensor([0.0, 0.1, 0.0])
    arguments = {"advantages": advantages, "kl_weights": None, "entropy_weights": zero}
    assert rows_with_a_say(arguments).tolist() == [True, False, False]
    assert rows_with_a_say(arguments | {"kl_weights": kl}).tolist() == [True, True, False]


class TestStep:
    """The whole step through the updater."""

    def test_the_mean_over_s_star_of_the_step(self):
        """Eq. 12: each of the 3 sequences hands out A / 3, whatever its group and micro-batch."""
        for size in (1, 2, 64):
            engine, _ = train([A, B, C], train={"micro_batch_size": size})
            (step,) = engine.steps
            assert len(step) == -(-3 // size)
            rows = engine.rows("advantages")
            assert rows is not None and len(rows) == 20
            assert float(rows.sum()) == pytest.approx((2.0 - 1.0 + 3.0) / 3)
            assert float(rows.abs().sum()) == pytest.approx((2.0 + 1.0 + 3.0) / 3)

    def test_the_mean_over_groups(self):
        """preset: literal: (mean of A's + mean of B's) / 2."""
        engine, _ = train([A, B, C], preset="literal")
        rows = engine.rows("advantages")
        assert rows is not None
        assert float(rows.sum()) == pytest.approx(((2.0 - 1.0) / 2 + 3.0) / 2)

    def test_group_means_are_cares_alone(self):
        """A baseline has no preset to read."""
        engine, _ = train([A, B, C], algorithm="grpo", preset="literal")
        rows = engine.rows("advantages")
        assert rows is not None
        assert float(rows.sum()) == pytest.approx((2.0 - 1.0 + 3.0) / 3)

    def test_kl_shares_sum_to_beta(self):
        """Eq. 13: mean over a sequence, then over S*: the weights sum to beta."""
        engine, _ = train([A, B, C], loss={"kl_coef": 0.07})
        rows = engine.rows("kl_weights")
        assert rows is not None and len(rows) == 20
        assert float(rows.sum()) == pytest.approx(0.07)

    def test_mini_batches_have_their_own_denominator(self):
        """The optimiser step is the unit: with one group each, A is over 2 and B over 1."""
        engine, _ = train([A, B], train={"mini_batches": 2, "prompts_per_step": 2})
        sums = [float(m.loss_arguments["advantages"].sum()) for s in engine.steps for m in s]
        assert sums == pytest.approx([(2.0 - 1.0) / 2, 3.0])

    def test_nothing_to_train_is_no_step(self):
        """Lines 7 and 27: skip means skip, KL included."""
        engine, _ = train([C, C])
        assert engine.steps == []

    def test_the_old_policys_normaliser_reaches_the_loss(self):
        """Where the old policy scored every trained sequence, the fused loss may anchor there."""
        engine, _ = train([A, B], train={"num_iterations": 2})
        assert all("old_log_normalizer" in m.loss_arguments for s in engine.steps for m in s)
        rows = engine.rows("old_log_normalizer")
        assert rows is not None and len(rows) == len(engine.rows("old_log_probs"))
        unscored, _ = train([A, B])
        assert not any("old_log_normalizer" in m.loss_arguments for s in unscored.steps for m in s)
