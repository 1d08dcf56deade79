"""Which tokens of a response get credit (Sec. 3.5; Algorithm 1, lines 40-41).

Eq. 11 itself, line 41, is `care_kernels.token_advantages`, called here on these regions.
"""

from collections.abc import Sequence
from itertools import accumulate

import torch

from care_kernels import Regions, token_advantages
from care_train.algorithm.types import Credit, Region, Rollout, TrainSequence
from care_train.config import CareSettings

_NOWHERE = (0, 0)


def token_credit(
    rollout: Rollout, settings: CareSettings, *, is_negative: bool, earns_rationale: bool
) -> Credit:
    """The regions of w_{i,t}: 1 on the answer, gamma+ on a positive's rationale, 0 elsewhere.

    Tags weigh like their region and EOS like the answer unless `decisions.tag_weight` is set. A
    malformed response has one weight throughout.

    Args:
        rollout: the response.
        settings: think_weight, malformed_when and the decisions on tags and malformed responses.
        is_negative: whether it is a negative of its subgroup.
        earns_rationale: whether its rationale tokens weigh gamma+: acc = 1 (line 40), so neither a
            negative nor a pseudo-anchor.
    """
    spans, num_tokens = rollout.spans, len(rollout.token_ids)
    broken = settings.malformed_when == "bad_format" and rollout.format_score < 1
    if not spans.well_formed or (broken and is_negative):
        whole = Region(0, num_tokens, _malformed_weight(is_negative, settings))
        return Credit(_NOWHERE, _NOWHERE, False, (whole,))
    tag, regions = settings.decisions.tag_weight, []
    if tag is not None:
        rationale = settings.think_weight if earns_rationale else 0.0
        # From the outside in: a token that tags and content share counts as content.
        for span, weight in (
            (spans.think, tag),
            (spans.think_content, rationale),
            (spans.answer, tag),
            (spans.answer_content, 1.0),
        ):
            if span is not None:
                regions.append(Region(*span, weight))
    if rollout.finished:
        regions.append(Region(num_tokens - 1, num_tokens, 1.0 if tag is None else tag))
    return Credit(
        spans.think or _NOWHERE,
        spans.answer or _NOWHERE,
        earns_rationale,
        tuple(regions),
        think_weight=settings.think_weight,
    )


def _malformed_weight(is_negative: bool, settings: CareSettings) -> float:
    return float(settings.decisions.malformed == "penalize" and is_negative)


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
        weight_eps=credits[0].weight_eps,
        normalize=credits[0].normalize,
    )


def _stacked_regions(credits: Sequence[Credit], device: torch.device | None) -> Regions:
    """[B, R, 2] spans and [B, R] weights, with empty regions where a sequence has fewer."""
    most = max(len(credit.regions) for credit in credits)
    padded = [(*c.regions, *[Region(0, 0, 0.0)] * (most - len(c.regions))) for c in credits]
    spans = torch.tensor([[(r.start, max(r.start, r.end)) for r in row] for row in padded])
    weights = torch.tensor([[r.weight for r in row] for row in padded], dtype=torch.float64)
    shape = (len(credits), most)
    return Regions(spans.long().reshape(*shape, 2).to(device), weights.reshape(shape).to(device))
