"""The losses of TRL, verl and EasyR1 as calls of `linear_policy_loss`: docs/kernels.md's table.

Each peer's formula stands here as its source has it, on the log-probs of full logits; TRL's own
code runs in tests/integrations. Shape letters: B sequences, T tokens.

Sources: verl 0.9 `trainer/ppo/core_algos.py` (compute_policy_loss_vanilla, _gspo, _cispo,
kl_penalty_forward, agg_loss); EasyR1 `trainer/core_algos.py` (compute_policy_loss, compute_kl,
average_loss); TRL 1.16 `GRPOTrainer._compute_loss`.
"""

from collections.abc import Callable
from dataclasses import dataclass
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
        mask.double(),
    )
    now = batch.log_probs()
    return Batch(
        batch.hidden,
        batch.weight,
        batch.ids,
        batch.advantages,
        now + 0.5 * batch.old,
        now + 0.3 * batch.ref,
        batch.mask,
    )


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


def verl_gspo(batch: Batch, log_probs: Tensor) -> Tensor:
    log_ratio = ((log_probs - batch.old) * batch.mask).sum(1) / batch.mask.sum(1)
    ratio = (log_probs - log_probs.detach() + log_ratio.detach()[:, None]).exp()
    clipped = -batch.advantages * ratio.clamp(1 - 3e-4, 1 + 4e-4)
    return sequence_mean(torch.maximum(-batch.advantages * ratio, clipped), batch.mask)


def verl_cispo(batch: Batch, log_probs: Tensor) -> Tensor:
    ratio = (log_probs - batch.old).exp().clamp(1 - 0.2, 1 + 0.28).detach()
    return token_mean(-ratio * batch.advantages * log_probs, batch.mask)


def easyr1_default(batch: Batch, log_probs: Tensor) -> Tensor:
    loss = token_mean(dual_clip(batch, log_probs, 0.2, 0.3, 3.0), batch.mask)
    return loss + 0.01 * token_mean(low_var_kl(batch, log_probs), batch.mask)


def trl_sapo(batch: Batch, log_probs: Tensor) -> Tensor:
    ratio = (log_probs - batch.old).exp()
    temperature = torch.where(batch.advantages > 0, 1.0, 1.05).double()
    temperature[batch.advantages <= 0] = 1.05
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


ROWS: dict[str, tuple[Callable[[Batch, Tensor], Tensor], dict[str, Any]]] = {
    "verl vanilla": (verl_vanilla, {"surrogate": Clip(0.2, 0.28, dual=3.0), "beta": BETA}),
    "verl gspo": (
        verl_gspo,
        {"surrogate": Clip(3e-4, 4e-4), "ratio_level": "sequence", "weights": by_sequence},
    ),
    "verl cispo": (verl_cispo, {"surrogate": Cispo(1.28, 0.8)}),
    "EasyR1 grpo": (easyr1_default, {"surrogate": Clip(0.2, 0.3, dual=3.0), "beta": 0.01}),
    "TRL sapo": (trl_sapo, {"surrogate": Sapo(), "weights": by_sequence}),
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
    beta = options.pop("beta", 0.0)
    if beta:
        options |= {"kl_weights": (beta * weights)[mask > 0], "ref_log_probs": batch.ref[mask > 0]}
    rows = mask > 0
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
