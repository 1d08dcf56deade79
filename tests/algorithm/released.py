"""The authors' released rule in plain Python over one batch: an oracle for `preset: official`.

Written from the code's behaviour (github.com/yongxinwang-ai/CARE at 8c6045c), on lists and floats;
it imports nothing of the code under test. A batch is B responses in the order of sampling, with the
reflections behind them.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

Tags = dict[str, list[tuple[int, ...]]]
"""`think`, `/think`, `answer`, `/answer`: the token sequences each may be."""


@dataclass(frozen=True)
class Response:
    """One sampled response."""

    uid: str
    tokens: tuple[int, ...]
    reward: float
    log_prob: float = 0.0
    embedding: tuple[float, ...] = ()


@dataclass
class Outcome:
    """Token advantages of the batch and its reflections, and what the log files say."""

    responses: list[Response]
    advantages: list[list[float]]
    care_events: list[dict] = field(default_factory=list)
    rgr_events: list[dict] = field(default_factory=list)


def between(tokens: Sequence[int], tags: Tags, name: str) -> tuple[int, int]:
    """First opening tag to the first closing one behind it, or to the end; (0, 0): none."""
    found = [
        (i, i + len(tag))
        for tag in tags[name]
        for i in range(len(tokens))
        if tuple(tokens[i : i + len(tag)]) == tag
    ]
    if not found:
        return 0, 0
    begin = min(found)[0]
    # Of two spellings at one place the first of the list counts, as its search is strict.
    inside = next(
        i + len(tag)
        for tag in tags[name]
        for i in [begin]
        if tuple(tokens[i : i + len(tag)]) == tag
    )
    closings = [
        i
        for tag in tags["/" + name]
        for i in range(inside, len(tokens))
        if tuple(tokens[i : i + len(tag)]) == tag
    ]
    end = min([*closings, len(tokens)])
    return (inside, end) if end > inside else (0, 0)


def distance(a: Sequence[float], b: Sequence[float]) -> float:
    return 1.0 - sum(x * y for x, y in zip(a, b, strict=True))


def spread_out(chosen: list[int], pool: list[int], count: int, batch: list[Response]) -> list[int]:
    """Farthest-first from what is chosen."""
    chosen = list(chosen)
    while len(chosen) < count:
        gaps = {
            i: min(distance(batch[i].embedding, batch[j].embedding) for j in chosen)
            for i in pool
            if i not in chosen
        }
        chosen.append(max(gaps, key=lambda i: gaps[i]))
    return chosen


def z_scores(values: list[float], eps: float) -> list[float]:
    mean = sum(values) / len(values)
    sigma = math.sqrt(sum((v - mean) ** 2 for v in values) / len(values)) + eps
    return [(v - mean) / sigma for v in values]


def token_advantages(
    tokens: Sequence[int], reward: float, advantage: float, tags: Tags, gamma: float
) -> list[float]:
    """Region weights: 1 between the answer tags, plus gamma between a positive's think tags."""
    n = len(tokens)
    answer, think = between(tokens, tags, "answer"), between(tokens, tags, "think")
    answer = (0, n) if answer == (0, 0) else answer
    think = (0, n) if think == (0, 0) else think
    gamma = gamma if reward > 0 else 0.0
    weights = [
        float(answer[0] <= t < answer[1]) + gamma * (think[0] <= t < think[1]) for t in range(n)
    ]
    return [advantage * w / max(sum(weights), 1e-6) for w in weights]


def released_rule(
    batch: list[Response],
    repair_of: Callable[[str, int], Response | None],
    tags: Tags,
    *,
    K: int = 4,
    M: int = 6,
    s: float = 0.5,
    gamma: float = 0.005,
    delta: float = 0.1,
    eps: float = 1e-6,
) -> Outcome:
    """What the release trains of a batch.

    Args:
        batch: all responses.
        repair_of: the reflection that was sampled for a group, by its uid and the failed response.
        tags: how tags are tokenised.
    """
    everything, advantages = list(batch), [0.0] * len(batch)
    outcome = Outcome(everything, [])
    uids = list(dict.fromkeys(response.uid for response in batch))
    for number, uid in enumerate(uids):
        group = [i for i, response in enumerate(batch) if response.uid == uid]
        good = [i for i in group if batch[i].reward > 0]
        bad = [i for i in group if not batch[i].reward > 0]
        failed_repair = None
        if good and bad:
            lengths = {}
            for i in good:
                tokens = batch[i].tokens
                spans = [between(tokens, tags, name) for name in ("think", "answer")]
                lengths[i] = tuple(end - begin or len(tokens) for begin, end in spans)
            anchor = min(good, key=lambda i: lengths[i])
            by_distance = {i: distance(batch[i].embedding, batch[anchor].embedding) for i in bad}
            pool = sorted(bad, key=lambda i: by_distance[i])[:M]
            members = spread_out(pool[:1], pool, min(K, len(pool)), batch)
            repair = repair_of(uid, members[0])
            if repair is not None:
                members[0] = len(everything)
                everything.append(repair)
                advantages.append(0.0)
                failed_repair = members[0] if repair.reward <= 0 else None
                lengths_of = [
                    end - begin
                    for begin, end in (between(repair.tokens, tags, n) for n in ("think", "answer"))
                ]
                outcome.rgr_events.append(
                    {
                        "group": number,
                        "group_uid": uid,
                        "triggered": True,
                        "passed": repair.reward > 0,
                        "replaced_original_failure": True,
                        "s_refl_used": s / 2,
                        "template": "structured",
                        "critique_len": lengths_of[0],
                        "final_len": lengths_of[1],
                    }
                )
            rewards = [everything[i].reward for i in (anchor, *members)]
        elif not good and len(group) > 1:
            anchor = max(group, key=lambda i: batch[i].log_prob)
            others = [i for i in group if i != anchor]
            count = min(K, len(others))
            first = max(others, key=lambda i: distance(batch[i].embedding, batch[anchor].embedding))
            members = spread_out([first], others, count, batch)
            rewards = [delta] + [-delta / count] * count
        else:
            continue
        factor = math.sqrt(K / len(members))
        for i, raw in zip((anchor, *members), z_scores(rewards, eps), strict=True):
            is_negative = i != anchor and everything[i].reward <= 0
            scale = s / 2 if i == failed_repair else s
            advantages[i] = factor * (-scale * abs(raw) if is_negative else raw)
        outcome.care_events.append(
            {
                "group": float(number),
                "G": float(len(group)),
                "K": float(K),
                "K_prime": float(len(members)),
                "has_positive": float(bool(good)),
                "anchor_idx": float(anchor),
                "neg_scale_s": s,
                "equalize_factor": factor,
                "rescue_triggered": float(not good),
                "rescue_delta": delta,
            }
        )
    outcome.advantages = [
        token_advantages(response.tokens, response.reward, advantage, tags, gamma)
        for response, advantage in zip(everything, advantages, strict=True)
    ]
    return outcome
