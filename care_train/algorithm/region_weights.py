"""What each token of a response weighs (Sec. 3.5; Algorithm 1, lines 40-41).

Eq. 11 itself, line 41, is `care_kernels.token_advantages`, called here on these regions.
"""

from collections.abc import Sequence
from itertools import accumulate

import torch

from care_kernels import Regions, token_advantages
from care_train.algorithm.types import Credit, Region, Rollout, Subgroup, TrainSequence
from care_train.config import CareSettings, LossSettings


def token_credit(
    rollout: Rollout,
    settings: CareSettings,
    *,
    is_negative: bool,
    earns_rationale: bool,
    departure: int = 0,
) -> Credit:
    """The regions of w_{i,t}: 1 on the answer, gamma+ on a positive's rationale, 0 elsewhere.

    Tags weigh like their region and EOS like the answer unless `decisions.tag_weight` is set. A
    malformed response has one weight throughout.

    Args:
        rollout: the response.
        settings: credit, think_weight, malformed_when and the decisions on tags and
            malformed responses.
        is_negative: whether it is a negative of its subgroup.
        earns_rationale: whether its rationale tokens weigh gamma+: acc = 1 (line 40), so neither a
            negative nor a pseudo-anchor.
        departure: its entry of `departures` where `credit` is `departure`, else 0.
    """
    spans, num_tokens = rollout.spans, len(rollout.token_ids)
    if settings.credit in ("uniform", "departure"):
        return Credit(regions=(Region(departure, num_tokens, 1.0),))
    if settings.credit == "steps":
        return _step_credit(rollout, is_negative=is_negative)
    earns_rationale = earns_rationale or settings.credit == "unmasked"
    broken = settings.malformed_when == "bad_format" and rollout.format_score < 1
    if not spans.well_formed or (broken and is_negative):
        weight = float(is_negative and settings.decisions.malformed == "penalize")
        return Credit(regions=(Region(0, num_tokens, weight),))
    tag = settings.decisions.tag_weight
    think_weight = _think_weight(rollout, settings) if earns_rationale else 0.0
    layers: list[tuple[tuple[int, int] | None, float]] = []
    if tag is not None:
        # From the outside in: a token that tags and content share counts as content.
        layers = [(spans.think, tag), (spans.think_content, think_weight)]
        layers += [(spans.answer, tag), (spans.answer_content, 1.0)]
    elif settings.think_share is not None:
        # A weight of this sequence alone, which Eq. 11's gamma+ cannot be.
        layers = [(spans.think, think_weight), (spans.answer, 1.0)]
    regions = [Region(*span, weight) for span, weight in layers if span is not None]
    if rollout.finished:
        regions.append(Region(num_tokens - 1, num_tokens, 1.0 if tag is None else tag))
    return Credit(
        spans.think or (0, 0),
        spans.answer or (0, 0),
        earns_rationale,
        tuple(regions),
        think_weight=settings.gamma,
    )


def _step_credit(rollout: Rollout, *, is_negative: bool) -> Credit:
    """Sec. 10.2: |A| / T for each token of the verified steps, -|A| / T in the first wrong one.

    What follows a wrong step weighs 0. Where none is named, all T tokens weigh like the response.
    """
    num_tokens = len(rollout.token_ids)
    wrong = rollout.spans.wrong_step
    if wrong is None:
        regions = (Region(0, num_tokens, 1 / num_tokens),)
    else:
        verified = (-1 if is_negative else 1) / num_tokens  # times A, whose sign is the response's
        regions = (Region(0, wrong[0], verified), Region(*wrong, -verified))
    return Credit(regions=regions, normalize=False)


def departures(subgroup: Subgroup) -> list[int]:
    """Where each member of S stops following the others, in the order of `subgroup.members`.

    A negative: its first token that differs from the positive it follows longest. A positive: its
    first token that differs from some negative. What they share before cannot be what made one
    right and the other wrong. A reflected response follows a prompt of its own and departs at once.
    """
    compared = [member for member in subgroup.members if not member.rollout.reflected]
    found = []
    for member in subgroup.members:
        lengths = [
            common_length(member.rollout.token_ids, other.rollout.token_ids)
            for other in compared
            if other.is_negative != member.is_negative
        ]
        if member.rollout.reflected or not lengths:
            found.append(0)
        else:
            found.append(max(lengths) if member.is_negative else min(lengths))
    return found


def common_length(a: Sequence[int], b: Sequence[int]) -> int:
    """How many first tokens two responses share."""
    pairs = zip(a, b, strict=False)
    return next((place for place, (x, y) in enumerate(pairs) if x != y), min(len(a), len(b)))


def _think_weight(rollout: Rollout, settings: CareSettings) -> float:
    """gamma+, or the weight per token that gives the rationale its share of the credit."""
    share, spans = settings.think_share, rollout.spans
    if share is None or spans.think is None or spans.answer is None:
        return settings.gamma
    answer = set(range(*spans.answer))
    rationale = len(set(range(*spans.think)) - answer)
    weight_of_rest = len(answer) + rollout.finished
    return share / (1 - share) * weight_of_rest / max(rationale, 1)


def spread_advantages(
    sequences: Sequence[TrainSequence],
    scales: Sequence[float] | None = None,
    device: torch.device | None = None,
) -> torch.Tensor:
    """Eq. 11's a_it of sequences laid end to end, [N] float32.

    Args:
        sequences: at least one; their credits differ in their regions alone.
        scales: what each sequence's advantage is multiplied by first; None: 1.
        device: where the result goes; None: the CPU.
    """
    lengths = [len(sequence.rollout.token_ids) for sequence in sequences]
    credits = [sequence.credit for sequence in sequences]
    advantages = [sequence.advantage for sequence in sequences]
    if scales is not None:
        advantages = [a * scale for a, scale in zip(advantages, scales, strict=True)]
    return token_advantages(
        torch.tensor(advantages, dtype=torch.float32, device=device),
        torch.tensor([credit.think for credit in credits], device=device),
        torch.tensor([credit.answer for credit in credits], device=device),
        torch.tensor([credit.earns_rationale for credit in credits], device=device),
        regions=_stacked_regions(credits, device),
        cu_seqlens=torch.tensor([0, *accumulate(lengths)], device=device),
        total_tokens=sum(lengths),
        think_weight=max(credit.think_weight for credit in credits),
        normalize=credits[0].normalize,
    )


def split_advantages(sequences: Sequence[TrainSequence]) -> list[torch.Tensor]:
    """`spread_advantages` of each sequence, [T]; of any number of them."""
    if not sequences:
        return []
    lengths = [len(sequence.rollout.token_ids) for sequence in sequences]
    return list(spread_advantages(sequences).split(lengths))


def _stacked_regions(credits: Sequence[Credit], device: torch.device | None) -> Regions:
    """[B, R, 2] spans and [B, R] weights, with empty regions where a sequence has fewer."""
    most = max(len(credit.regions) for credit in credits)
    padded = [(*c.regions, *[Region(0, 0, 0.0)] * (most - len(c.regions))) for c in credits]
    spans = torch.tensor([[(r.start, max(r.start, r.end)) for r in row] for row in padded])
    weights = torch.tensor([[r.weight for r in row] for row in padded], dtype=torch.float64)
    shape = (len(credits), most)
    return Regions(spans.long().reshape(*shape, 2).to(device), weights.reshape(shape).to(device))


def importance_weights(
    trainer: torch.Tensor, engine: Sequence[float], loss: LossSettings
) -> torch.Tensor:
    """[T] pi_trainer / pi_engine: each token's, or the sequence's product or geometric mean.

    Beyond the floor and the cap a weight is cut to them, or 0. An engine samples from a slightly
    other policy: with other kernels, batches and caches, or from weights that are one update old.

    Args:
        trainer: [T] log-probs by the trainer, before the update.
        engine: T log-probs by the engine that sampled.
        loss: the settings that begin with `importance`.

    Source: https://fengyao.notion.site/off-policy-rl (truncated, per token); arXiv:2510.18855
    (IcePop's band); verl's rollout correction (products and geometric means).
    """
    log_ratio = trainer.float().cpu() - torch.tensor(engine)
    level, _, mask = loss.importance_sampling.partition("_")
    if level == "sequence":
        log_ratio = log_ratio.sum().expand_as(log_ratio)
    elif level == "geometric":
        log_ratio = log_ratio.mean().expand_as(log_ratio)
    weights = log_ratio.exp()
    bounded = weights.clamp(*loss.importance_range)
    return weights.where(weights == bounded, 0.0) if mask else bounded
