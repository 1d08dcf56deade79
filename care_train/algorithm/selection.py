"""Which responses form the subgroup: anchor, hard negatives, reflection, pseudo-anchor.

Eqs. 2-4 (Secs. 3.2-3.3), Sec. 3.6 and the first half of Sec. 3.7; Algorithm 1, lines 3-20 and
22-23. All choices are deterministic: remaining ties go to the lowest rollout index, and the random
selectors take a generator. Nothing here is differentiated.
"""

import re
from collections.abc import Sequence
from dataclasses import replace

import torch

from care_kernels import cosine_distance
from care_train.algorithm.types import Member, Rollout, Subgroup
from care_train.config import CareSettings, Decisions, ReflectionSettings, Selector


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
        candidates = [i for i in candidates if rollouts[i].format_score == 1] or candidates
    if settings.anchor == "random":
        return candidates[int(torch.randint(len(candidates), (1,), generator=generator))]
    return min(
        candidates,
        key=lambda i: (rollouts[i].spans.think_length, rollouts[i].spans.answer_length, i),
    )


def pairwise_distances(embeddings: torch.Tensor) -> torch.Tensor:
    """Eq. 4: d_cos = 1 - h_i . h_j of every two rollouts, [G, G] fp64 from unit vectors [G, D]."""
    vectors = embeddings.double()
    distances = torch.stack([cosine_distance(vectors, vector) for vector in vectors])
    # To what fp32 embeddings resolve: equal rationales must tie, not differ in a last bit.
    return distances.round(decimals=6)


def select_hard_negatives(
    pool: Sequence[int],
    count: int,
    distances: torch.Tensor,
    anchor: int,
    settings: CareSettings,
    generator: torch.Generator | None = None,
    fixability: Sequence[float] = (),
) -> list[int]:
    """N: `count` (K') members of the pool of failures (Sec. 3.3, Eqs. 3-4), nearest first.

    Args:
        pool: indices of failures.
        count: at most len(pool).
        distances: [G, G] `pairwise_distances`.
        anchor: index of the anchor.
        settings: selector and preselect_size.
        generator: for `random`.
        fixability: for `learned`, how likely a repair of each of the pool is; the result then has
            the likeliest first.
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
    between, chosen = distances.tolist(), [ranked[start]]
    while len(chosen) < count:
        rest = [i for i in ranked if i not in chosen]
        # Of ties the first: the nearer to the anchor.
        chosen.append(max(rest, key=lambda i: min(between[i][c] for c in chosen)))
    return chosen


def select_spread(
    pool: Sequence[int], count: int, distances: torch.Tensor, anchor: int
) -> list[int]:
    """`count` failures far from the anchor and from each other: the rescue of `official`."""
    distance = distances[anchor].tolist()
    farthest = max(range(len(pool)), key=lambda place: distance[pool[place]])
    return farthest_first(pool, count, distances, farthest)


def _by_rank(ranked: Sequence[int], count: int, selector: Selector) -> list[int]:
    if selector == "farthest":
        return list(ranked[len(ranked) - count :])
    if selector == "mixed":
        far = count // 2
        return [*ranked[: count - far], *ranked[len(ranked) - far :]]
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


def choose_reflected_negative(
    num_negatives: int, settings: ReflectionSettings, generator: torch.Generator | None = None
) -> int | None:
    """Line 12: which of S's negatives reflects; None with reflection off.

    They stand nearest to the anchor first, so the hardest by d_cos is the first.
    """
    if not settings.enabled or not num_negatives:
        return None
    if settings.negative == "random":
        return int(torch.randint(num_negatives, (1,), generator=generator))
    return 0


def reflection_prefix(negative: Rollout, cue: str, think_tag: str, answer_tag: str) -> str:
    """Line 13: the text forced after the prompt: `<think>`, the failed rationale, the cue.

    The think span stays open, so that the policy re-derives, and the failed answer is dropped. A
    failure that never thought contributes what it wrote before its answer.
    """
    before, opening, after = negative.text.partition(f"<{think_tag}>")
    # Up to the first tag: one left in would close or reopen the span that the cue belongs to.
    tags = rf"</?(?:{re.escape(think_tag)}|{re.escape(answer_tag)})>"
    rationale = re.split(tags, after if opening else before, maxsplit=1)[0]
    return repair_prefix(rationale, cue, think_tag)


def repair_prefix(failed_rationale: str, cue: str, think_tag: str) -> str:
    """`<think>`, a failed rationale and the repair cue, with the think span left open."""
    return f"<{think_tag}>{failed_rationale.strip()}\n{cue}\n"


def merge_reflection(subgroup: Subgroup, reflected: Rollout, settings: CareSettings) -> Subgroup:
    """Lines 15-19: a verified repair replaces its negative; a failed one joins S.

    The reflected rollout never becomes the anchor. One with 0 < acc < 1 is neither and is dropped,
    unless `partial` is `literal`, where all that is not a success has failed.
    """
    position = subgroup.reflect_on
    assert position is not None
    decisions = settings.decisions
    succeeded = is_positive(reflected, decisions.positive)
    failed = is_failure(reflected, decisions.positive) or decisions.partial == "literal"
    if not succeeded and not failed:
        return subgroup
    member = Member(reflected, reflected.reward, is_negative=not succeeded)
    others = list(subgroup.others)
    if succeeded or decisions.failed_reflection == "replace":
        others[position] = member
    else:
        others.append(member)
    return replace(subgroup, others=tuple(others))
