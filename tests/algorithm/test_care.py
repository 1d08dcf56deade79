"""Algorithm 1 on groups computed by hand: who forms S (Eqs. 2-4), what it weighs (lines 3-41).

test_end_to_end.py holds the decisions against the transcription; here are a few to read, and those
that drawn groups seldom meet.
Embeddings are unit vectors in the plane, so a cosine distance grows with the angle between two.
"""

import math
from dataclasses import replace

import pytest
import torch

from care_train.algorithm.care import (
    select_subgroup,
    skip_before_forward,
    subgroup_update,
)
from care_train.algorithm.selection import (
    pairwise_distances,
    reflection_prefix,
    select_hard_negatives,
)
from care_train.algorithm.spans import parse_spans
from care_train.algorithm.types import GroupUpdate, Subgroup
from care_train.config import CareSettings, ReflectionSettings
from tests.algorithm.builders import (
    care,
    indices,
    make_group,
    make_rollout,
    make_subgroup,
    right,
    subgroup_of,
    with_reward,
    wrong,
)

SETTINGS = CareSettings()
ROOT2, ROOT3, ROOT43 = math.sqrt(2), math.sqrt(3), math.sqrt(4 / 3)
HALF = with_reward(right(), 0.5)
REPAIRED = right(reflected=True)
FAILED = wrong(reflected=True)
BAD_FORMAT = make_rollout(1.0, 0.0)


def advantages(update: GroupUpdate) -> list[float]:
    return pytest.approx([sequence.advantage for sequence in update.sequences], rel=1e-4)


def roles(update: GroupUpdate) -> list[str]:
    return [sequence.role for sequence in update.sequences]


RANDOM = {
    "selector": replace(SETTINGS, selector="random"),
    "anchor": replace(SETTINGS, anchor="random"),
    "reflected negative": replace(SETTINGS, reflection=ReflectionSettings(negative="random")),
}


class TestSelection:
    """What the transcription draws or leaves open: ties to the last bit, chance, forced text."""

    @pytest.mark.parametrize("selector", ["nearest", "cosine_diverse"])
    @pytest.mark.parametrize("width", [8, 896])
    def test_equal_rationales_tie(self, selector, width):
        """Identical embeddings tie, whatever the last bit of their products is."""
        for seed, size in zip(range(9), (6, 9, 16) * 3, strict=True):
            generator = torch.Generator().manual_seed(seed)
            row = torch.nn.functional.normalize(torch.randn(width, generator=generator), dim=0)
            between = pairwise_distances(row.repeat(size, 1))
            settings = replace(SETTINGS, selector=selector)
            chosen = select_hard_negatives(range(1, size), 4, between, 0, settings)
            assert chosen == [1, 2, 3, 4]

    @pytest.mark.parametrize("name", sorted(RANDOM))
    def test_the_generators_seed_decides(self, name):
        """The controls of Sec. 9.2 and Figure 5: same seed, same subgroup; others give others, the
        anchor a well-formed positive always, negatives nearest first; the global generator is not
        touched. With the default settings even the seed does not matter."""
        group = make_group([right() if i % 2 else wrong() for i in range(12)] + [BAD_FORMAT])

        def draw(settings: CareSettings, seed: int):
            subgroup = subgroup_of(group, settings, seed)
            return (*indices(subgroup), subgroup.reflect_on)

        before = torch.get_rng_state()
        drawn = [draw(RANDOM[name], seed) for seed in range(40)]
        assert drawn == [draw(RANDOM[name], seed) for seed in range(40)]
        assert len(set(drawn)) > 3
        for anchor, *negatives, _ in drawn:
            assert anchor in range(1, 12, 2) and len(set(negatives)) == 4
            assert negatives == sorted(negatives, key=lambda i: (abs(i - anchor), i))
        assert len({draw(SETTINGS, seed) for seed in range(5)}) == 1
        assert torch.equal(before, torch.get_rng_state())

    @pytest.mark.parametrize(
        "text",
        [
            "<think>the sides are equal</think> <answer>3</answer>",
            "<think>\n the sides are equal \n</think>\n<answer>3</answer>",
            "<think>the sides are equal <answer>3</answer></think>",
            "<think>the sides are equal",
            "the sides are equal</think> <answer>3</answer>",
            "the sides are equal<answer>1</answer> no <answer>2</answer>",
            "<think>the sides are equal</answer> or <think>not</think>",
            "<think>the sides are equal<think></th<answer>ink>",
            "<answer>3</answer> <think>the sides are equal</think>",
        ],
    )
    def test_the_prompt_is_failed_rationale_and_cue_with_think_left_open(self, text):
        """Line 13: `<think>`, what the failure reasoned, the cue; its answer is dropped.

        What is sampled then closes the span that the prefix opened.
        """
        prefix = reflection_prefix(wrong(text=text), "look again:", "think", "answer")
        assert prefix == "<think>the sides are equal\nlook again:\n"
        failed = wrong(text="<answer>3</answer>")
        assert reflection_prefix(failed, "look:", "think", "answer") == "<think>\nlook:\n"
        whole = prefix + "they are not</think> <answer>7</answer>"
        spans = parse_spans(whole)
        assert spans.think_content is not None and spans.answer_content is not None
        assert whole[slice(*spans.think_content)].endswith("look again:\nthey are not")
        assert whole[slice(*spans.answer_content)] == "7"


class TestSubgroup:
    """Lines 3-10 and 21-25."""

    @pytest.mark.parametrize(
        ("target", "degrees", "count", "scale"),
        [
            (2.0, (60, 60, 60), 1, 0.5),  # one negative: 1 / s
            (3.0, (60, 300, 60), 2, 0.5),  # two with |h_1 + h_2| = 1: 2 / s
            (3.0, (60, 60, 60), 3, 1 / 3),  # three that are the same: 1 / s
        ],
    )
    def test_negatives_and_their_scale_adapt_to_a_target(self, target, degrees, count, scale):
        """`target_snr`: as many negatives as it takes, else a smaller s, of a failed reflection
        too."""
        settings = replace(SETTINGS, target_snr=target, selector="nearest")
        group = make_group([right(), wrong(), wrong(), wrong()], [0, *degrees])
        subgroup = subgroup_of(group, settings)
        assert indices(subgroup) == [0, 1, 2, 3][: count + 1]
        same = replace(SETTINGS, neg_scale=scale, selector="nearest", max_negatives=4)
        plain = make_subgroup(right(), [wrong()] * count, reflect_on=0)
        found, expected = (
            subgroup_update(one, chosen, FAILED)
            for one, chosen in ((subgroup, settings), (plain, same))
        )
        assert [s.advantage for s in found.sequences] == advantages(expected)

    def test_every_positive_may_join_as_an_anchor(self):
        """`anchor: all`: Eq. 2's anchor leads, negatives follow, the other positives close S, and
        Eq. 8 scales the negatives alone."""
        settings = replace(SETTINGS, anchor="all", max_negatives=2, equalize=False)
        group = make_group([wrong(), right(think=9), wrong(), right(think=2), wrong(), right()])
        subgroup = select_subgroup(group, settings)
        assert isinstance(subgroup, Subgroup)
        assert indices(subgroup) == [3, 2, 4, 1, 5] and subgroup.reflect_on == 0
        assert [m.is_negative for m in subgroup.members] == [False, True, True, False, False]
        update = subgroup_update(subgroup, settings, wrong(reflected=True))
        expected = ["anchor", "negative", "negative", "positive", "positive", "reflected_failure"]
        assert roles(update) == expected and update.num_negatives == 3
        for sequence in update.sequences:
            scale = {"negative": 0.5, "reflected_failure": 0.25}.get(sequence.role, 1.0)
            assert sequence.advantage == pytest.approx(scale * sequence.raw_advantage)

    @pytest.mark.parametrize(
        ("accuracies", "changes", "reason"),
        [
            ((1, 0), [], None),
            ((0, 0), [], None),
            ((1, 1), [], "all_correct"),
            ((1, 0.5), [], "no_failures"),
            ((0,), [], "all_wrong"),
            ((0, 0), ["rescue=0"], "all_wrong"),
            ((0, 0, 0.5), [], "no_positives"),
            ((0.5, 0.5), [], "no_positives"),
        ],
    )
    def test_who_is_skipped(self, accuracies, changes, reason):
        """Line 7, with a true reason; known before the old policy's forward, which it saves."""
        settings, rollouts = care(*changes), [make_rollout(float(a)) for a in accuracies]
        found = select_subgroup(make_group(rollouts), settings)
        assert (found if isinstance(found, str) else None) == reason
        assert (skip_before_forward(tuple(rollouts), settings) is None) == (reason is None)


PENALIZED = ("repaired_advantage=penalized",)
CASES = {
    # r = (1, .1, .1): A_raw = (sqrt 2, -1/sqrt 2 x2), s = 1/2, sqrt(4/2).
    "two negatives": ((), None, [2, -0.5, -0.5], "aNN"),
    # Lines 15-16, 34-39: S = {1, 1, .1}, K_S = 1, factor 2; the repair is not the anchor.
    "repaired": ((), REPAIRED, [ROOT2, ROOT2, -ROOT2], "aSN"),
    "repaired, penalised": (PENALIZED, REPAIRED, [ROOT2, -ROOT2 / 2, -ROOT2], "aSN"),
    # Line 18: S = {1, .1, .1, .1}: s_refl = s/2, K_S = 3.
    "failed": ((), FAILED, [ROOT43 * x / ROOT3 for x in (3, -0.5, -0.5, -0.25)], "aNNF"),
}
ROLES = {"a": "anchor", "N": "negative", "S": "reflected_success", "F": "reflected_failure"}


class TestAdvantages:
    """Lines 26-39."""

    @pytest.mark.parametrize("name", CASES)
    def test_by_hand(self, name):
        """An anchor and two well-formed failures, the first of which reflects."""
        changes, reflected, expected, who = CASES[name]
        subgroup = make_subgroup(right(), [wrong()] * 2, reflect_on=0)
        update = subgroup_update(subgroup, care(*changes), reflected)
        assert advantages(update) == expected
        assert roles(update) == [ROLES[letter] for letter in who]
        assert update.num_negatives == who.count("N") + who.count("F")
        assert update.num_sequences == len(who)
        assert update.num_tokens == sum(len(s.rollout.token_ids) for s in update.sequences)
        assert not (update.rescued or update.anchor_clamped) and update.skipped is None

    def test_an_anchor_below_the_mean_is_not_penalised(self):
        """A = 0 instead, so that it is not in S*; to the letter, A < 0 moves away from it."""
        low, failed = with_reward(right(), 0.55), with_reward(wrong(), 0.45)
        subgroup = make_subgroup(low, [failed] * 2, reflect_on=0)
        update = subgroup_update(subgroup, SETTINGS, REPAIRED)
        assert update.anchor_clamped and roles(update) == ["reflected_success", "negative"]
        update = subgroup_update(subgroup, care("clamp_anchor=false"), REPAIRED)
        assert not update.anchor_clamped and update.sequences[0].advantage < 0

    @pytest.mark.parametrize(("count", "reason"), [(0, "no_negatives"), (3, "no_signal")])
    def test_equal_rewards_train_nothing(self, count, reason):
        """Eq. 7 gives zeros everywhere: no sequence, no count, and a reason."""
        level = [with_reward(wrong(), 0.5)] * count
        update = subgroup_update(make_subgroup(HALF, level), SETTINGS)
        assert (update.skipped, update.num_sequences, update.num_tokens) == (reason, 0, 0)

    def test_rescue(self):
        """Corollary 2 with K' = 2, K = 4: A = (2, -.5, -.5), times care.rescue.

        The factor reported is sqrt(K / K_S) alone.
        """
        settings = care("rescue=0.25")
        group = make_group([wrong()] * 3, log_prob_sums=[-9.0, -1.0, -9.0])
        update = subgroup_update(subgroup_of(group, settings), settings)
        assert advantages(update) == [0.5, -0.125, -0.125]
        assert roles(update) == ["proxy_anchor", "negative", "negative"]
        assert update.rescued and update.skipped is None
        assert update.equalize_factor == pytest.approx(ROOT2)
