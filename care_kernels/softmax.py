"""Softmax over the rows of one chunk of logits: statistics, then gradients.

With p = softmax(z), l = log p_y, H = -sum_j p_j log p_j and K = sum_j p_j (log p_j - log q_j):

    dL/dz_j = g (1[j=y] - p_j) + lambda p_j (log p_j + H) + kappa p_j (log p_j - log q_j - K)

where g = dL/dl, lambda = -dL/dH and kappa = dL/dK. Everything here works on vocabulary tiles, so
beside the chunk itself only [C, VOCAB_TILE] temporaries exist.

Shape letters: C rows of the chunk, V vocabulary.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

VOCAB_TILE = 4096


@dataclass(frozen=True)
class LogitTransform:
    """z = softcap * tanh(scale * raw / softcap) / temperature, or scale * raw / temperature."""

    temperature: float = 1.0
    softcap: float | None = None
    scale: float = 1.0

    def apply_(self, raw: Tensor) -> None:
        """Turn raw logits into z, in place."""
        if self.softcap is None:
            raw.mul_(self.scale / self.temperature)
        else:
            raw.mul_(self.scale / self.softcap).tanh_().mul_(self.softcap / self.temperature)

    def slope(self, z: Tensor) -> Tensor | float:
        """dz / draw, from z itself: tanh = z * temperature / softcap."""
        linear = self.scale / self.temperature
        if self.softcap is None:
            return linear
        return (z * (self.temperature / self.softcap)).square_().neg_().add_(1).mul_(linear)


class RowStatistics(NamedTuple):
    """What one row of logits says, each [C] in the chunk's dtype.

    The log-normaliser stays split into `max_logit` and `log_total`: their sum would be rounded to
    the spacing of large logits (1e-3 at 1e4 in float32).
    """

    log_probs: Tensor
    max_logit: Tensor
    log_total: Tensor
    entropy: Tensor | None = None
    kl: Tensor | None = None
    """Exact, over the vocabulary."""
    ref_max_logit: Tensor | None = None
    ref_log_total: Tensor | None = None


class RowGradients(NamedTuple):
    """Derivatives of the loss for each row, each [C]; None stands for zero."""

    log_probs: Tensor
    """g = dL/dl."""
    entropy: Tensor | None = None
    """dL/dH, the negative of lambda."""
    kl: Tensor | None = None
    """kappa = dL/dK of the exact KL."""


def vocab_tiles(vocab_size: int) -> Iterator[slice]:
    """Consecutive slices that cover the vocabulary."""
    for start in range(0, vocab_size, VOCAB_TILE):
        yield slice(start, min(start + VOCAB_TILE, vocab_size))


def row_statistics(
    logits: Tensor, target_ids: Tensor, *, with_entropy: bool, ref_logits: Tensor | None = None
) -> RowStatistics:
    """Of finite logits [C, V], float32 or float64, at targets [C] int64 in [0, V).

    The exact K is computed where the reference's logits [C, V] are given.
    """
    max_logit, log_total = _log_normalizer(logits)
    target_logit = logits.gather(1, target_ids[:, None])[:, 0]
    stats = RowStatistics((target_logit - max_logit) - log_total, max_logit, log_total)
    if with_entropy:
        stats = stats._replace(entropy=torch.zeros_like(max_logit))
    if ref_logits is not None:
        ref_max, ref_total = _log_normalizer(ref_logits)
        kl = torch.zeros_like(max_logit)
        stats = stats._replace(kl=kl, ref_max_logit=ref_max, ref_log_total=ref_total)
    if stats.entropy is None and stats.kl is None:
        return stats
    for tile in vocab_tiles(logits.shape[1]):
        log_p = _log_softmax_tile(logits[:, tile], max_logit, log_total)
        p = log_p.exp()
        if stats.entropy is not None:
            stats.entropy.sub_((p * log_p).sum(1))
        if stats.kl is not None:
            stats.kl.add_(p.mul_(_log_ratio_tile(log_p, ref_logits, tile, stats)).sum(1))
    return stats


def logit_gradients(
    logits: Tensor,
    target_ids: Tensor,
    stats: RowStatistics,
    gradients: RowGradients,
    transform: LogitTransform,
    *,
    out: Tensor,
    ref_logits: Tensor | None = None,
) -> None:
    """Write the loss's derivative with respect to the raw logits x W^T + b into `out` [C, V].

    `out` may be `logits` itself, or a narrower type over the same memory with the same row stride
    in bytes. A target of -1 is no column: no part of g lands there.
    """
    column = target_ids[:, None]
    g = gradients.log_probs[:, None]
    for tile in vocab_tiles(logits.shape[1]):
        z = logits[:, tile]
        log_p = _log_softmax_tile(z, stats.max_logit, stats.log_total)
        weight = -g
        if gradients.entropy is not None:
            assert stats.entropy is not None
            weight = weight - gradients.entropy[:, None] * (log_p + stats.entropy[:, None])
        if gradients.kl is not None:
            assert stats.kl is not None
            log_ratio = _log_ratio_tile(log_p, ref_logits, tile, stats)
            weight = weight + gradients.kl[:, None] * log_ratio.sub_(stats.kl[:, None])
        slope = transform.slope(z)
        gradient = log_p.exp_().mul_(weight)
        # The target's own g joins before anything is rounded to `out`'s type.
        inside = (column >= tile.start) & (column < tile.stop)
        at = (column - tile.start).clamp_(0, z.shape[1] - 1)
        gradient.scatter_(1, at, gradient.gather(1, at) + torch.where(inside, g, 0.0))
        out[:, tile] = gradient.mul_(slope)


def _log_normalizer(logits: Tensor) -> tuple[Tensor, Tensor]:
    max_logit = logits.amax(1)
    total = torch.zeros_like(max_logit)
    for tile in vocab_tiles(logits.shape[1]):
        total.add_((logits[:, tile] - max_logit[:, None]).exp_().sum(1))
    return max_logit, total.log_()


def _log_softmax_tile(z: Tensor, max_logit: Tensor, log_total: Tensor) -> Tensor:
    return (z - max_logit[:, None]).sub_(log_total[:, None])


def _log_ratio_tile(
    log_p: Tensor, ref_logits: Tensor | None, tile: slice, stats: RowStatistics
) -> Tensor:
    assert ref_logits is not None
    assert stats.ref_max_logit is not None and stats.ref_log_total is not None
    log_q = _log_softmax_tile(ref_logits[:, tile], stats.ref_max_logit, stats.ref_log_total)
    return torch.sub(log_p, log_q, out=log_q)


Record = TypeVar("Record", bound=NamedTuple)


def take(record: Record, rows: slice | Tensor) -> Record:
    """A record of vectors at the given rows."""
    return record._make(None if field is None else field[rows] for field in record)


def join(records: Sequence[Record]) -> Record:
    """Records of consecutive rows as one; a field is None in all of them or in none."""
    columns = zip(*records, strict=True)
    return records[0]._make(None if column[0] is None else torch.cat(column) for column in columns)
