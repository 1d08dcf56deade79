"""The losses of TRL, verl and EasyR1 as calls of `linear_policy_loss`: docs/kernels.md's table.

Each peer's formula stands here as its source has it, on the log-probs of full logits; TRL's own
code runs in tests/integrations. Shape letters: B sequences, T tokens.

Sources: verl 0.9 `trainer/ppo/core_algos.py` (compute_policy_loss_vanilla, _gspo, _cispo, _sapo,
_gpg, kl_penalty_forward, agg_loss); EasyR1 `trainer/core_algos.py` (compute_policy_loss,
compute_kl, average_loss); TRL 1.16 `GRPOTrainer._compute_loss`.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from care_kernels import Cispo, Clip, Sapo, linear_policy_loss
from tests.kernels.cases import assert_same

B, T, D, V = 4, 7, 12, 53
BETA = 0.04


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


def token_mean(values: Tensor, mask: Tensor) -> Tensor:
    """verl's agg_loss "token-mean", EasyR1's "token", TRL's dapo on one micro-batch."""
    return (values * mask).sum() / mask.sum()


def sequence_mean(values: Tensor, mask: Tensor) -> Tensor:
    """verl's "seq-mean-token-mean", EasyR1's "seq", TRL's grpo."""
    return ((values * mask).sum(1) / mask.sum(1)).mean()


def dual_clip(batch: Batch, log_probs: Tensor, low: float, high: float, dual: float) -> Tensor:
    """verl's and EasyR1's clipped loss of each token."""
    ratio = (log_probs - batch.old).exp()
    plain, clipped = -batch.advantages * ratio, -batch.advantages * ratio.clamp(1 - low, 1 + high)
    larger = torch.maximum(plain, clipped)
    smaller = torch.minimum(larger, -batch.advantages * dual)
    return torch.where(batch.advantages < 0, smaller, larger)


def low_var_kl(batch: Batch, log_probs: Tensor) -> Tensor:
    """verl's and EasyR1's "low_var_kl", TRL's per_token_kl."""
    d = batch.ref - log_probs
    return d.exp() - d - 1


def verl_vanilla(batch: Batch, log_probs: Tensor) -> Tensor:
    loss = token_mean(dual_clip(batch, log_probs, 0.2, 0.28, 3.0), batch.mask)
    return loss + BETA * token_mean(low_var_kl(batch, log_probs), batch.mask)


def verl_rollout_correction(batch: Batch, log_probs: Tensor) -> Tensor:
    """`rollout_is_weights`, EasyR1's rollout correction: a factor on each token's loss."""
    loss = dual_clip(batch, log_probs, 0.2, 0.28, 3.0) * batch.rollout
    return token_mean(loss, batch.mask)


def sequence_ratio(batch: Batch, log_probs: Tensor) -> Tensor:
    """GSPO's ratio, whose gradient reaches each token through its own log-prob."""
    log_ratio = ((log_probs - batch.old) * batch.mask).sum(1) / batch.mask.sum(1)
    return (log_probs - log_probs.detach() + log_ratio.detach()[:, None]).exp()


def verl_gspo(batch: Batch, log_probs: Tensor) -> Tensor:
    ratio = sequence_ratio(batch, log_probs)
    clipped = -batch.advantages * ratio.clamp(1 - 3e-4, 1 + 4e-4)
    return sequence_mean(torch.maximum(-batch.advantages * ratio, clipped), batch.mask)


def cispo(batch: Batch, log_probs: Tensor) -> Tensor:
    """verl's and EasyR1's, clipped on both sides."""
    ratio = (log_probs - batch.old).exp().clamp(1 - 0.2, 1 + 0.28).detach()
    return token_mean(-ratio * batch.advantages * log_probs, batch.mask)


def verl_gpg(batch: Batch, log_probs: Tensor) -> Tensor:
    return token_mean(-log_probs * batch.advantages, batch.mask)


def verl_kl(batch: Batch, log_probs: Tensor) -> Tensor:
    """`kl_loss_type=kl`, verl's k1; EasyR1's `kl_penalty=kl`."""
    return verl_gpg(batch, log_probs) + BETA * token_mean(log_probs - batch.ref, batch.mask)


def verl_mse(batch: Batch, log_probs: Tensor) -> Tensor:
    """`kl_loss_type=mse`, verl's k2; EasyR1's `kl_penalty=mse`."""
    squared = 0.5 * (log_probs - batch.ref).square()
    return verl_gpg(batch, log_probs) + BETA * token_mean(squared, batch.mask)


def easyr1_default(batch: Batch, log_probs: Tensor) -> Tensor:
    loss = token_mean(dual_clip(batch, log_probs, 0.2, 0.3, 3.0), batch.mask)
    return loss + 0.01 * token_mean(low_var_kl(batch, log_probs), batch.mask)


def easyr1_gspo(batch: Batch, log_probs: Tensor) -> Tensor:
    """`gspo_token`, with EasyR1's dual clip on the sequence's ratio."""
    ratio = sequence_ratio(batch, log_probs)
    plain, clipped = -batch.advantages * ratio, -batch.advantages * ratio.clamp(1 - 0.2, 1 + 0.3)
    larger = torch.maximum(plain, clipped)
    smaller = torch.minimum(larger, -batch.advantages * 3.0)
    return sequence_mean(torch.where(batch.advantages < 0, smaller, larger), batch.mask)


def sapo(batch: Batch, log_probs: Tensor) -> Tensor:
    """TRL's, verl's and EasyR1's."""
    ratio = (log_probs - batch.old).exp()
    temperature = torch.full_like(ratio, 1.05).masked_fill(batch.advantages > 0, 1.0)
    soft = torch.sigmoid(temperature * (ratio - 1)) * 4 / temperature
    return sequence_mean(-soft * batch.advantages, batch.mask)


def trl_default_kl(batch: Batch, log_probs: Tensor) -> Tensor:
    ratio = (log_probs - batch.old).exp()
    clipped = ratio.clamp(1 - 0.2, 1 + 0.2)
    loss = -torch.minimum(ratio * batch.advantages, clipped * batch.advantages)
    return token_mean(loss + BETA * low_var_kl(batch, log_probs) * ratio, batch.mask)


def trl_delta(batch: Batch, log_probs: Tensor) -> Tensor:
    """`delta` under 1 + epsilon_high: two-sided clipping."""
    ratio = (log_probs - batch.old).exp()
    clipped, bounded = ratio.clamp(1 - 0.2, 1 + 0.3), ratio.clamp(max=1.1)
    loss = -torch.minimum(bounded * batch.advantages, clipped * batch.advantages)
    return token_mean(loss, batch.mask)


def trl_truncated(batch: Batch, log_probs: Tensor) -> Tensor:
    """`mask_truncated_completions`, DAPO's overlong filter: the first sequence has no say."""
    ratio = (log_probs - batch.old).exp()
    clipped = ratio.clamp(1 - 0.2, 1 + 0.28)
    loss = -torch.minimum(ratio * batch.advantages, clipped * batch.advantages)
    return token_mean(loss, kept(batch))


def kept(batch: Batch) -> Tensor:
    return batch.mask * torch.tensor([0.0, 1.0, 1.0, 1.0], dtype=torch.float64)[:, None]


def by_token(mask: Tensor) -> Tensor:
    return mask / mask.sum()


def by_sequence(mask: Tensor) -> Tensor:
    return mask / mask.sum(1, keepdim=True) / mask.shape[0]


DUAL = Clip(0.2, 0.28, dual=3.0)
# A ratio of 1 whatever the old policy: REINFORCE.
NO_RATIO = Cispo(max_ratio=1.0, min_ratio=1.0)
ROWS: dict[str, tuple[Callable[[Batch, Tensor], Tensor], dict[str, Any]]] = {
    "verl vanilla": (verl_vanilla, {"surrogate": DUAL, "beta": BETA}),
    "verl rollout correction": (verl_rollout_correction, {"surrogate": DUAL, "corrected": True}),
    "verl gspo": (
        verl_gspo,
        {"surrogate": Clip(3e-4, 4e-4), "ratio_level": "sequence", "weights": by_sequence},
    ),
    "verl, EasyR1 cispo": (cispo, {"surrogate": Cispo(1.28, 0.8)}),
    "verl gpg": (verl_gpg, {"surrogate": NO_RATIO}),
    "verl, EasyR1 kl": (
        verl_kl,
        {"surrogate": NO_RATIO, "beta": BETA, "kl_estimator": "k1"},
    ),
    "verl, EasyR1 mse": (
        verl_mse,
        {"surrogate": NO_RATIO, "beta": BETA, "kl_estimator": "k2"},
    ),
    "EasyR1 default": (easyr1_default, {"surrogate": Clip(0.2, 0.3, dual=3.0), "beta": 0.01}),
    "EasyR1 gspo_token": (
        easyr1_gspo,
        {
            "surrogate": Clip(0.2, 0.3, dual=3.0),
            "ratio_level": "sequence",
            "weights": by_sequence,
        },
    ),
    "TRL, verl, EasyR1 sapo": (sapo, {"surrogate": Sapo(), "weights": by_sequence}),
    "TRL default KL": (
        trl_default_kl,
        {"surrogate": Clip(0.2, 0.2), "beta": BETA, "kl_estimator": "k3_unbiased"},
    ),
    "TRL delta": (trl_delta, {"surrogate": Clip(0.2, 1.1 - 1, dual=1.3)}),
    "TRL truncated": (trl_truncated, {"mask": kept}),
}


@pytest.mark.parametrize("name", ROWS)
def test_the_peers_loss_is_a_call(name: str) -> None:
    """Loss and both gradients, in float64, are the peer's."""
    peer, options = ROWS[name]
    batch = make_batch()
    for tensor in (batch.hidden, batch.weight):
        tensor.requires_grad_()
    want = peer(batch, batch.log_probs())
    want_grads = torch.autograd.grad(want, (batch.hidden, batch.weight))

    options = dict(options)
    mask = options.pop("mask", lambda batch: batch.mask)(batch)
    weights = options.pop("weights", by_token)(mask)
    beta, rows = options.pop("beta", 0.0), mask > 0
    if beta:
        options |= {"kl_weights": (beta * weights)[rows], "ref_log_probs": batch.ref[rows]}
    if options.pop("corrected", False):
        options["importance_weights"] = batch.rollout[rows]
    sequence_ids = torch.arange(B)[:, None].expand(B, T)[rows]
    ours = linear_policy_loss(
        batch.hidden[rows],
        batch.weight,
        batch.ids[rows],
        (batch.advantages * weights)[rows],
        old_log_probs=batch.old[rows],
        sequence_ids=sequence_ids,
        **options,
    ).loss
    assert_same(ours.detach(), want.detach())
    grads = torch.autograd.grad(ours, (batch.hidden, batch.weight))
    for got, wanted in zip(grads, want_grads, strict=True):
        assert_same(got, wanted)
