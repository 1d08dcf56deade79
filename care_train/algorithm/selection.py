"""Which rollouts form the subgroup: anchor, hard negatives, pseudo-anchor.

Eqs. 2-4 (Secs. 3.2-3.3) and the first half of Sec. 3.7; Algorithm 1, lines 3-10 and 22-23.
All choices are deterministic: remaining ties go to the lowest rollout index, and the random
selectors take a generator. Nothing here is differentiated.
"""

from collections.abc import Sequence

import torch

from care_kernels import cosine_distance
from care_train.algorithm.types import Rollout
from care_train.config import CareSettings, Decisions, Selector


def is_positive(rollout: Rollout, by: str = "accuracy") -> bool:
    """acc = 1 (Eq. 2), or reward > 0 where `by` is "reward"."""
    return rollout.reward > 0 if by == "reward" else rollout.accuracy == 1


def is_failure(rollout: Rollout, by: str = "accuracy") -> bool:
    """acc = 0 (Sec. 3.3), or reward <= 0 where `by` is "reward"."""
    return rollout.reward <= 0 if by == "reward" else rollout.accuracy == 0


def positives(rollouts: Sequence[Rollout], by: str = "accuracy") -> list[int]:
    """P: indices of the positives."""
    return [i for i, rollout in enumerate(rollouts) if is_positive(rollout, by)]


def failures(rollouts: Sequence[Rollout], by: str = "accuracy") -> list[int]:
    """F: indices of the failures."""
    return [i for i, rollout in enumerate(rollouts) if is_failure(rollout, by)]


def select_anchor(
    rollouts: Sequence[Rollout],
    candidates: Sequence[int],
    settings: CareSettings,
    generator: torch.Generator | None = None,
) -> int:
    """Eq. 2: the positive with the fewest think tokens, then the fewest answer tokens.

    Args:
        rollouts: the group.
        candidates: P, not empty.
        settings: `decisions.anchor_prefers_format` puts positives with fmt = 1 first.
        generator: for `anchor: random`.
    """
    assert candidates, "an anchor needs a positive"
    if settings.decisions.anchor_prefers_format:
        best = max(rollouts[i].format_score for i in candidates)
        if best == 1:
            candidates = [i for i in candidates if rollouts[i].format_score == 1]
    if settings.anchor == "random":
        return candidates[_randint(len(candidates), generator)]
    return min(
        candidates,
        key=lambda i: (rollouts[i].spans.think_length, rollouts[i].spans.answer_length, i),
    )


def pairwise_distances(embeddings: torch.Tensor) -> torch.Tensor:
    """Eq. 4: d_cos = 1 - h_i . h_j of every two rollouts, [G, G] fp64 from unit vectors [G, D]."""
    vectors = embeddings.double()
    return _round(torch.stack([cosine_distance(vectors, vector) for vector in vectors]))


def select_hard_negatives(
    pool: Sequence[int],
    count: int,
    distances: torch.Tensor,
    anchor: int,
    settings: CareSettings,
    generator: torch.Generator | None = None,
    fixability: Sequence[float] = (),
) -> list[int]:
    """N: `count` members of the failure pool (Sec. 3.3, Eqs. 3-4), nearest to the anchor first.

    Args:
        pool: indices of failures.
        count: K', at most len(pool).
        distances: [G, G] `pairwise_distances`.
        anchor: index of the anchor.
        settings: selector and preselect_size.
        generator: for `random`.
        fixability: for `learned`, of each of the pool how likely it is to be repaired; the result
            has the likeliest first.
    """
    assert count <= len(pool)
    if fixability:
        likely = dict(zip(pool, fixability, strict=True))
        return sorted(pool, key=lambda i: (-likely[i], distances[anchor, i].item(), i))[:count]
    if settings.selector == "random":
        order = torch.randperm(len(pool), generator=generator).tolist()
        pool = [pool[i] for i in order[:count]]
    distance = distances[anchor].tolist()
    ranked = sorted(pool, key=lambda i: (distance[i], i))
    if settings.selector in ("cosine_diverse", "learned") and settings.preselect_size > count:
        nearest = ranked[: settings.preselect_size]
        chosen = farthest_first(nearest, count, distances)
    else:
        chosen = _by_rank(ranked, count, settings.selector)
    return sorted(chosen, key=lambda i: (distance[i], i))


def farthest_first(
    ranked: Sequence[int], count: int, distances: torch.Tensor, start: int = 0
) -> list[int]:
    """The brief de-duplication of Sec. 3.3: greedy max-min cosine distance among the chosen.

    Args:
        ranked: preselected indices, nearest to the anchor first; ties go to the nearer.
        count: how many to keep.
        distances: [G, G] `pairwise_distances`.
        start: the place in `ranked` of the one to begin with.
    """
    if count >= len(ranked):
        return list(ranked)
    between = distances[list(ranked)][:, list(ranked)]
    chosen = [start]
    while len(chosen) < count:
        gap = between[:, chosen].min(dim=1).values
        gap[chosen] = -torch.inf
        # argmax of ties must be the first: the nearer to the anchor.
        chosen.append(int((gap == gap.max()).nonzero()[0]))
    return [ranked[i] for i in chosen]


def select_spread(
    pool: Sequence[int], count: int, distances: torch.Tensor, anchor: int
) -> list[int]:
    """`count` failures far from the anchor and from each other: the rescue of `official`."""
    distance = distances[anchor][list(pool)]
    farthest = int((distance == distance.max()).nonzero()[0])
    return farthest_first(pool, count, distances, farthest)


def _by_rank(ranked: Sequence[int], count: int, selector: Selector) -> list[int]:
    if selector == "farthest":
        return list(ranked[len(ranked) - count :])
    if selector == "mixed":
        near = (count + 1) // 2
        far = count - near
        return list(ranked[:near]) + list(ranked[len(ranked) - far :] if far else [])
    return list(ranked[:count])


def select_proxy_anchor(
    rollouts: Sequence[Rollout],
    pool: Sequence[int],
    log_prob_sums: torch.Tensor,
    decisions: Decisions,
) -> int | None:
    """t (Sec. 3.7): the failure the old policy finds likeliest; None where none qualifies.

    Args:
        rollouts: the group.
        pool: F.
        log_prob_sums: [G] log pi_old(y | x).
        decisions: `proxy_score` (mean per token, or the sum) and `proxy_requires_format`.
    """
    if decisions.proxy_requires_format:
        pool = [i for i in pool if rollouts[i].format_score == 1]
    if not pool:
        return None
    sums = log_prob_sums.tolist()

    def score(i: int) -> float:
        tokens = max(len(rollouts[i].token_ids), 1)
        return sums[i] / tokens if decisions.proxy_score == "mean" else sums[i]

    return max(pool, key=lambda i: (score(i), -i))


def _round(distances: torch.Tensor) -> torch.Tensor:
    """To what fp32 embeddings resolve: equal rationales must tie, not differ in a last bit."""
    return distances.round(decimals=6)


def _randint(high: int, generator: torch.Generator | None) -> int:
    return int(torch.randint(high, (1,), generator=generator))
