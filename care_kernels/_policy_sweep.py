"""The sweep behind `linear_policy_loss`: which rows run, in which order, and what comes out.

Shape letters: N rows, M rows that reach a GEMM, D hidden, V vocabulary.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from care_kernels._head_chunks import HeadChunks, HeadGradients
from care_kernels._logit_chunk import Head
from care_kernels._records import join, overwrite, spread, take
from care_kernels.objective import (
    ClipRange,
    SequenceGroups,
    Surrogate,
    sampled_kl,
    sequence_surrogate,
    token_surrogate,
    weighted,
)
from care_kernels.row_softmax import LogitTransform, RowGradients, RowStatistics
from care_kernels.vocab_parallel import VocabShard


class RowTerms(NamedTuple):
    """The constants of each row, [N] or [M], detached and in compute precision."""

    advantages: Tensor
    """Multiplied by the importance weights."""
    old_log_probs: Tensor | None
    ref_log_probs: Tensor | None
    kl_weights: Tensor | None
    entropy_weights: Tensor | None


class RowOutcome(NamedTuple):
    """What the sweep found for each row, [M], or [N] once the skipped rows are filled in."""

    value: Tensor
    log_probs: Tensor
    entropy: Tensor | None
    kl: Tensor | None
    ratio: Tensor
    clipped_low: Tensor
    clipped_high: Tensor


SKIPPED_ROW = (0.0, 0.0, 0.0, 0.0, 1.0, False, False)


@dataclass(frozen=True)
class PolicyProblem:
    """One call's constants: everything but hidden, head weight and bias."""

    target_ids: Tensor
    terms: RowTerms
    transform: LogitTransform
    clip: ClipRange
    kl_estimator: str
    sequence_ids: Tensor | None
    """[N], given where the ratio is a sequence's."""
    ref_hidden: Tensor | None
    ref_head_weight: Tensor | None
    chunk_rows: int | None
    backend: str
    report_all_rows: bool
    vocab_shard: VocabShard | None
    weight_grad: Tensor | None


@torch.no_grad()
def evaluate(
    hidden: Tensor,
    head: Head,
    problem: PolicyProblem,
    rows: Tensor,
    wanted: tuple[bool, ...],
) -> tuple[Tensor, RowOutcome, HeadGradients | None]:
    """Run the rows [M]; return the loss, their outcome spread over [N] and the wanted gradients.

    The loss sums over the M rows alone, so that rows which are skipped do not even change the
    order of its sum.

    `wanted` says which of (hidden, weight, bias) need a gradient; with none of them the sweep stops
    at the statistics, one GEMM.
    """
    num_rows = hidden.shape[0]
    outcome, gradients = _evaluate_rows(hidden, head, problem, rows, wanted)
    loss = outcome.value.sum()
    full = spread(outcome, rows, num_rows, SKIPPED_ROW)
    if problem.report_all_rows:
        others = torch.ones(num_rows, dtype=torch.bool, device=rows.device).index_fill_(
            0, rows, False
        )
        rest = others.nonzero()[:, 0]
        reported, _ = _evaluate_rows(hidden, head, problem, rest, (False, False, False))
        full = overwrite(full, rest, reported)
    return loss, full, gradients


def _evaluate_rows(
    hidden: Tensor, head: Head, problem: PolicyProblem, rows: Tensor, wanted: tuple[bool, ...]
) -> tuple[RowOutcome, HeadGradients | None]:
    """The outcome of the given rows [M], with the wanted gradients."""
    terms, reference = take(problem.terms, rows), _reference(head, problem)
    if reference is not None and problem.kl_estimator != "exact":
        sampled = HeadChunks(
            *reference,
            problem.target_ids,
            rows,
            problem.chunk_rows,
            problem.backend,
            vocab_shard=problem.vocab_shard,
        )
        ref_log_probs = sampled.all_statistics().log_probs
        terms = terms._replace(ref_log_probs=ref_log_probs.to(terms.advantages.dtype))
        reference = None
    chunks = HeadChunks(
        hidden,
        head,
        problem.target_ids,
        rows,
        problem.chunk_rows,
        problem.backend,
        with_entropy=terms.entropy_weights is not None,
        with_gradients=any(wanted),
        reference=reference,
        vocab_shard=problem.vocab_shard,
    )
    gradients = chunks.new_gradients(wanted, problem.weight_grad) if any(wanted) else None
    outcome = _sweep(chunks, terms, problem, rows, gradients)
    return outcome, gradients


def active_rows(terms: RowTerms, sequence_ids: Tensor | None) -> Tensor:
    """Indices [M] of the rows with a say: an advantage, a KL weight or an entropy weight.

    With sequence ids a row also has a say in its neighbours' ratio, so sequences stay whole.
    """
    active = terms.advantages != 0
    for weights in (terms.kl_weights, terms.entropy_weights):
        if weights is not None:
            active = active | (weights != 0)
    if sequence_ids is not None:
        groups = SequenceGroups.from_ids(sequence_ids)
        active = groups.sum(active.to(terms.advantages.dtype)) > 0
    return active.nonzero()[:, 0]


def _sweep(
    chunks: HeadChunks,
    terms: RowTerms,
    problem: PolicyProblem,
    rows: Tensor,
    gradients: HeadGradients | None,
) -> RowOutcome:
    """One pass, or two where a ratio needs whole sequences and gradients are wanted."""
    surrogate = None
    if problem.sequence_ids is not None:
        groups = SequenceGroups.from_ids(problem.sequence_ids.index_select(0, rows))
        log_ratio, stats = torch.zeros_like(terms.advantages), None
        if terms.old_log_probs is not None:
            stats = chunks.all_statistics()
            log_ratio = stats.log_probs - terms.old_log_probs
        surrogate = sequence_surrogate(log_ratio, terms.advantages, problem.clip, groups)
        if stats is not None and gradients is None:
            return _outcome(stats, surrogate, terms, problem.kl_estimator)[0]
    outcomes: list[RowOutcome] = []
    for chunk in chunks:
        stats, part = chunks.project(chunk), take(terms, chunk)
        if surrogate is None:
            outcome, upstream = _token_outcome(stats, part, problem)
        else:
            part_surrogate = take(surrogate, chunk)
            outcome, upstream = _outcome(stats, part_surrogate, part, problem.kl_estimator)
        outcomes.append(outcome)
        if gradients is not None:
            chunks.add_gradients(chunk, stats, upstream, gradients)
    return join(outcomes)


def _token_outcome(
    stats: RowStatistics, terms: RowTerms, problem: PolicyProblem
) -> tuple[RowOutcome, RowGradients]:
    """`_outcome` where each row's ratio is its own: one Triton kernel, or torch operations."""
    if problem.backend == "triton" and terms.advantages.dtype == torch.float32:
        return _triton_outcome(stats, terms, problem)
    old = stats.log_probs if terms.old_log_probs is None else terms.old_log_probs
    surrogate = token_surrogate(stats.log_probs - old, terms.advantages, problem.clip)
    return _outcome(stats, surrogate, terms, problem.kl_estimator)


def _triton_outcome(
    stats: RowStatistics, terms: RowTerms, problem: PolicyProblem
) -> tuple[RowOutcome, RowGradients]:
    from care_kernels.triton.objective import row_objective

    row = row_objective(
        stats.log_probs,
        terms.advantages,
        problem.clip,
        old_log_probs=terms.old_log_probs,
        kl_estimator=problem.kl_estimator,
        kl_weights=terms.kl_weights,
        ref_log_probs=terms.ref_log_probs,
        exact_kl=stats.kl,
        entropy=stats.entropy,
        entropy_weights=terms.entropy_weights,
    )
    outcome = RowOutcome(
        row.value,
        stats.log_probs,
        stats.entropy,
        row.kl,
        row.ratio,
        row.clipped_low,
        row.clipped_high,
    )
    return outcome, _row_gradients(row.grad_log_probs, terms, problem.kl_estimator)


def _outcome(
    stats: RowStatistics, surrogate: Surrogate, terms: RowTerms, kl_estimator: str
) -> tuple[RowOutcome, RowGradients]:
    """Put the summands of Eq. 13 together: each row's value, and its derivatives."""
    kl, g = stats.kl, -surrogate.grad_log_probs
    if kl_estimator != "exact" and terms.kl_weights is not None:
        assert terms.ref_log_probs is not None
        kl, kl_slope = sampled_kl(kl_estimator, stats.log_probs, terms.ref_log_probs)
        g = g + weighted(terms.kl_weights, kl_slope)
    value = (
        weighted(terms.kl_weights, kl)
        - weighted(terms.entropy_weights, stats.entropy)
        - surrogate.value
    )
    outcome = RowOutcome(
        value,
        stats.log_probs,
        stats.entropy,
        kl,
        surrogate.ratio,
        surrogate.clipped_low,
        surrogate.clipped_high,
    )
    return outcome, _row_gradients(g, terms, kl_estimator)


def _row_gradients(g: Tensor, terms: RowTerms, kl_estimator: str) -> RowGradients:
    d_entropy = None if terms.entropy_weights is None else -terms.entropy_weights
    return RowGradients(g, d_entropy, terms.kl_weights if kl_estimator == "exact" else None)


def _reference(head: Head, problem: PolicyProblem) -> tuple[Tensor, Head] | None:
    if problem.ref_hidden is None:
        return None
    weight = head.weight if problem.ref_head_weight is None else problem.ref_head_weight
    return problem.ref_hidden, Head(weight, head.bias, head.transform)
