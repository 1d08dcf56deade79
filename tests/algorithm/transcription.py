"""Algorithm 1 of the paper, copied line by line into plain Python: an oracle for the tests.

It imports nothing of the code under test but the rollout's fields, computes in floats and lists,
and takes every decision the paper leaves open as an explicit argument (`Choices`). The two
constants at the end are what the presets promise, written from their descriptions; the third
preset's rule is `tests/algorithm/released.py`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from care_train.algorithm.types import Rollout


@dataclass(frozen=True, kw_only=True)
class Choices:
    """Algorithm 1's inputs, then what it leaves open. The values are the default preset's."""

    K: int = 4
    M: int = 6
    s: float = 0.5
    s_refl: float | None = None
    gamma: float = 0.005
    lam: float = 0.1
    delta: float = 0.1
    eps: float = 1e-6
    eps_w: float = 1e-8

    positive_is: str = "acc is 1"  # or: "reward above 0"
    partial_is: str = "neither"  # or: "not positive" (lines 17 and 21 are plain elses)
    well_formatted_anchor_first: bool = True
    selector: str = "cosine_diverse"
    reflection: bool = True
    failed_reflection: str = "append"  # or: "replace"
    repaired_advantage: str = "raw"  # or: "penalized" (line 37)
    rescue: float = 1.0
    pseudo_anchor_score: str = "mean"  # or: "sum"
    pseudo_anchor_well_formatted: bool = True
    rescue_negatives: str = "others"  # or: "failures" (line 23)
    K_S_is: str = "failures"  # or: "below the anchor" (line 26)
    clamp_anchor: bool = True
    equalize: bool = True
    tag_weight: float | None = None
    malformed: str = "penalize"  # or: "ignore"
    malformed_negative_is: str = "without answer"  # or: "of fmt below 1"


@dataclass(frozen=True)
class Draws:
    """What chance decided elsewhere: this file draws nothing itself."""

    negatives: tuple[int, ...] | None = None
    reflect_on: int | None = None


@dataclass
class Item:
    """A member of S."""

    y: Rollout
    r: float
    name: object
    failed: bool
    positive: bool
    A_raw: float = 0.0
    A: float = 0.0
    tokens: tuple[float, ...] = ()


@dataclass
class Outcome:
    """S, its anchor first, after line 41."""

    S: list[Item]
    K_S: int
    y_neg: int | None


def algorithm_1(
    Y: Sequence[Rollout],
    h: Sequence[Sequence[float]],
    log_pi_old: Sequence[float],
    y_rgr: Rollout | None,
    c: Choices,
    draws: Draws = Draws(),
) -> Outcome | None:
    """Lines 1-41; None where a line says skip."""
    # line 2
    r = [(1.0 - c.lam) * y.accuracy + c.lam * y.format_score for y in Y]

    # line 3
    def is_positive(acc: float, reward: float) -> bool:
        return reward > 0 if c.positive_is == "reward above 0" else acc == 1

    def is_failure(acc: float, reward: float) -> bool:
        return reward <= 0 if c.positive_is == "reward above 0" else acc == 0

    P = [i for i in range(len(Y)) if is_positive(Y[i].accuracy, r[i])]
    F = [i for i in range(len(Y)) if is_failure(Y[i].accuracy, r[i])]

    y_neg = None
    if P:  # line 4
        # line 5
        a = shortest(Y, P, c)
        # lines 6-8
        K_prime = min(c.K, len(F))
        if K_prime == 0:
            return None
        # line 9
        N = anchor_aware_negatives(F, K_prime, a, h, c, draws)
        # line 10
        S = [Item(Y[a], r[a], a, failed=False, positive=True)]
        S += [Item(Y[j], r[j], j, failed=True, positive=False) for j in N]
        if c.reflection:  # line 11
            # line 12: N stands nearest first
            y_neg = N[0] if draws.reflect_on is None else draws.reflect_on
            if y_rgr is not None:  # lines 13-14: sampled by the caller
                r_rgr = (1.0 - c.lam) * y_rgr.accuracy + c.lam * y_rgr.format_score
                place = next(k for k in range(len(S)) if S[k].name == y_neg)
                if is_positive(y_rgr.accuracy, r_rgr):  # lines 15-16
                    S[place] = Item(y_rgr, r_rgr, "rgr", failed=False, positive=True)
                elif (
                    is_failure(y_rgr.accuracy, r_rgr) or c.partial_is == "not positive"
                ):  # lines 17-18
                    item = Item(y_rgr, r_rgr, "rgr", failed=True, positive=False)
                    if c.failed_reflection == "replace":
                        S[place] = item
                    else:
                        S = [*S, item]
    else:  # line 21
        if not c.rescue or not F:
            return None
        if len(F) < len(Y) and c.partial_is == "neither":
            return None
        # line 22
        candidates = [i for i in F if Y[i].format_score == 1 or not c.pseudo_anchor_well_formatted]
        if not candidates:
            return None
        t = candidates[0]
        for i in candidates:
            if likelihood(Y, log_pi_old, i, c) > likelihood(Y, log_pi_old, t, c):
                t = i
        # line 23
        others = [i for i in F if i != t]
        K_prime = min(c.K, len(others) if c.rescue_negatives == "others" else len(F))
        N = anchor_aware_negatives(others, min(K_prime, len(others)), t, h, c, draws)
        # line 24
        S = [Item(Y[t], c.delta, t, failed=False, positive=False)]
        S += [Item(Y[j], -c.delta / K_prime, j, failed=True, positive=False) for j in N]

    # lines 26-28
    if c.K_S_is == "failures":
        K_S = sum(item.failed for item in S[1:])
    else:
        K_S = sum(item.r < S[0].r for item in S[1:])
    if K_S == 0:
        return None

    # line 29
    mu, sigma = center_and_scale([item.r for item in S], c)
    # lines 30-33
    for item in S:
        item.A_raw = (item.r - mu) / sigma
    # line 34
    S[0].A = S[0].A_raw
    if c.clamp_anchor and S[0].A < 0:
        S[0].A = 0.0
    # lines 35-38
    for item in S[1:]:
        s_y = c.s
        if item.name == "rgr" and item.failed:
            s_y = c.s / 2 if c.s_refl is None else c.s_refl
        if item.failed or c.repaired_advantage == "penalized":
            item.A = -s_y * abs(item.A_raw)
        else:
            item.A = item.A_raw
    # line 39
    factor = math.sqrt(c.K / K_S) if c.equalize and K_S < c.K else 1.0
    if not P:
        factor *= c.rescue
    for item in S:
        item.A *= factor
    # lines 40-41
    for item in S:
        w = [weight(item, t, c) for t in range(len(item.y.token_ids))]
        item.tokens = tuple(item.A * w_t / (sum(w) + c.eps_w) for w_t in w)
    return Outcome(S, K_S, y_neg)


def shortest(Y: Sequence[Rollout], P: list[int], c: Choices) -> int:
    """Eq. 2, ties toward shorter answers, then the lowest index."""
    if c.well_formatted_anchor_first and any(Y[i].format_score == 1 for i in P):
        P = [i for i in P if Y[i].format_score == 1]
    best = P[0]
    for i in P:
        T_think, T_ans = length(Y[i].spans.think_content), length(Y[i].spans.answer_content)
        best_think = length(Y[best].spans.think_content)
        best_ans = length(Y[best].spans.answer_content)
        if T_think < best_think or (T_think == best_think and T_ans < best_ans):
            best = i
    return best


def length(span: tuple[int, int] | None) -> int:
    return 0 if span is None else span[1] - span[0]


def likelihood(Y: Sequence[Rollout], log_pi_old: Sequence[float], i: int, c: Choices) -> float:
    """What line 22 maximises."""
    if c.pseudo_anchor_score == "sum":
        return log_pi_old[i]
    return log_pi_old[i] / len(Y[i].token_ids)


def anchor_aware_negatives(
    F: list[int],
    K_prime: int,
    anchor: int,
    h: Sequence[Sequence[float]],
    c: Choices,
    draws: Draws,
) -> list[int]:
    """Sec. 3.3: nearest to the anchor first; ties to the lowest index."""
    if draws.negatives is not None:
        return list(draws.negatives)

    def d_cos(i: int, j: int) -> float:
        return 1.0 - sum(x * y for x, y in zip(h[i], h[j], strict=True))

    ranked = sorted(F, key=lambda i: d_cos(i, anchor))  # sorted() keeps the order of ties
    if c.selector == "farthest":
        return ranked[len(ranked) - K_prime :]
    if c.selector == "mixed":
        far = K_prime // 2
        return ranked[: K_prime - far] + ranked[len(ranked) - far :]
    if c.selector != "cosine_diverse" or min(c.M, len(F)) <= K_prime:
        return ranked[:K_prime]
    pool = ranked[: c.M]
    chosen = [pool[0]]
    while len(chosen) < K_prime:
        best, best_gap = None, -math.inf
        for i in pool:
            if i in chosen:
                continue
            gap = min(d_cos(i, j) for j in chosen)
            if gap > best_gap:  # a tie stays with the nearer, which comes first
                best, best_gap = i, gap
        assert best is not None
        chosen.append(best)
    return [i for i in ranked if i in chosen]


def center_and_scale(r: list[float], c: Choices) -> tuple[float, float]:
    """Eqs. 5-6."""
    mu = sum(r) / len(r)
    return mu, math.sqrt(sum((x - mu) ** 2 for x in r) / len(r)) + c.eps


def weight(item: Item, t: int, c: Choices) -> float:
    """Line 40, and what tags, EOS and malformed responses weigh."""
    spans = item.y.spans
    bad_format = item.failed and item.y.format_score < 1
    if spans.answer is None or (c.malformed_negative_is == "of fmt below 1" and bad_format):
        return 1.0 if c.malformed == "penalize" and item.failed else 0.0
    think_weight = c.gamma if item.positive else 0.0
    if item.y.finished and t == len(item.y.token_ids) - 1:
        return 1.0 if c.tag_weight is None else c.tag_weight
    if inside(t, spans.answer_content):
        return 1.0
    if inside(t, spans.answer):
        return 1.0 if c.tag_weight is None else c.tag_weight
    if inside(t, spans.think_content):
        return think_weight
    if inside(t, spans.think):
        return think_weight if c.tag_weight is None else c.tag_weight
    return 0.0


def inside(t: int, span: tuple[int, int] | None) -> bool:
    return span is not None and span[0] <= t < span[1]


DEFAULT = Choices()
"""Every question answered as the table of decisions has it."""

LITERAL = replace(
    DEFAULT,
    well_formatted_anchor_first=False,
    partial_is="not positive",
    repaired_advantage="penalized",
    pseudo_anchor_score="sum",
    pseudo_anchor_well_formatted=False,
    rescue_negatives="failures",
    K_S_is="below the anchor",
    clamp_anchor=False,
    tag_weight=0.0,
    malformed="ignore",
)
"""Algorithm 1 to the letter: only <answer> and <think> content has a weight."""
