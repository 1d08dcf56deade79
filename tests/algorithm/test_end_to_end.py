"""Algorithm 1 end to end: random groups through `care`, against the literal transcription."""

import math
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import event, given, settings
from hypothesis import strategies as st

from care_train.algorithm.care import select_subgroup, subgroup_update
from care_train.algorithm.selection import pairwise_distances
from care_train.algorithm.spans import reward
from care_train.algorithm.types import GroupUpdate, Rollout, RolloutGroup, Spans, Subgroup
from care_train.config import CareSettings, build_config
from tests.algorithm import transcription
from tests.algorithm.builders import token_advantages
from tests.algorithm.transcription import Choices, Draws, algorithm_1

PRESETS = {
    "default": (build_config({}).care, transcription.DEFAULT),
    "literal": (build_config({"preset": "literal"}).care, transcription.LITERAL),
}

SELECTORS = ("cosine_diverse", "nearest", "mixed", "farthest", "random")

BOTH = {True: True, False: False}
# Setting or decision -> the transcription's name for it, and each value here with the one there.
FLIPS: dict[str, tuple[str, dict]] = {
    "anchor_prefers_format": ("well_formatted_anchor_first", BOTH),
    "positive": ("positive_is", {"accuracy": "acc is 1", "reward": "reward above 0"}),
    "partial": ("partial_is", {"neither": "neither", "literal": "not positive"}),
    "count_negatives_by": ("K_S_is", {"accuracy": "failures", "reward": "below the anchor"}),
    "clamp_anchor": ("clamp_anchor", BOTH),
    "tag_weight": ("tag_weight", {None: None, 0.0: 0.0, 0.3: 0.3}),
    "malformed": ("malformed", {v: v for v in ("penalize", "ignore")}),
    "failed_reflection": ("failed_reflection", {v: v for v in ("append", "replace")}),
    "repaired_advantage": ("repaired_advantage", {v: v for v in ("raw", "penalized")}),
    "proxy_score": ("pseudo_anchor_score", {v: v for v in ("mean", "sum")}),
    "proxy_requires_format": ("pseudo_anchor_well_formatted", BOTH),
    "rescue_size": ("rescue_negatives", {"available": "others", "literal": "failures"}),
    "equalize": ("equalize", BOTH),
    "malformed_when": (
        "malformed_negative_is",
        {"no_answer": "without answer", "bad_format": "of fmt below 1"},
    ),
    "reflection.negative": ("reflection", {"nearest": True, "none": False}),
    "reflection.reflect_scale": ("s_refl", {None: None, 0.05: 0.05}),
    "rescue": ("rescue", {1.0: 1.0, 0.25: 0.25, 0.0: 0.0}),
}

# Unit vectors with exact dot products: ties are exact on both sides, and there are many.
FEW_VECTORS = [
    (1.0, 0.0, 0.0, 0.0),
    (0.0, 1.0, 0.0, 0.0),
    (0.0, 0.0, -1.0, 0.0),
    (0.5, 0.5, 0.5, 0.5),
    (0.5, 0.5, -0.5, 0.5),
    (-0.5, 0.5, 0.5, -0.5),
    (0.0, 0.0, 0.0, 0.0),
]


@dataclass(frozen=True)
class Case:
    """One group with what Algorithm 1 is told about it, for both sides."""

    rollouts: tuple[Rollout, ...]
    embeddings: list[tuple[float, ...]]
    log_prob_sums: list[float]
    reflected: Rollout | None
    care: CareSettings
    choices: Choices


@st.composite
def embeddings(draw) -> tuple[float, ...]:
    """One of a few unit vectors or of many, in multiples of 1/16: exact in fp32 as in floats.

    The zero vector is the embedding of an empty rationale.
    """
    if draw(st.booleans()):
        return draw(st.sampled_from(FEW_VECTORS))
    raw = draw(st.tuples(*[st.integers(-8, 8)] * 4))
    norm = math.sqrt(sum(x * x for x in raw))
    return tuple(round(16 * x / norm) / 16 if norm else 0.0 for x in raw)


@st.composite
def rollouts(draw, lam: float, accuracies: tuple[float, ...], *, reflected=False) -> Rollout:
    """Any response: with or without think, answer and EOS; unclosed think; answer inside think."""
    layouts = ["both", "both", "both", "no think"]
    layouts += ["no answer", "neither"] if 0.0 in accuracies else []
    # As the verifier has it, fmt = 1 needs both spans, closed, and EOS.
    is_formatted = draw(st.booleans())
    layout = "both" if is_formatted else draw(st.sampled_from(layouts))
    closed = is_formatted or draw(st.sampled_from([True, True, False]))
    finished = is_formatted or draw(st.booleans())
    num_text = draw(st.integers(0 if layout == "neither" and finished else 1, 12))
    cuts = sorted(draw(st.tuples(*[st.integers(0, num_text)] * 4)))
    think = answer = None
    if layout in ("both", "no answer"):
        think = (cuts[0], cuts[1] if closed else num_text)
    if layout in ("both", "no think"):
        answer = (cuts[2], cuts[3])
    accuracy = draw(st.sampled_from(accuracies)) if answer is not None else 0.0
    format_score = float(is_formatted)
    return Rollout(
        token_ids=tuple(range(num_text + finished)),
        text="",
        spans=Spans(think, draw(_content(think)), answer, draw(_content(answer))),
        accuracy=accuracy,
        format_score=format_score,
        reward=reward(accuracy, format_score, lam),
        finished=finished,
        reflected=reflected,
    )


def _content(span: tuple[int, int] | None):
    """A range within a span: a tag may share its tokens with the content."""
    if span is None:
        return st.none()
    return st.tuples(*[st.integers(*span)] * 2).map(lambda pair: (min(pair), max(pair)))


@st.composite
def cases(draw, preset: str) -> Case:
    """A group of any kind, a reflection of any outcome, and settings near a preset's."""
    care, choices = PRESETS[preset]
    lam = draw(st.sampled_from([0.1, 0.0, 0.3, 0.45]))
    size = draw(st.integers(2, 9))
    kind = draw(st.sampled_from(["mixed", "mixed", "all wrong", "any"]))
    each = [(0.0,) if kind == "all wrong" else (0.0, 0.0, 1.0, 0.5)] * size
    if kind == "mixed":
        each[:2] = [(1.0,), (0.0,)]
        each = draw(st.permutations(each))
    care = replace(
        care,
        max_negatives=draw(st.integers(1, 6)),
        preselect_size=draw(st.integers(1, 8)),
        neg_scale=draw(st.sampled_from([0.5, 1.0, 0.3])),
        think_weight=draw(st.sampled_from([0.005, 0.0, 0.5])),
        selector=draw(st.sampled_from(SELECTORS)),
    )
    choices = replace(
        choices,
        K=care.max_negatives,
        M=care.preselect_size,
        s=care.neg_scale,
        gamma=care.think_weight,
        lam=lam,
        selector=care.selector,
    )
    for key in draw(st.lists(st.sampled_from(sorted(FLIPS)), max_size=3, unique=True)):
        name, values = FLIPS[key]
        here, there = draw(st.sampled_from(list(values.items())))
        care, choices = set_key(care, key, here), replace(choices, **{name: there})
    outcomes = st.sampled_from([(1.0,), (0.0,), (0.5,)])
    return Case(
        tuple(draw(rollouts(lam, accuracies)) for accuracies in each),
        [draw(embeddings()) for _ in range(size)],
        [value / 8 for value in draw(st.tuples(*[st.integers(-80, -1)] * size))],
        draw(st.none() | outcomes.flatmap(lambda acc: rollouts(lam, acc, reflected=True))),
        care,
        choices,
    )


def set_key(care: CareSettings, key: str, value: object) -> CareSettings:
    """`care.a.b = value`, or a decision."""
    section, _, name = key.rpartition(".")
    section = "decisions" if hasattr(care.decisions, name) else section
    if section:
        value = replace(getattr(care, section), **{name: value})
    return replace(care, **{section or name: value})


def run_care(case: Case) -> tuple[Subgroup | str, GroupUpdate | None]:
    """The group through the code under test."""
    group = RolloutGroup(
        case.rollouts,
        pairwise_distances(torch.tensor(case.embeddings)),
        torch.tensor(case.log_prob_sums),
    )
    subgroup = select_subgroup(group, case.care, torch.Generator().manual_seed(0))
    if isinstance(subgroup, str):
        return subgroup, None
    reflected = None if subgroup.reflect_on is None else case.reflected
    return subgroup, subgroup_update(subgroup, case.care, reflected)


def draws_of(subgroup: Subgroup | str, care: CareSettings) -> Draws:
    """What chance chose, checked to be a choice it had."""
    if care.selector != "random" or isinstance(subgroup, str):
        return Draws()
    chosen = tuple(member.index for member in subgroup.others)
    assert len(set(chosen)) == len(chosen)
    on = None if subgroup.reflect_on is None else chosen[subgroup.reflect_on]
    return Draws(negatives=chosen, reflect_on=on)


def assert_same(case: Case) -> None:
    """Members, sequence-level and per-token advantages, K_S and the reflecting negative."""
    subgroup, update = run_care(case)
    expected = algorithm_1(
        case.rollouts,
        case.embeddings,
        case.log_prob_sums,
        case.reflected,
        case.choices,
        draws_of(subgroup, case.care),
    )
    if expected is None:
        assert update is None or (update.sequences == () and update.skipped is not None)
        return
    assert isinstance(subgroup, Subgroup) and update is not None
    assert update.num_negatives == expected.K_S
    assert update.num_sequences == len(update.sequences)
    assert update.num_tokens == sum(len(s.rollout.token_ids) for s in update.sequences)
    if abs(expected.S[0].A_raw) > 1e-9:
        assert update.anchor_clamped == (case.choices.clamp_anchor and expected.S[0].A_raw < 0)
    on = subgroup.reflect_on
    assert (None if on is None else subgroup.others[on].index) == expected.y_neg
    # S* has the members with A != 0; one that is zero but for rounding may be on either side.
    wanted = [item for item in expected.S if abs(item.A) > 1e-9]
    got = [sequence for sequence in update.sequences if abs(sequence.advantage) > 1e-9]
    assert [id(sequence.rollout) for sequence in got] == [id(item.y) for item in wanted]
    for sequence, item in zip(got, wanted, strict=True):
        assert sequence.raw_advantage == pytest.approx(item.A_raw, rel=1e-5)
        assert sequence.advantage == pytest.approx(item.A, rel=1e-5)
        tokens = token_advantages(sequence)
        assert tokens.tolist() == pytest.approx(list(item.tokens), rel=1e-5, abs=1e-9)


@pytest.mark.parametrize("preset", sorted(PRESETS))
@settings(max_examples=100)
@given(data=st.data())
def test_token_advantages_equal_the_transcription(preset, data):
    """Algorithm 1, lines 1-41: every per-token advantage of S* is the transcription's (Eq. 11)."""
    case = data.draw(cases(preset))
    subgroup, update = run_care(case)
    if update is not None and not isinstance(subgroup, str):
        event("rescued" if subgroup.rescued else "anchored")
        event(f"S* has {', '.join(sorted({sequence.role for sequence in update.sequences}))}")
    assert_same(case)
