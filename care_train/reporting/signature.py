"""The signature of K' in a run's own groups: Eqs. 9-10 and the paper's Fig. 2."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from care_train.reporting.charts import mean_interval

if TYPE_CHECKING:
    import pyarrow as pa

SIGNATURE_COLUMNS = (
    "outcome",
    *(f"rollouts.{name}" for name in ("role", "reward", "raw_advantage")),
)
"""All of an archive that `k_signature` reads."""

_NUM_NEGATIVES = range(2, 8)
"""The K' of Fig. 2."""
PAPER_R_SQUARED = (0.223, 0.555)
"""Of the paper's fits over all groups: anchor, negatives (Sec. 4.3)."""
PAPER_ALPHA_R = 0.998
"""Pearson's r of the paper's check of alpha."""


@dataclass(frozen=True)
class Bucket:
    """The groups of one K'."""

    num_negatives: int
    """K'."""
    num_groups: int
    anchor: float
    """Mean A_raw of the anchors."""
    anchor_half_width: float
    """Of its 95 % interval; NaN for one group."""
    negative: float
    """Mean over groups of minus the mean A_raw of the negatives."""
    negative_half_width: float


@dataclass(frozen=True)
class Fit:
    """A least-squares line."""

    slope: float
    intercept: float
    r_squared: float
    """NaN where all values are equal."""


@dataclass(frozen=True)
class Signature:
    """How A_raw goes with K' over a run's groups."""

    buckets: tuple[Bucket, ...]
    """By K'."""
    anchor: Fit
    """Of the bucket means against sqrt(K'), the lines of Fig. 2."""
    negative: Fit
    """Against 1 / sqrt(K')."""
    anchor_groups: Fit
    """The same over all groups, whose R^2 the paper reports."""
    negative_groups: Fit
    alpha: tuple[float, ...]
    """alpha-hat of each group: (1 + (K' + 1) Var_- / Delta^2)^(-1/2) (Eq. 9)."""
    scaled_anchor: tuple[float, ...]
    """A_raw[y+] / sqrt(K') of each group."""
    alpha_r: float
    """Pearson's r of the two; NaN where all groups have the same alpha."""


class _Group(NamedTuple):
    num_negatives: int
    anchor: float
    negative: float
    alpha: float


def k_signature(groups: "pa.Table") -> Signature | None:
    """Fig. 2 from `read_archive` of a CARE run; None with fewer than two different K' of 2 to 7.

    Counted are anchored groups of one positive: without a repaired negative, which is a second one,
    and with more than one reward, without which nothing is normalised. With Var_- the population
    variance Eq. 9 is exact but for eps, so that r below 1 says that the run's advantages are not
    those of the paper.
    """
    rows = groups.select(["outcome", "rollouts"]).to_pylist()
    anchored = [_group(row["rollouts"]) for row in rows if row["outcome"] == "anchored"]
    found = [one for one in anchored if one is not None and one.num_negatives in _NUM_NEGATIVES]
    sizes = sorted({group.num_negatives for group in found})
    if len(sizes) < 2:
        return None
    buckets = []
    for size in sizes:
        own = [group for group in found if group.num_negatives == size]
        anchor = mean_interval([group.anchor for group in own])
        negative = mean_interval([group.negative for group in own])
        buckets.append(Bucket(size, len(own), *anchor, *negative))
    roots = [math.sqrt(group.num_negatives) for group in found]
    means = [math.sqrt(size) for size in sizes]
    alpha = tuple(group.alpha for group in found)
    scaled = tuple(group.anchor / root for group, root in zip(found, roots, strict=True))
    return Signature(
        tuple(buckets),
        anchor=_fit(means, [bucket.anchor for bucket in buckets]),
        negative=_fit([1 / root for root in means], [bucket.negative for bucket in buckets]),
        anchor_groups=_fit(roots, [group.anchor for group in found]),
        negative_groups=_fit([1 / root for root in roots], [group.negative for group in found]),
        alpha=alpha,
        scaled_anchor=scaled,
        alpha_r=_pearson(alpha, scaled),
    )


def _group(rollouts: Sequence[dict[str, Any]]) -> _Group | None:
    trained = [rollout for rollout in rollouts if rollout["raw_advantage"] is not None]
    anchors = [rollout for rollout in trained if rollout["role"] == "anchor"]
    others = [r for r in trained if r["role"] in ("hard_negative", "reflected_failure")]
    is_repaired = any(rollout["role"] == "reflected_success" for rollout in rollouts)
    if is_repaired or not anchors or not others:
        return None
    rewards = np.array([other["reward"] for other in others])
    gap = anchors[0]["reward"] - rewards.mean()
    if gap <= 0:
        return None
    count = len(others)
    return _Group(
        count,
        anchors[0]["raw_advantage"],
        -float(np.mean([other["raw_advantage"] for other in others])),
        float((1 + (count + 1) * rewards.var() / gap**2) ** -0.5),
    )


def _fit(x: Sequence[float], y: Sequence[float]) -> Fit:
    slope, intercept = np.polyfit(x, y, 1)
    return Fit(float(slope), float(intercept), _pearson(x, y) ** 2)


def _pearson(x: Sequence[float], y: Sequence[float]) -> float:
    # Equal values differ by rounding alone, which has no correlation to speak of.
    if min(np.ptp(x), np.ptp(y)) < 1e-9:
        return math.nan
    return float(np.corrcoef(x, y)[0, 1])
