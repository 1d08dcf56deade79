"""Where prompts, the loss's denominators and the step's metrics meet Algorithm 1.

What each decision changes in lines 1-41 stands in test_care.py, by hand, and in test_end_to_end.py,
against the transcription.
"""

from dataclasses import replace

import pytest
import torch

from care_kernels import PolicyLoss
from care_train.algorithm.care import select_subgroup, subgroup_update
from care_train.algorithm.region_weights import token_credit
from care_train.algorithm.types import (
    Credit,
    GroupUpdate,
    Rollout,
    Subgroup,
    TrainSequence,
    skipped_update,
)
from care_train.config import LossSettings
from care_train.training.groups import Group
from care_train.training.log_probs import TrainItem
from care_train.training.metrics import step_metrics
from care_train.training.update import loss_rows
from tests.algorithm.builders import (
    care,
    credit_of,
    make_group,
    make_rollout,
    make_subgroup,
    right,
    wrong,
)
from tests.algorithm.fakes import PROMPT, make_sampler, sampled_group, train

CPU = torch.device("cpu")


def reflect(*negatives, **settings):
    """The groups after their reflection, and the engine that was asked."""
    sampler, engine = make_sampler(**settings)
    groups = [
        sampled_group([right(), n], str(i), subgroup=make_subgroup(right(), [n], reflect_on=0))
        for i, n in enumerate(negatives)
    ]
    return sampler.reflect(groups, 0), engine


class TestReflection:
    """What a repair is sampled from, and what it is trained on."""

    REPAIR = right(think=1, answer=1, reflected=True, prefix_ids=(7, 8, 9))

    def test_what_is_sampled_from(self):
        """The prompt's own ids, then the forced prefix, with think left open (Sec. 8.2's tags)."""
        negative = wrong(text="<reasoning>they are equal</reasoning> <final>3</final>")
        (reflecting,), engine = reflect(
            negative,
            care={"reflection": {"cue": "look again:"}},
            prompt={"tags": ["reasoning", "final"]},
        )
        (request,) = engine.requests
        assert request.prompt is PROMPT
        assert "".join(map(chr, request.prefix_ids)) == "<reasoning>they are equal\nlook again:\n"
        assert reflecting.repair is not None
        assert reflecting.repair.prefix_ids == request.prefix_ids

    def test_its_own_sampling_settings(self):
        """The rollouts' own, or those of the released code, whose length limit the rollouts' own
        may lower."""
        rollout = {"temperature": 0.9, "top_p": 0.8, "max_new_tokens": 777}
        own = {"temperature": 0.6, "top_p": 0.95, "max_new_tokens": 512}
        short = {"max_new_tokens": 77}
        for preset, limits, expected in (
            ("default", {}, rollout),
            ("official", {}, own),
            ("official", short, own | short),
        ):
            _, engine = reflect(wrong(text="no"), preset=preset, rollout=rollout | limits)
            (sampling,) = engine.sampling
            assert {key: getattr(sampling, key) for key in own} == expected

    @pytest.mark.parametrize(("max_new_tokens", "lengths"), [(30, [15]), (57, [15, 64])])
    def test_none_over_the_limit(self, max_new_tokens, lengths):
        """Prompt (3) and prefix (15, 64) must fit into max_prompt_tokens + max_new_tokens, whole.

        What is left out is counted: wanted less sampled, as reflection_skipped.
        """
        negatives = [wrong(text="<think>x</think>"), wrong(text=f"<think>{'x' * 50}</think>")]
        (short, long), engine = reflect(
            *negatives,
            prompt={"max_prompt_tokens": 10},
            rollout={"max_new_tokens": max_new_tokens},
            care={"reflection": {"cue": "look:"}},
        )
        assert [len(request.prefix_ids) for request in engine.requests] == lengths
        assert short.repair is not None and (long.repair is not None) == (len(lengths) == 2)
        if long.repair is None:
            verified = replace(short, reflected=right(reflected=True))
            values = step_metrics([verified, long], [], [], [], CPU)
            assert (values["reflection_skipped"], values["reflections"]) == (1, 1)

    @pytest.mark.parametrize(
        ("preset", "before"),
        [("default", [101, 102, 103, 7, 8, 9]), ("official", [101, 102, 103])],
    )
    def test_the_context_it_is_trained_in(self, preset, before):
        """x + prefix + cue, so that the ratio is 1; or x alone. Sampled tokens alone have rows."""
        credit = token_credit(self.REPAIR, care(), is_negative=False, earns_rationale=True)
        sequence = TrainSequence(self.REPAIR, 1.0, credit, "reflected_success")
        response = list(self.REPAIR.token_ids)
        update = GroupUpdate((sequence,), 1, len(response))
        own = {"preset": preset, "loss": {"kl_coef": 0.0}, "train": {"mini_batches": 1}}
        engine, _ = train([update], [right()], **own)
        assert engine.trained_ids() == [before + response]
        assert len(engine.rows("advantages")) == len(response)
        assert engine.rows("importance_weights") is None


def test_only_s_star_reaches_the_engine():
    """Eq. 7: A = 0 outside S: of six rollouts with K = 2, two are neither forwarded nor trained."""
    rollouts = [right(think=i) if i < 3 else wrong(think=i) for i in range(6)]
    settings = care("max_negatives=2")
    subgroup = select_subgroup(make_group(rollouts), settings)
    assert isinstance(subgroup, Subgroup)
    update = subgroup_update(subgroup, settings)
    engine, scorer = train([update], rollouts, train={"num_iterations": 2})
    assert [len(batch) for batch in scorer.scored] == [3, 3]
    assert len(engine.trained_ids()) == 2 * 3


@pytest.mark.parametrize(
    ("values", "scored"),
    [({}, False), ({"num_iterations": 2}, True), ({"mini_batches": 2}, True)],
)
def test_one_step_per_batch_needs_no_old_log_probs(values, scored):
    """With one optimiser step the old policy is the current one: the ratio is 1. Where the old
    policy scored every trained sequence, the fused loss may anchor at its normaliser."""
    update = subgroup_update(make_subgroup(right(), [wrong()] * 2), care())
    options = {"train": {"prompts_per_step": 2} | values, "loss": {"kl_coef": 0.0}}
    engine, _ = train([update, update], **options)
    for name in ("old_log_probs", "old_log_normalizer"):
        assert (engine.rows(name) is not None) == scored
    assert len(engine.steps) == values.get("num_iterations", 1) * values.get("mini_batches", 1)


def sequence(advantage: float, num_tokens: int) -> TrainSequence:
    """A sequence of S* whose weights are uniform and sum to 1."""
    rollout = make_rollout(think=None, answer=num_tokens - 3)
    return TrainSequence(rollout, advantage, credit_of([1.0] * num_tokens))


def group(*sequences: TrainSequence) -> GroupUpdate:
    tokens = sum(len(s.rollout.token_ids) for s in sequences)
    return GroupUpdate(sequences, len(sequences), tokens)


# Group A trains 2 sequences of 4 and 6 tokens, B one of 10; C is skipped.
A = group(sequence(2.0, 4), sequence(-1.0, 6))
B = group(sequence(3.0, 10))
C = skipped_update("all_correct")
SILENT = GroupUpdate((), 8, 100, skipped="no_signal")


def test_rows_by_hand():
    """Eqs. 11-13: a_t / |S*|; the KL's share of a token is beta / (T |S*|); beta = 0 has none.

    Under a token mean every token has the same share, so long sequences count for more.
    """
    rollout = replace(make_rollout(), token_ids=(1, 2, 3))
    credit = credit_of([0.0, 0.25, 0.75], normalize=False)
    one = TrainSequence(rollout, -2.0, credit)
    rows = loss_rows([one], [0.1], LossSettings(kl_coef=0.6), CPU)
    assert rows["advantages"].tolist() == pytest.approx([0.0, -0.05, -0.15])
    assert rows["kl_weights"].tolist() == pytest.approx([0.6 * 0.1 / 3] * 3)
    assert set(loss_rows([one], [0.1], LossSettings(kl_coef=0.0), CPU)) == {"advantages"}
    for aggregation in ("token", "max_length"):
        loss = LossSettings(kl_coef=0.5, entropy_coef=0.2, aggregation=aggregation)
        rows = loss_rows([one], [0.1], loss, CPU)
        assert rows["kl_weights"].tolist() == pytest.approx([0.05] * 3)
        assert rows["entropy_weights"].tolist() == pytest.approx([0.02] * 3)


@pytest.mark.parametrize("size", [1, 64])
def test_the_kl_over_micro_batches(size):
    """Eq. 13: the mean over a sequence, then over S* of the step: its weights sum to beta."""
    engine, _ = train([A, B, C], train={"micro_batch_size": size}, loss={"kl_coef": 0.07})
    (step,) = engine.steps
    assert len(step) == -(-3 // size)
    assert len(engine.rows("advantages")) == len(engine.rows("kl_weights")) == 20
    assert float(engine.rows("kl_weights").sum()) == pytest.approx(0.07)


LITERAL, TOKEN = {"preset": "literal"}, {"loss": {"aggregation": "token"}}
LENGTH = {"loss": {"aggregation": "max_length"}, "rollout": {"max_new_tokens": 32}}
TWO_STEPS = {"train": {"mini_batches": 2, "prompts_per_step": 2}}


@pytest.mark.parametrize(
    ("updates", "values", "sums"),
    [
        # Each of the 3 sequences hands out A / 3, whatever its group and micro-batch.
        ([A, B, C], {}, [4 / 3]),
        ([A, B, C], {"train": {"micro_batch_size": 1}}, [4 / 3]),
        # Of a baseline's group without a signal all sampled sequences and tokens count.
        ([A, SILENT], {}, [1 / 10]),
        ([A, SILENT], TOKEN, [1 / 110]),
        # The other means: over tokens; over the length limit 32.
        ([A, B, C], TOKEN, [4 / 20]),
        ([A, B, C], LENGTH, [4 / (3 * 32)]),
        # preset: literal: (mean of A's + mean of B's) / 2; a baseline has no preset to read.
        ([A, B, C], LITERAL, [((2.0 - 1.0) / 2 + 3.0) / 2]),
        ([A, B, C], LITERAL | {"algorithm": "grpo"}, [4 / 3]),
        # The optimiser step is the unit: with one group each, A is over 2 and B over 1.
        ([A, B], TWO_STEPS, [(2.0 - 1.0) / 2, 3.0]),
        # Lines 7 and 27: skip means skip, KL included: there is no step.
        ([C, C], {}, []),
    ],
)
def test_the_mean_over_s_star(updates, values, sums):
    """Eq. 12: the sum of each optimiser step's advantages. A skipped group counts in none."""
    engine, _ = train(updates, **values)
    found = [float(sum(m.loss_arguments["advantages"].sum() for m in s)) for s in engine.steps]
    assert found == pytest.approx(sums)


def item(group: Group, rollout: Rollout, advantage: float, clipped: tuple[int, ...] = ()):
    """A trained sequence whose tokens `clipped` met the lower bound."""
    zeros = torch.zeros(len(rollout.token_ids))
    low = zeros.bool().index_fill(0, torch.tensor(clipped, dtype=torch.long), True)
    columns = PolicyLoss(zeros.sum(), zeros - 2.0, None, zeros, zeros + 1, low, zeros.bool())
    trained = TrainSequence(rollout, advantage, Credit())
    return TrainItem(group, trained, group.sequence(rollout), outcome=columns)


class TestMetrics:
    """What a step logs of its tokens and advantages, by hand."""

    def test_the_reward_deviates_within_groups(self):
        """Population deviations of {1, 0.1} and {1, 1}: 0.45 and 0, whatever lies between them."""
        groups = [sampled_group([right(), wrong()], "a"), sampled_group([right(), right()], "b")]
        values = step_metrics(groups, [], [], [], CPU)
        assert values["reward_std"] == pytest.approx(0.225)
        # What nothing was measured of is left out.
        assert not {"entropy", "clipped_negative_answer", "advantage_variance_ratio"} & {*values}

    def test_entropy_is_the_sampled_tokens_surprise(self):
        """-log pi_old over all rollouts' tokens; a baseline's are the update's own."""
        known = [
            replace(rollout, old_log_probs=torch.full((len(rollout.token_ids),), -value))
            for rollout, value in ((right(think=None, answer=1), 1.0), (wrong(), 0.5))
        ]
        short, long = (len(rollout.token_ids) for rollout in known)
        values = step_metrics([sampled_group(known, "a")], [], [], [], CPU)
        assert values["entropy"] == pytest.approx((short + 0.5 * long) / (short + long))
        group = sampled_group([right()], "b")
        values = step_metrics([group], [], [item(group, group.rollouts[0], 1.0)], [], CPU)
        assert values["entropy"] == pytest.approx(2.0)

    def test_clipped_tokens_of_negatives_answers(self):
        """Fig. 6, left: of an answer's tokens with a negative advantage, rationales left out."""
        group = sampled_group([right(), wrong(think=3, answer=2)], "a")
        anchor, negative = group.rollouts
        first, last = negative.spans.answer
        items = [item(group, anchor, 1.0, (0, 6)), item(group, negative, -0.5, (1, first))]
        values = step_metrics([group], [], items, [], CPU)
        assert values["clipped_negative_answer"] == pytest.approx(1 / (last - first))

    def test_the_variance_ratio_of_advantages(self):
        """Fig. 6, right: Var{-0.1, -0.3} / Var{1, 2} = 0.01 / 0.25."""
        group = sampled_group([right(), right(), wrong(), wrong()], "a")
        pairs = zip(group.rollouts, (1.0, 2.0, -0.1, -0.3), strict=True)
        values = step_metrics([group], [], [item(group, *pair) for pair in pairs], [], CPU)
        assert values["advantage_variance_ratio"] == pytest.approx(0.04)
