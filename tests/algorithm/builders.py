"""Short ways to write rollouts and groups by hand."""

import math
from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any

import torch
import yaml

from care_train.algorithm.care import select_subgroup
from care_train.algorithm.region_weights import token_credit
from care_train.algorithm.selection import pairwise_distances
from care_train.algorithm.spans import reward
from care_train.algorithm.types import (
    Credit,
    Member,
    Region,
    Rollout,
    RolloutGroup,
    Spans,
    Subgroup,
    TrainSequence,
)
from care_train.config import CareSettings, Decisions, LossSettings, load_config
from care_train.training.update import loss_rows


def care(*changes: str) -> CareSettings:
    """The default settings with `key=value` changes: keys of `care.`, or fields of `Decisions`."""
    known = {field.name for field in fields(Decisions)}
    decided = [change.partition("=") for change in changes if change.partition("=")[0] in known]
    keys = [f"care.{change}" for change in changes if change.partition("=")[0] not in known]
    decisions = replace(Decisions(), **{key: yaml.safe_load(value) for key, _, value in decided})
    return replace(load_config(None, keys).care, decisions=decisions)


LAMBDA = 0.1
"""The reward mix the hand-computed groups use: r is 1.0, 0.9, 0.1 or 0.0."""


def make_rollout(
    accuracy: float = 0.0,
    format_score: float = 1.0,
    *,
    think: int | None = 3,
    answer: int | None = 2,
    finished: bool = True,
    reflected: bool = False,
    text: str = "",
    verdict: str = "",
    prefix_ids: tuple[int, ...] = (),
) -> Rollout:
    """`<think>` t*think `</think>` `<answer>` t*answer `</answer>` EOS, one token each.

    `think` and `answer` count content tokens; None leaves the span out altogether.
    """
    length = 0
    spans: list[tuple[int, int] | None] = []
    for content in (think, answer):
        if content is None:
            spans += [None, None]
            continue
        spans += [(length, length + content + 2), (length + 1, length + content + 1)]
        length += content + 2
    num_tokens = length + finished
    return Rollout(
        token_ids=tuple(range(num_tokens)),
        text=text,
        spans=Spans(*spans),
        accuracy=accuracy,
        format_score=format_score,
        reward=reward(accuracy, format_score, LAMBDA),
        finished=finished,
        prefix_ids=prefix_ids,
        reflected=reflected,
        verdict=verdict,
    )


def right(**fields) -> Rollout:
    """A well-formed correct rollout: r = 1."""
    return make_rollout(1.0, 1.0, **fields)


def wrong(**fields) -> Rollout:
    """A well-formed wrong rollout: r = lambda = 0.1."""
    return make_rollout(0.0, 1.0, **fields)


def broken(accuracy: float = 0.0, **fields) -> Rollout:
    """A rollout without an answer span: fmt = 0, so r = 0 where wrong."""
    return make_rollout(accuracy, 0.0, **({"answer": None} | fields))


def unit_vectors(degrees: Sequence[float]) -> torch.Tensor:
    """[G, 2] unit vectors at angles: cos(a, b) is the cosine of the angle between them."""
    angles = [math.radians(d) for d in degrees]
    return torch.tensor([[math.cos(a), math.sin(a)] for a in angles])


def make_group(
    rollouts: Sequence[Rollout],
    degrees: Sequence[float] | None = None,
    log_prob_sums: Sequence[float] | None = None,
) -> RolloutGroup:
    """A group embedded on the unit circle; by default rollout i stands at 10 i degrees."""
    count = len(rollouts)
    return RolloutGroup(
        tuple(rollouts),
        pairwise_distances(
            unit_vectors([10.0 * i for i in range(count)] if degrees is None else degrees)
        ),
        torch.tensor([-1.0] * count if log_prob_sums is None else list(log_prob_sums)),
    )


def make_subgroup(
    anchor: Rollout, negatives: Sequence[Rollout], reflect_on: int | None = None
) -> Subgroup:
    """S of an anchored group, before any reflection."""
    return Subgroup(
        Member(anchor, anchor.reward, is_negative=False, index=0),
        tuple(Member(r, r.reward, True, i + 1) for i, r in enumerate(negatives)),
        reflect_on=reflect_on,
    )


DEFAULT = CareSettings()


def subgroup_of(group: RolloutGroup, settings: CareSettings = DEFAULT, seed: int = 0) -> Subgroup:
    """S of a group that is not skipped, before any reflection."""
    subgroup = select_subgroup(group, settings, torch.Generator().manual_seed(seed))
    assert isinstance(subgroup, Subgroup), subgroup
    return subgroup


def with_reward(rollout: Rollout, value: float) -> Rollout:
    """The same rollout with another reward, for groups no verifier would make."""
    return replace(rollout, reward=value)


def indices(subgroup: Subgroup) -> list[int | None]:
    """The members' places in the group, anchor first."""
    return [member.index for member in subgroup.members]


def token_advantages(sequence: TrainSequence) -> torch.Tensor:
    """Eq. 11's a_{i,t} of one sequence, [T], as the trainer has them made."""
    return loss_rows([sequence], [1.0], LossSettings(), torch.device("cpu"))["advantages"]


def token_weights(sequence: TrainSequence) -> torch.Tensor:
    """w_t / (sum_u w_u + eps_w), [T]: the token advantages of an advantage of 1."""
    return token_advantages(replace(sequence, advantage=1.0))


def region_weights(
    rollout: Rollout, settings: CareSettings, *, is_negative: bool, earns_rationale: bool
) -> torch.Tensor:
    """w_t of line 40, [T]."""
    credit = token_credit(
        rollout, settings, is_negative=is_negative, earns_rationale=earns_rationale
    )
    return token_weights(TrainSequence(rollout, 1.0, replace(credit, normalize=False)))


def credit_of(weights: Sequence[float], **options: Any) -> Credit:
    """Any weights, token by token."""
    regions = tuple(Region(t, t + 1, weight) for t, weight in enumerate(weights))
    return Credit(regions=regions, **options)
