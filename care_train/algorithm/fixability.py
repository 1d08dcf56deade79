"""Which failures a reflection would repair, learnt from the run's own reflections (Sec. 10.2).

A logistic regression on four cheap features of a failure beside its anchor. It is fitted anew to
the last outcomes after every step, in float64 and with a fixed number of Newton's steps, so that
the outcomes alone are its state: a resumed run, and every rank, chooses the same.
"""

from collections.abc import Sequence

import torch

from care_train.algorithm.region_weights import common_length
from care_train.algorithm.selection import is_positive
from care_train.algorithm.types import RolloutGroup, Subgroup

Outcome = tuple[float, ...]
"""The features of a failure that reflected, and 1 where its repair was right, 0 where not."""

MIN_OUTCOMES = 64
"""Fewer, or none of one kind, say nothing yet."""

_MAX_OUTCOMES = 1024  # the policy changes: older ones are of another
_RIDGE = 1.0
_NEWTON_STEPS = 8


class Fixability:
    """Predicts from past reflections whether one on a failure would repair it."""

    def __init__(self, outcomes: Sequence[Outcome] = ()) -> None:
        self._outcomes = list(map(tuple, outcomes))
        self._fit()

    @property
    def outcomes(self) -> list[Outcome]:
        """The state: what it has learnt from, oldest first."""
        return list(self._outcomes)

    def learn(self, outcomes: Sequence[Outcome]) -> None:
        """Fit to these beside the last ones: a step's, of all ranks and in their order."""
        self._outcomes = [*self._outcomes, *outcomes][-_MAX_OUTCOMES:]
        self._fit()

    def log_odds(self, group: RolloutGroup, anchor: int, places: Sequence[int]) -> list[float]:
        """Of a repair, for each of a group's failures; empty while too little is known.

        Args:
            group: with distances and log-prob sums.
            anchor: its place.
            places: the failures'.
        """
        if self._weights is None or not places:
            return []
        features = torch.tensor([features_of(group, anchor, i) for i in places]).double()
        return (self._design(features) @ self._weights).tolist()

    def _fit(self) -> None:
        self._weights: torch.Tensor | None = None
        known = torch.tensor(self._outcomes, dtype=torch.float64)
        repaired = int(known[:, -1].sum()) if len(known) else 0
        if len(known) < MIN_OUTCOMES or repaired in (0, len(known)):
            return
        features, labels = known[:, :-1], known[:, -1]
        self._mean = features.mean(0)
        self._scale = features.std(0, correction=0) + 1e-6
        design = self._design(features)
        ridge = _RIDGE * torch.eye(design.shape[1], dtype=torch.float64)
        ridge[-1, -1] = 0  # the intercept
        weights = torch.zeros(design.shape[1], dtype=torch.float64)
        for _ in range(_NEWTON_STEPS):
            chance = torch.sigmoid(design @ weights)
            gradient = design.T @ (labels - chance) - ridge @ weights
            curvature = (design.T * (chance * (1 - chance))) @ design + ridge
            weights = weights + torch.linalg.solve(curvature, gradient)
        self._weights = weights

    def _design(self, features: torch.Tensor) -> torch.Tensor:
        """[N, 5]: standardised features and a 1."""
        scaled = (features - self._mean) / self._scale
        return torch.cat([scaled, torch.ones(len(scaled), 1, dtype=torch.float64)], dim=1)


def features_of(group: RolloutGroup, anchor: int, place: int) -> Outcome:
    """Distance to the anchor, mean old log-prob, length beyond the anchor's as a share of it, and
    the share of the response before it departs from the anchor."""
    assert group.distances is not None and group.log_prob_sums is not None
    ids, anchor_ids = group.rollouts[place].token_ids, group.rollouts[anchor].token_ids
    length = max(len(ids), 1)
    return (
        float(group.distances[anchor, place]),
        float(group.log_prob_sums[place]) / length,
        (length - len(anchor_ids)) / max(len(anchor_ids), 1),
        common_length(ids, anchor_ids) / length,
    )


def outcomes_of(groups: Sequence[RolloutGroup]) -> list[Outcome]:
    """What the verified reflections of a step's groups teach."""
    found = []
    for group in groups:
        subgroup, reflected = group.subgroup, group.reflected
        if not isinstance(subgroup, Subgroup) or subgroup.reflect_on is None or reflected is None:
            continue
        anchor, negative = subgroup.anchor.index, subgroup.others[subgroup.reflect_on].index
        assert anchor is not None and negative is not None
        found.append((*features_of(group, anchor, negative), float(is_positive(reflected))))
    return found
