"""What the paper leaves open: what each decision changes, end to end.

Settings are given as a user gives them (`key=value` below `care.`), decisions by field name.
The equations alone stand in the tests named after their files.
"""

import math
from dataclasses import replace

import pytest
import torch

from care_train.algorithm.care import select_subgroup, subgroup_update
from care_train.algorithm.region_weights import token_credit
from care_train.algorithm.selection import pairwise_distances
from care_train.algorithm.types import GroupUpdate, Spans, Subgroup, TrainSequence
from care_train.config import CareSettings, load_config
from care_train.training.loss import loss_rows
from care_train.training.metrics import step_metrics
from tests.algorithm.builders import (
    care,
    indices,
    make_group,
    make_rollout,
    make_subgroup,
    right,
    with_reward,
    wrong,
)
from tests.algorithm.fakes import PROMPT, THINK_ID, make_sampler, sampled_group, train

SELECTORS = ("cosine_diverse", "random", "nearest", "mixed", "farthest")
ROOT2, ROOT3 = math.sqrt(2), math.sqrt(3)


def subgroup_of(group, settings: CareSettings, seed: int = 0) -> Subgroup:
    subgroup = select_subgroup(group, settings, torch.Generator().manual_seed(seed))
    assert isinstance(subgroup, Subgroup), subgroup
    return subgroup


def advantages(update: GroupUpdate) -> list[float]:
    return pytest.approx([s.advantage for s in update.sequences], rel=1e-4)


def update_of(settings: CareSettings, negatives=2, reflected=None, anchor=None) -> GroupUpdate:
    """The update of an anchor and well-formed wrong negatives, the first of which reflects."""
    subgroup = make_subgroup(anchor or right(), [wrong()] * negatives, reflect_on=0)
    return subgroup_update(subgroup, settings, reflected)


class TestPreselection:
    """care.preselect_size: M, at most the number of failures; no pass where it is at most K'."""

    # Failures at 10, 12, 14, 60 and 90 degrees from the anchor.
    GROUP = make_group([right()] + [wrong()] * 5, [0, 10, 12, 14, 60, 90])

    @pytest.mark.parametrize(
        ("preselect_size", "chosen"),
        [(1, [1, 2]), (2, [1, 2]), (3, [1, 3]), (4, [1, 4]), (5, [1, 5]), (50, [1, 5])],
    )
    def test_m(self, preselect_size, chosen):
        """The farthest-first pass reaches as far as M lets it."""
        settings = care("max_negatives=2", f"preselect_size={preselect_size}")
        assert indices(subgroup_of(self.GROUP, settings))[1:] == chosen


class TestFarthestFirst:
    """The pass over the M nearest begins with the hardest negative."""

    def test_start(self):
        """From 10 degrees -60 is farthest."""
        group = make_group([right(), wrong(), wrong(), wrong()], [0, 10, 50, -60])
        assert indices(subgroup_of(group, care("max_negatives=2")))[1:] == [1, 3]

    def test_ties_go_to_the_nearer(self):
        """2, 3 and 4 are all at right angles to the start: 2, then 3, which is opposite to 2."""
        vectors = [[1.0, 0.0, 0.0], [1.0, 0.0, 0.0]]
        vectors += [[0.0, 1.0, 0.0], [0.0, -1.0, 0.0], [0.0, 0.0, 1.0]]
        group = replace(
            make_group([right()] + [wrong()] * 4),
            distances=pairwise_distances(torch.tensor(vectors)),
        )
        assert indices(subgroup_of(group, care("max_negatives=2")))[1:] == [1, 2]
        assert indices(subgroup_of(group, care("max_negatives=3")))[1:] == [1, 2, 3]


class TestReflectingNegative:
    """care.reflection.negative: the smallest d_cos, or a random one."""

    GROUP = make_group([right(), wrong(), wrong(), wrong()], [0, 50, 20, -30])

    def test_nearest(self):
        """Line 12: the hardest by d_cos."""
        subgroup = subgroup_of(self.GROUP, care())
        assert subgroup.reflect_on is not None
        assert subgroup.others[subgroup.reflect_on].index == 2

    @pytest.mark.parametrize("selector", SELECTORS)
    def test_nearest_whatever_the_selector(self, selector):
        """The smallest d_cos of N, also where N was drawn at random."""
        settings = care("max_negatives=2", f"selector={selector}")
        distances = {1: 50, 2: 20, 3: 30}
        for seed in range(10):
            subgroup = subgroup_of(self.GROUP, settings, seed)
            assert subgroup.reflect_on is not None
            chosen = [distances[member.index or 0] for member in subgroup.others]
            assert chosen[subgroup.reflect_on] == min(chosen)

    def test_random(self):
        """Any of N."""
        settings = care("reflection.negative=random")
        drawn = set()
        for seed in range(30):
            subgroup = subgroup_of(self.GROUP, settings, seed)
            assert subgroup.reflect_on is not None
            drawn.add(subgroup.others[subgroup.reflect_on].index)
        assert drawn == {1, 2, 3}

    def test_off(self):
        """care.reflection.enabled: false is "CARE w/o RGR"."""
        assert subgroup_of(self.GROUP, care("reflection.enabled=false")).reflect_on is None


class TestReflectionPrompt:
    """care.reflection.cue: x, `<think>`, failed rationale, cue; the failed answer dropped."""

    NEGATIVE = wrong(text="<think>they are equal</think> <answer>3</answer>")

    def test_what_is_sampled_from(self):
        """The prompt's own ids, then the forced prefix, with think left open."""
        sampler, engine = make_sampler(care={"reflection": {"cue": "look again:"}})
        subgroup = make_subgroup(right(), [self.NEGATIVE], reflect_on=0)
        group = sampled_group([right(), self.NEGATIVE], subgroup=subgroup)
        (reflecting,) = sampler.reflect([group], 0)
        (request,) = engine.requests
        assert request.prompt is PROMPT
        assert "".join(map(chr, request.prefix_ids)) == "<think>they are equal\nlook again:\n"
        assert reflecting.repair is not None
        assert reflecting.repair.prefix_ids == request.prefix_ids

    def test_its_own_sampling_settings(self):
        """care.reflection.temperature, top_p, max_new_tokens; None means the rollouts' own."""
        subgroup = make_subgroup(right(), [self.NEGATIVE], reflect_on=0)
        groups = [sampled_group([right(), self.NEGATIVE], subgroup=subgroup)]
        rollout = {"temperature": 0.9, "top_p": 0.8, "max_new_tokens": 77}
        own = {"temperature": 0.6, "top_p": 0.95, "max_new_tokens": 512}
        for reflection, expected in (({}, rollout), (own, own)):
            sampler, engine = make_sampler(rollout=rollout, care={"reflection": reflection})
            sampler.reflect(groups, 0)
            (sampling,) = engine.sampling
            assert {key: getattr(sampling, key) for key in own} == expected


class TestReflectionContext:
    """care.reflection.context: log-probs under the context sampled from; prefix and cue weigh 0."""

    REFLECTED = right(think=1, answer=1, reflected=True, prefix_ids=(7, 8, 9))

    def trained(self, context: str):
        credit = token_credit(self.REFLECTED, care(), is_negative=False, earns_rationale=True)
        sequence = TrainSequence(self.REFLECTED, 1.0, credit, "reflected_success")
        update = GroupUpdate((sequence,), 1, len(self.REFLECTED.token_ids))
        return train(
            [update],
            [right()],
            care={"reflection": {"context": context}},
            loss={"kl_coef": 0.0},
        )

    def test_full(self):
        """x + prefix + cue, so that the ratio is 1 at the first step; only sampled tokens count."""
        engine, _ = self.trained("full")
        response = list(self.REFLECTED.token_ids)
        assert engine.trained_ids() == [[101, 102, 103, 7, 8, 9, *response]]
        rows = engine.rows("advantages")
        assert rows is not None and len(rows) == len(response)
        assert engine.rows("importance_weights") is None

    def test_x_only(self):
        """x and an opened think, with importance weights truncated at 2."""
        engine, _ = self.trained("x_only")
        response = list(self.REFLECTED.token_ids)
        assert engine.trained_ids() == [[101, 102, 103, THINK_ID, *response]]
        weights = engine.rows("importance_weights")
        # The fake log-probs are -6 under the full context and -4 under x: exp(2) is cut to 2.
        assert weights is not None and weights.tolist() == [2.0] * len(response)


class TestReflectionOverTheLimit:
    """prompt.max_prompt_tokens + rollout.max_new_tokens: no reflection beyond, no truncation."""

    def reflect(self, max_new_tokens: int):
        sampler, engine = make_sampler(
            prompt={"max_prompt_tokens": 10},
            rollout={"max_new_tokens": max_new_tokens},
            care={"reflection": {"cue": "look:"}},
        )
        negatives = [wrong(text="<think>x</think>"), wrong(text=f"<think>{'x' * 50}</think>")]
        groups = [
            sampled_group([right(), n], str(i), subgroup=make_subgroup(right(), [n], reflect_on=0))
            for i, n in enumerate(negatives)
        ]
        return sampler.reflect(groups, 0), engine

    def test_the_long_one_is_left_out(self):
        """Prompt of 3 and prefix of 15 tokens fit into 40; 3 and 64 do not."""
        groups, engine = self.reflect(30)
        assert groups[0].repair is not None and groups[1].repair is None
        assert len(engine.requests) == 1

    def test_it_is_counted(self):
        """Wanted less sampled, reported as reflection_skipped."""
        short, long = self.reflect(30)[0]
        verified = replace(short, reflected=right(reflected=True))
        values = step_metrics([verified, long], [], torch.device("cpu"))
        assert (values["reflection_skipped"], values["reflections"]) == (1, 1)

    def test_within_the_limit_both_reflect(self):
        """And whole: nothing is cut from the prefix."""
        groups, engine = self.reflect(57)
        assert all(group.repair is not None for group in groups)
        assert [len(r.prefix_ids) for r in engine.requests] == [15, 64]


class TestReflectionSucceeded:
    """care.repaired_advantage: A_raw, or line 37's -s |A_raw|."""

    def test_raw(self):
        """S = {1, 1, .1}: the repair is rewarded as the anchor is, and does not become it."""
        update = update_of(care(), reflected=right(reflected=True, think=0))
        assert [s.role for s in update.sequences] == ["anchor", "reflected_success", "negative"]
        assert advantages(update) == [ROOT2, ROOT2, -ROOT2]

    def test_penalized(self):
        """To the letter a verified repair is punished: -s / sqrt 2, times sqrt(4/1)."""
        settings = care("repaired_advantage=penalized")
        update = update_of(settings, reflected=right(reflected=True))
        assert advantages(update) == [ROOT2, -ROOT2 / 2, -ROOT2]


class TestReflectionFailed:
    """care.failed_reflection and reflect_scale: added to S with s_refl = s/2."""

    def test_append(self):
        """Line 18: S = {1, .1, .1, .1}, the last at s/2."""
        update = update_of(care(), reflected=wrong(reflected=True))
        factor = math.sqrt(4 / 3) / ROOT3
        assert advantages(update) == [3 * factor, -factor / 2, -factor / 2, -factor / 4]

    def test_replace(self):
        """The released code: S = {1, .1, .1}, the first negative at s/2."""
        update = update_of(care("failed_reflection=replace"), reflected=wrong(reflected=True))
        assert [s.role for s in update.sequences] == ["anchor", "reflected_failure", "negative"]
        assert advantages(update) == [2.0, -0.25, -0.5]

    def test_scale(self):
        """s_refl may be set, up to s."""
        settings = care("failed_reflection=replace", "reflection.reflect_scale=0.4")
        assert advantages(update_of(settings, reflected=wrong(reflected=True))) == [2.0, -0.4, -0.5]
        assert care("neg_scale=0.8").reflect_scale == 0.4
        with pytest.raises(ValueError, match="reflect_scale"):
            care("reflection.reflect_scale=0.6")


class TestCountOfNegatives:
    """care.count_negatives_by: K_S counts acc = 0, or a reward below the anchor's (line 26)."""

    REPAIRED = make_rollout(1.0, 0.0, reflected=True)

    def test_accuracy(self):
        """A repair with less format is no negative: K_S = 1, factor 2."""
        update = update_of(care(), reflected=self.REPAIRED)
        assert (update.num_negatives, update.equalize_factor) == (1, 2.0)

    def test_reward(self):
        """To the letter it is: K_S = 2, factor sqrt 2."""
        update = update_of(care("count_negatives_by=reward"), reflected=self.REPAIRED)
        assert (update.num_negatives, update.equalize_factor) == (2, pytest.approx(ROOT2))

    def test_only_a_repair_left(self):
        """S = {1, .9}: nothing to contrast with by accuracy, one negative to the letter."""
        skipped = update_of(care(), negatives=1, reflected=self.REPAIRED)
        assert skipped.skipped == "no_negatives"
        literal = care("count_negatives_by=reward")
        assert update_of(literal, negatives=1, reflected=self.REPAIRED).num_negatives == 1


class TestEqualisation:
    """care.equalize: sqrt(K / K_S), only where K_S < K."""

    @pytest.mark.parametrize(("negatives", "factor"), [(1, 2.0), (2, ROOT2), (4, 1.0)])
    def test_on(self, negatives, factor):
        """Line 39."""
        assert update_of(care(), negatives).equalize_factor == pytest.approx(factor)

    def test_never_down(self):
        """K_S = 5 > K = 4 after a failed reflection: 1, not sqrt(4/5)."""
        update = update_of(care(), 4, wrong(reflected=True))
        assert (update.num_negatives, update.equalize_factor) == (5, 1.0)

    def test_off(self):
        """Figure 9's control."""
        update = update_of(care("equalize=false"))
        assert update.equalize_factor == 1.0
        assert advantages(update) == [ROOT2, -ROOT2 / 4, -ROOT2 / 4]


class TestClamp:
    """care.clamp_anchor: A(anchor) < 0 becomes 0 and is counted."""

    ANCHOR = with_reward(right(), 0.5)

    def test_on(self):
        """S = {.5, 1, .1}: the anchor leaves S*."""
        update = update_of(care(), reflected=right(reflected=True), anchor=self.ANCHOR)
        assert update.anchor_clamped
        assert [s.role for s in update.sequences] == ["reflected_success", "negative"]

    def test_off(self):
        """To the letter (line 34) it is pushed down."""
        settings = care("clamp_anchor=false")
        update = update_of(settings, reflected=right(reflected=True), anchor=self.ANCHOR)
        assert not update.anchor_clamped
        assert update.sequences[0].role == "anchor" and update.sequences[0].advantage < 0

    def test_not_needed(self):
        """An ordinary anchor is left alone and not counted."""
        assert not update_of(care()).anchor_clamped


class TestRescueSize:
    """care.rescue_size: K' = min(K, failures - 1), the same in -delta/K'."""

    GROUP = make_group([wrong()] * 3)

    @pytest.mark.parametrize(
        ("value", "shaped"),
        [("available", [0.1, -0.05, -0.05]), ("literal", [0.1] + [-0.1 / 3] * 2)],
    )
    def test_few_failures(self, value, shaped):
        """Three failures, K = 4: zero-sum, or line 23's K' = 3 with a rest."""
        subgroup = subgroup_of(self.GROUP, care(f"rescue_size={value}"))
        assert [m.shaped_reward for m in subgroup.members] == pytest.approx(shaped)

    @pytest.mark.parametrize("value", ["available", "literal"])
    def test_enough_failures(self, value):
        """More than K failures: both are zero-sum."""
        settings = care(f"rescue_size={value}", "max_negatives=2")
        subgroup = subgroup_of(self.GROUP, settings)
        assert [m.shaped_reward for m in subgroup.members] == pytest.approx([0.1, -0.05, -0.05])


class TestDelta:
    """care.rescue.delta and scale: the z-score cancels delta, so scale weakens a rescue."""

    GROUP = make_group([wrong()] * 3)

    def rescued(self, *overrides: str) -> GroupUpdate:
        settings = care(*overrides)
        return subgroup_update(subgroup_of(self.GROUP, settings), settings)

    def test_scale(self):
        """A quarter of the scale is a quarter of every advantage."""
        assert advantages(self.rescued("rescue.scale=0.25")) == [0.5, -0.125, -0.125]

    def test_scale_is_no_equalisation(self):
        """The factor reported is sqrt(K / K_S) alone."""
        assert self.rescued("rescue.scale=0.25").equalize_factor == pytest.approx(ROOT2)

    def test_scale_zero_trains_nothing(self):
        """Eq. 12: S* = {A != 0}, or the KL would still pull at them."""
        update = self.rescued("rescue.scale=0")
        assert update.sequences == () and update.skipped == "no_signal"

    def test_scale_is_for_rescues_alone(self):
        """An anchored group does not read it."""
        assert advantages(update_of(care("rescue.scale=0.25"))) == [2.0, -0.5, -0.5]


class TestDenominator:
    """care.normalize_over: 1/|S*| over the whole step, or per group and then over groups."""

    @pytest.mark.parametrize(
        ("value", "shares"), [("step", [1 / 5] * 5), ("group", [1 / 6] * 3 + [1 / 4] * 2)]
    )
    def test_shares(self, value, shares):
        """S* of 3 and of 2: each sequence's share of its advantage."""
        updates = [update_of(care(), 2), update_of(care(), 1)]
        preset = {"step": "default", "group": "literal"}[value]
        engine, _ = train(updates, preset=preset, train={"micro_batch_size": 1})
        found = [m.loss_arguments["advantages"].sum() for step in engine.steps for m in step]
        sequences = [s for update in updates for s in update.sequences]
        wanted = [s.advantage * share for s, share in zip(sequences, shares, strict=True)]
        assert sorted(map(float, found)) == pytest.approx(sorted(wanted), rel=1e-5)


class TestOutsideSStar:
    """Eq. 7: A = 0 outside S: not forwarded, not trained."""

    def test_only_s_star_reaches_the_engine(self):
        """Of six rollouts with K = 2 the two others stay behind."""
        rollouts = [right(think=i) if i < 3 else wrong(think=i) for i in range(6)]
        settings = care("max_negatives=2")
        group = make_group(rollouts)
        update = subgroup_update(subgroup_of(group, settings), settings)
        engine, scorer = train([update], rollouts, train={"num_iterations": 2})
        assert [len(batch) for batch in scorer.scored] == [3, 3]
        assert len(engine.trained_ids()) == 2 * 3


class TestTags:
    """prompt.think_tag and prompt.answer_tag."""

    @pytest.mark.parametrize(
        ("overrides", "think", "answer"),
        [
            ([], "think", "answer"),
            (["prompt.think_tag=reasoning", "prompt.answer_tag=final"], "reasoning", "final"),
        ],
    )
    def test_the_reflection_uses_them(self, overrides, think, answer):
        """Sec. 8.2: <reasoning> for Qwen3-VL, in the prefix that reflection forces."""
        prompt = load_config(None, overrides).prompt
        assert (prompt.think_tag, prompt.answer_tag) == (think, answer)
        sampler, engine = make_sampler(
            prompt={"think_tag": think, "answer_tag": answer}, care={"reflection": {"cue": "c"}}
        )
        negative = wrong(text=f"<{think}>r</{think}><{answer}>3</{answer}>")
        subgroup = make_subgroup(right(), [negative], reflect_on=0)
        sampler.reflect([sampled_group([right(), negative], subgroup=subgroup)], 0)
        assert "".join(map(chr, engine.requests[0].prefix_ids)) == f"<{think}>r\nc\n"


class TestKl:
    """loss.kl_coef and kl_estimator: k3 on all sampled tokens of S*, per sequence, then over S*."""

    def test_defaults(self):
        """beta = 0.02, k3."""
        loss = load_config().loss
        assert (loss.kl_coef, loss.kl_estimator) == (0.02, "k3")

    @pytest.mark.parametrize("estimator", ["k1", "k2", "k3", "k3_unbiased", "exact"])
    def test_estimators(self, estimator):
        """All five are offered."""
        loss = load_config(None, [f"loss.kl_estimator={estimator}"]).loss
        assert loss.kl_estimator == estimator

    def test_tokens_of_weight_zero_are_regularised_too(self):
        """Every sampled token of S* has the same share of its sequence's KL."""
        (_, negative, _) = update_of(care()).sequences
        rows = loss_rows([negative], [1 / 3], load_config().loss, torch.device("cpu"))
        assert (rows.advantages == 0).any()
        assert rows.kl_weights is not None
        length = len(negative.rollout.token_ids)
        assert rows.kl_weights.tolist() == pytest.approx([0.02 / 3 / length] * length)

    def test_a_skipped_group_has_no_kl(self):
        """Only S* has KL rows: a skipped group adds none."""
        trained, skipped = update_of(care()), update_of(care(), 1, right(reflected=True))
        engine, _ = train([trained, skipped])
        rows = engine.rows("kl_weights")
        assert rows is not None and len(rows) == trained.num_tokens


class TestOldPolicy:
    """train.num_iterations and train.mini_batches: one step per batch needs no old log-probs."""

    @pytest.mark.parametrize(
        ("values", "scored"),
        [({}, False), ({"num_iterations": 2}, True), ({"mini_batches": 2}, True)],
    )
    def test_when_old_is_current(self, values, scored):
        """With one optimiser step the old policy is the current one: the ratio is 1."""
        values = {"prompts_per_step": 2} | values
        updates = [update_of(care()), update_of(care())]
        engine, _ = train(updates, train=values, loss={"kl_coef": 0.0})
        assert (engine.rows("old_log_probs") is not None) == scored
        steps = values.get("num_iterations", 1) * values.get("mini_batches", 1)
        assert len(engine.steps) == steps


def test_a_response_that_only_answers_keeps_its_spans():
    """Sanity of the builder these tests rely on: no think span, T_think = 0."""
    rollout = make_rollout(think=None, answer=1)
    assert rollout.spans == Spans(None, None, (0, 3), (1, 2))
