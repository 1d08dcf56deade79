"""A head whose rows are spread over ranks (Megatron's vocabulary parallelism).

Every rank holds the same hidden states and targets, and its own part of the vocabulary. A part's
softmax carries the weight omega_r = exp(L_r - L), where L_r is its log-normaliser and L that of the
whole; from there

    log p_y = log p_y within y's part + log omega_r
    H       = sum_r omega_r (H_r - log omega_r)
    K       = sum_r omega_r (K_r + log omega_r - log omega'_r),    omega' the reference's

so one gather of a few numbers for each row and part is all that crosses ranks, besides dX.

Shape letters: C rows of the chunk, R ranks.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from care_kernels.softmax import RowStatistics


@dataclass(frozen=True)
class VocabShard:
    """This rank's part of the head."""

    group: dist.ProcessGroup
    """The ranks that hold the parts. All of them make the same calls, with the same rows."""
    start: int
    """The first vocabulary id of this part."""
    vocab_size: int
    """Of the whole head."""

    @property
    def usual_size(self) -> int:
        """Rows of a part where all are alike: what every rank sizes its chunks by."""
        return -(-self.vocab_size // dist.get_world_size(self.group))

    def local_targets(self, target_ids: Tensor, num_local: int) -> tuple[Tensor, Tensor]:
        """Targets as rows of this part: [C] clamped into it, and [C] with -1 for another's."""
        local = target_ids - self.start
        is_mine = (local >= 0) & (local < num_local)
        return local.clamp(0, num_local - 1), torch.where(is_mine, local, -1)

    def combine(self, stats: RowStatistics, is_mine: Tensor) -> RowStatistics:
        """Statistics of the whole vocabulary from this part's, which has the targets `is_mine`."""
        log_probs = torch.where(is_mine, stats.log_probs, -torch.inf)
        parts = self._gather(stats._replace(log_probs=log_probs))
        max_logit, log_total, log_share = _merge(parts.max_logit, parts.log_total)
        log_p = (parts.log_probs + log_share).amax(0)
        entropy, kl, ref_max, ref_total = None, None, None, None
        share = log_share.exp()
        if parts.entropy is not None:
            entropy = (share * (parts.entropy - log_share)).sum(0)
        if parts.kl is not None:
            assert parts.ref_max_logit is not None and parts.ref_log_total is not None
            ref_max, ref_total, ref_share = _merge(parts.ref_max_logit, parts.ref_log_total)
            kl = (share * (parts.kl + log_share - ref_share)).sum(0)
        return RowStatistics(log_p, max_logit, log_total, entropy, kl, ref_max, ref_total)

    def sum(self, partial: Tensor) -> Tensor:
        """The sum over ranks, in at least float32."""
        total = partial.float() if partial.dtype in (torch.bfloat16, torch.float16) else partial
        dist.all_reduce(total, group=self.group)
        return total.to(partial.dtype)

    def _gather(self, stats: RowStatistics) -> RowStatistics:
        """Every rank's statistics, [R, C] each, in rank order: the same numbers on every rank."""
        present = [field for field in stats if field is not None]
        mine = torch.stack(present)
        gathered = [torch.empty_like(mine) for _ in range(dist.get_world_size(self.group))]
        dist.all_gather(gathered, mine, group=self.group)
        columns = iter(torch.stack(gathered, 1))
        return stats._make(None if field is None else next(columns) for field in stats)


def _merge(max_logit: Tensor, log_total: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The whole's max and log-total [C], and each part's log omega [R, C]."""
    top = max_logit.amax(0)
    within = max_logit - top + log_total
    total = torch.logsumexp(within, 0)
    return top, total, within - total
