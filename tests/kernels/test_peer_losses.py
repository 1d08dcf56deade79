"""The losses of TRL, verl and EasyR1 as calls of `linear_policy_loss`: docs/kernels.md's table.

Each peer's formula stands here as its source has it, on the log-probs of full logits; TRL's own
code runs in tests/integrations. Shape letters: B sequences, T tokens.

Sources: verl 0.9 `trainer/ppo/core_algos.py` (compute_policy_loss_vanilla, _gspo, _cispo, _sapo,
_gpg, kl_penalty_forward, agg_loss); EasyR1 `trainer/core_algos.py` (compute_policy_loss,
compute_kl, average_loss); TRL 1.16 `GRPOTrainer._compute_loss`.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from care_kernels import Cispo, Clip, Sapo, linear_policy_loss
from tests.kernels.cases import assert_same

B, T, D, V = 4, 7, 12, 53


@dataclass(frozen=True)
class Batch:
    """Completions of several lengths; the first counts as truncated where that matters."""

    hidden: Tensor
    weight: Tensor
    ids: Tensor
    advantages: Tensor
    old: Tensor
    ref: Tensor
    rollout: Tensor
    """What the sampler's own probabilities are corrected by, a factor for each token."""
    mask: Tensor

    def log_probs(self) -> Tensor:
        logits = self.hidden @ self.weight.T
        return torch.log_softmax(logits, -1).gather(-1, self.ids[..., None])[..., 0]


Formula = Callable[[Batch, Tensor], Tensor]
"""[B, T] of each token, from the current log-probs."""


def make_batch() -> Batch:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    mask = torch.arange(T) < torch.tensor([7, 4, 1, 6])[:, None]
    batch = Batch(
        normal(B, T, D),
        0.4 * normal(V, D),
        torch.randint(V, (B, T), generator=generator),
        normal(B)[:, None].expand(B, T),
        normal(B, T),
        normal(B, T),
        normal(B, T).exp(),
        mask.double(),
    )
    now = batch.log_probs()
    return replace(batch, old=now + 0.5 * batch.old, ref=now + 0.3 * batch.ref)


def ratio_of(batch: Batch, log_probs: Tensor) -> Tensor:
    return (log_probs - batch.old).exp()


def sequence_ratio(batch: Batch, log_probs: Tensor) -> Tensor:
    """GSPO's ratio, whose gradient reaches each token through its own log-prob."""
    log_ratio = ((log_probs - batch.old) * batch.mask).sum(1) / batch.mask.sum(1)
    return (log_probs - log_probs.detach() + log_ratio.detach()[:, None]).exp()


def clipped(
    batch: Batch, ratio: Tensor, low: float, high: float, dual: float | None = None
) -> Tensor:
    """verl's and EasyR1's clipped loss of each token; TRL writes it as -min of the negatives."""
    bounded = ratio.clamp(1 - low, 1 + high)
    larger = torch.maximum(-batch.advantages * ratio, -batch.advantages * bounded)
    if dual is None:
        return larger
    smaller = torch.minimum(larger, -batch.advantages * dual)
    return torch.where(batch.advantages < 0, smaller, larger)


def clip_loss(*bounds: float, ratio: Formula = ratio_of) -> Formula:
    return lambda batch, log_probs: clipped(batch, ratio(batch, log_probs), *bounds)


def corrected(batch: Batch, log_probs: Tensor) -> Tensor:
    """`rollout_is_weights`, EasyR1's rollout correction: a factor on each token's loss."""
    return clipped(batch, ratio_of(batch, log_probs), 0.2, 0.28, 3.0) * batch.rollout


def cispo(batch: Batch, log_probs: Tensor) -> Tensor:
    """verl's and EasyR1's, clipped on both sides."""
    ratio = ratio_of(batch, log_probs).clamp(1 - 0.2, 1 + 0.28).detach()
    return -ratio * batch.advantages * log_probs


def gpg(batch: Batch, log_probs: Tensor) -> Tensor:
    return -log_probs * batch.advantages


def sapo(batch: Batch, log_probs: Tensor) -> Tensor:
    """TRL's, verl's and EasyR1's."""
    temperature = torch.full_like(log_probs, 1.05).masked_fill(batch.advantages > 0, 1.0)
    soft = torch.sigmoid(temperature * (ratio_of(batch, log_probs) - 1)) * 4 / temperature
    return -soft * batch.advantages


def two_sided(batch: Batch, log_probs: Tensor) -> Tensor:
    """TRL's `delta` under 1 + epsilon_high."""
    ratio = ratio_of(batch, log_probs)
    bounded = ratio.clamp(max=1.1) * batch.advantages
    return -torch.minimum(bounded, ratio.clamp(1 - 0.2, 1 + 0.3) * batch.advantages)


def kl(batch: Batch, log_probs: Tensor) -> Tensor:
    """verl's `kl_loss_type=kl`, EasyR1's `kl_penalty=kl`."""
    return log_probs - batch.ref


def mse(batch: Batch, log_probs: Tensor) -> Tensor:
    """`mse` of both."""
    return 0.5 * (log_probs - batch.ref).square()


def low_var_kl(batch: Batch, log_probs: Tensor) -> Tensor:
    """verl's and EasyR1's "low_var_kl", TRL's per_token_kl."""
    d = batch.ref - log_probs
    return d.exp() - d - 1


def kl_with_ratio(batch: Batch, log_probs: Tensor) -> Tensor:
    """TRL's default: `use_bias_correction_kl`."""
    return low_var_kl(batch, log_probs) * ratio_of(batch, log_probs)


def kept(batch: Batch) -> Tensor:
    """`mask_truncated_completions`, DAPO's overlong filter: the first sequence has no say."""
    return batch.mask * torch.tensor([0.0, 1.0, 1.0, 1.0], dtype=torch.float64)[:, None]


def by_token(mask: Tensor) -> Tensor:
    """verl's "token-mean", EasyR1's "token", TRL's dapo on one micro-batch."""
    return mask / mask.sum()


def by_sequence(mask: Tensor) -> Tensor:
    """verl's "seq-mean-token-mean", EasyR1's "seq", TRL's grpo."""
    return mask / mask.sum(1, keepdim=True) / mask.shape[0]


@dataclass(frozen=True)
class Peer:
    """A loss as its source has it, and as options of `linear_policy_loss`."""

    loss: Formula
    surrogate: Clip | Cispo | Sapo
    kl: Formula | None = None
    estimator: str = "k3"
    beta: float = 0.04
    weights: Callable[[Tensor], Tensor] = by_token
    level: str = "token"
    mask: Callable[[Batch], Tensor] = lambda batch: batch.mask


# A ratio of 1 whatever the old policy: REINFORCE.
NO_RATIO = Cispo(max_ratio=1.0, min_ratio=1.0)
VERL, EASYR1 = (0.2, 0.28, 3.0), (0.2, 0.3, 3.0)
GSPO = {"weights": by_sequence, "level": "sequence"}
ROWS: dict[str, Peer] = {
    "verl vanilla": Peer(clip_loss(*VERL), Clip(*VERL), low_var_kl),
    "verl rollout correction": Peer(corrected, Clip(*VERL)),
    "verl gspo": Peer(clip_loss(3e-4, 4e-4, ratio=sequence_ratio), Clip(3e-4, 4e-4), **GSPO),
    "verl, EasyR1 cispo": Peer(cispo, Cispo(1.28, 0.8)),
    "verl gpg": Peer(gpg, NO_RATIO),
    "verl, EasyR1 kl": Peer(gpg, NO_RATIO, kl, "k1"),
    "verl, EasyR1 mse": Peer(gpg, NO_RATIO, mse, "k2"),
    "EasyR1 default": Peer(clip_loss(*EASYR1), Clip(*EASYR1), low_var_kl, beta=0.01),
    "EasyR1 gspo_token": Peer(clip_loss(*EASYR1, ratio=sequence_ratio), Clip(*EASYR1), **GSPO),
    "TRL, verl, EasyR1 sapo": Peer(sapo, Sapo(), weights=by_sequence),
    "TRL default KL": Peer(clip_loss(0.2, 0.2), Clip(0.2, 0.2), kl_with_ratio, "k3_unbiased"),
    "TRL delta": Peer(two_sided, Clip(0.2, 1.1 - 1, dual=1.3)),
    "TRL truncated": Peer(clip_loss(0.2, 0.28), Clip(0.2, 0.28), mask=kept),
}


@pytest.mark.parametrize("name", ROWS)
def test_the_peers_loss_is_a_call(name: str) -> None:
    """Loss and both gradients, in float64, are the peer's."""
    peer, batch = ROWS[name], make_batch()
    leaves = (batch.hidden.requires_grad_(), batch.weight.requires_grad_())
    log_probs, weights = batch.log_probs(), peer.weights(peer.mask(batch))
    want = (peer.loss(batch, log_probs) * weights).sum()
    rows, options = weights > 0, {}
    if peer.kl is not None:
        want = want + peer.beta * (peer.kl(batch, log_probs) * weights).sum()
        options = {"kl_weights": peer.beta * weights[rows], "ref_log_probs": batch.ref[rows]}
    if peer.loss is corrected:
        options["importance_weights"] = batch.rollout[rows]
    ours = linear_policy_loss(
        batch.hidden[rows],
        batch.weight,
        batch.ids[rows],
        (batch.advantages * weights)[rows],
        old_log_probs=batch.old[rows],
        surrogate=peer.surrogate,
        kl_estimator=peer.estimator,
        ratio_level=peer.level,
        sequence_ids=torch.arange(B)[:, None].expand(B, T)[rows],
        **options,
    ).loss
    assert_same(ours.detach(), want.detach())
    grads = (torch.autograd.grad(loss, leaves) for loss in (ours, want))
    for got, wanted in zip(*grads, strict=True):
        assert_same(got, wanted)
