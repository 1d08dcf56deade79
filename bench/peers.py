"""One function per way to compute the same policy loss, and the problem they all solve.

    loss = -sum_i min(rho_i a_i, clip(rho_i, 0.8, 1.28) a_i),  rho_i = exp(log p_i - constant_i)

the clipped surrogate on the first optimiser step after sampling, where the constants are the
log-probs themselves: every ratio is 1 and the gradient is that of -sum_i a_i log p_i. Each function
is called as a trainer would call it and returns the log-probs it made on the way, dX and dW; hidden
states and head are both trainable.

Shape letters: N rows (one sampled token each), D hidden, V vocabulary.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from care_kernels import Clip, linear_log_probs, linear_policy_loss

CLIP_LOW, CLIP_HIGH = 0.2, 0.28
LOGIT_STD = 3.5
# TRL's own tile width: `_CHUNKED_LOGPROB_CHUNK_SIZE` in trl/trainer/utils.py (1.16).
_TRL_VOCAB_TILE = 32768
_TORCH_CHUNK_ROWS = 512


class MeasurementError(RuntimeError):
    """Something could not be measured; the message names it."""


@dataclass(frozen=True)
class Problem:
    """The inputs of one loss."""

    hidden: Tensor
    """[N, D], requires grad."""
    head_weight: Tensor
    """[V, D], requires grad."""
    target_ids: Tensor
    """[N] int64."""
    advantages: Tensor
    """[N] float32, of both signs."""

    def first(self, rows: int) -> "Problem":
        """The problem of the first rows, sharing the head."""
        return replace(
            self,
            hidden=self.hidden[:rows].detach().clone().requires_grad_(),
            target_ids=self.target_ids[:rows],
            advantages=self.advantages[:rows],
        )

    def with_active(self, fraction: float) -> "Problem":
        """The same with all but an evenly spread fraction of the advantages set to zero."""
        index = torch.arange(len(self.advantages), device=self.advantages.device)
        active = (index * fraction).floor() != ((index + 1) * fraction).floor()
        return replace(self, advantages=self.advantages * active)


class Outcome(NamedTuple):
    """What a contender computed."""

    log_probs: Tensor | None
    """[N]; None where they never leave the peer."""
    grad_hidden: Tensor
    """[N, D]."""
    grad_weight: Tensor
    """[V, D]."""


def make_problem(
    rows: int, width: int, vocab: int, device: str = "cpu", dtype: torch.dtype = torch.bfloat16
) -> Problem:
    """Seeded inputs whose logits are spread as a trained model's.

    Logits have a standard deviation of 3.5 over the vocabulary, and every row leans to its target
    until the median target has a probability near one half: peaked, with a long tail of rare ones.
    """
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int, std: float = 1.0, kind: torch.dtype = torch.float32) -> Tensor:
        empty = torch.empty(shape, device=device, dtype=kind)
        return empty.normal_(std=std, generator=generator)

    weight = normal(vocab, width, std=LOGIT_STD / math.sqrt(width), kind=dtype)
    targets = torch.randint(vocab, (rows,), device=device, generator=generator)
    lean = (math.log(vocab) + LOGIT_STD**2 / 2) / LOGIT_STD**2
    hidden = (normal(rows, width) + lean * weight[targets].float()).to(dtype)
    return Problem(hidden.requires_grad_(), weight.requires_grad_(), targets, normal(rows))


def clipped_surrogate(log_probs: Tensor, advantages: Tensor) -> Tensor:
    """The loss above from differentiable log-probs, for peers that return those."""
    ratio = (log_probs.float() - log_probs.detach().float()).exp()
    clipped = ratio.clamp(1 - CLIP_LOW, 1 + CLIP_HIGH)
    return -torch.minimum(ratio * advantages, clipped * advantages).sum()


def _differentiate(problem: Problem, log_probs: Tensor) -> Outcome:
    loss = clipped_surrogate(log_probs, problem.advantages)
    grads = torch.autograd.grad(loss, (problem.hidden, problem.head_weight))
    return Outcome(log_probs.detach(), *grads)


def gemms(problem: Problem) -> Outcome:
    """The floor: three matrix products of the loss's shapes; its results mean nothing."""
    with torch.no_grad():
        logits = problem.hidden @ problem.head_weight.T
        return Outcome(None, logits @ problem.head_weight, logits.T @ problem.hidden)


def ours(problem: Problem, **options: Any) -> Outcome:
    """`linear_policy_loss`: the whole loss, gradients made in the forward; `options` are its."""
    out = linear_policy_loss(
        problem.hidden,
        problem.head_weight,
        problem.target_ids,
        problem.advantages,
        surrogate=Clip(CLIP_LOW, CLIP_HIGH),
        **options,
    )
    grads = torch.autograd.grad(out.loss, (problem.hidden, problem.head_weight))
    return Outcome(out.log_probs, *grads)


def ours_log_probs(problem: Problem, backend: str | None = None) -> Outcome:
    """`linear_log_probs`, the loss composed on top."""
    inputs = (problem.hidden, problem.head_weight, problem.target_ids)
    log_probs = linear_log_probs(*inputs, backend=backend)
    return _differentiate(problem, log_probs)


def log_probs_alone(problem: Problem) -> Tensor:
    """`linear_log_probs` in Triton without gradients, as the old policy's forward needs it."""
    with torch.no_grad():
        inputs = (problem.hidden, problem.head_weight, problem.target_ids)
        return linear_log_probs(*inputs, backend="triton")


def _torch_log_probs(hidden: Tensor, head_weight: Tensor, target_ids: Tensor) -> Tensor:
    logits = F.linear(hidden, head_weight).float()
    return logits.log_softmax(-1).gather(-1, target_ids[:, None]).squeeze(-1)


def torch_float32(problem: Problem) -> Outcome:
    """Plain torch as trainers write it: logits in the model's dtype, softmax in float32."""
    log_probs = _torch_log_probs(problem.hidden, problem.head_weight, problem.target_ids)
    return _differentiate(problem, log_probs)


def torch_bfloat16(problem: Problem) -> Outcome:
    """Plain torch without the upcast: the softmax's result is rounded to bfloat16 too."""
    logits = F.linear(problem.hidden, problem.head_weight)
    log_probs = logits.log_softmax(-1).gather(-1, problem.target_ids[:, None]).squeeze(-1)
    return _differentiate(problem, log_probs)


@cache
def _compiled_log_probs() -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    return torch.compile(_torch_log_probs, dynamic=True)


def torch_compiled(problem: Problem) -> Outcome:
    """Plain torch under `torch.compile`."""
    log_probs = _compiled_log_probs()(problem.hidden, problem.head_weight, problem.target_ids)
    return _differentiate(problem, log_probs)


def torch_linear_cross_entropy(problem: Problem) -> Outcome:
    """torch's own chunked `F.linear_cross_entropy`, per token.

    With chunks of 512 rows: its own choice, N D / V rows, passes over the whole head gradient V / D
    times, which at 256 rows takes a hundred times as long.
    """
    nll = F.linear_cross_entropy(
        problem.hidden,
        problem.head_weight,
        problem.target_ids,
        reduction="none",
        options=torch.nn.LinearCrossEntropyOptions(batch_chunk_size=_TORCH_CHUNK_ROWS),
    )
    return _differentiate(problem, -nll)


def liger_grpo(problem: Problem) -> Outcome:
    """Liger's fused GRPO loss.

    It knows one advantage per sequence, so every token is a sequence of its own; one chunk holds
    them all, which spares Liger the pass over the head gradient per sequence. A normaliser of 1
    makes it a sum. The log-probs stay inside.
    """
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    rows = len(problem.target_ids)
    grpo = LigerFusedLinearGRPOLoss(
        beta=0.0,
        # Compiled, each call would trace a new closure: seconds a call for a few N-long vectors.
        compiled=False,
        use_ref_model=False,
        chunk_size=rows,
        epsilon_low=CLIP_LOW,
        epsilon_high=CLIP_HIGH,
    )
    loss, _ = grpo(
        problem.hidden[:, None],
        problem.head_weight,
        problem.target_ids[:, None],
        torch.ones(rows, 1, device=problem.hidden.device),
        problem.advantages,
        num_items_in_batch=1,
    )
    return Outcome(None, *torch.autograd.grad(loss, (problem.hidden, problem.head_weight)))


def liger_grpo_log_probs(problem: Problem) -> Tensor:
    """The log-probs `liger_grpo` uses inside, from the function that makes them there."""
    from liger_kernel.chunked_loss.fused_linear_ppo import LigerFusedLinearPPOBase

    with torch.no_grad():
        return LigerFusedLinearPPOBase.chunk_forward(
            problem.hidden[:, None], problem.head_weight, problem.target_ids[:, None]
        ).squeeze(1)


def liger_scaled_ce(problem: Problem) -> Outcome:
    """Liger's per-token cross-entropy for RL: native on Hopper, chunked torch elsewhere."""
    from liger_kernel.ops.fused_linear_scaled_cross_entropy import (
        LigerFusedLinearScaledCrossEntropyFunction,
    )

    nll = LigerFusedLinearScaledCrossEntropyFunction.apply(
        problem.hidden, problem.head_weight, problem.target_ids
    )
    assert isinstance(nll, Tensor)
    return _differentiate(problem, -nll)


def trl_chunked(problem: Problem) -> Outcome:
    """TRL's default path since 1.16: chunked log-probs, the loss composed on top."""
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction

    log_probs, *_ = ChunkedLogProbFunction.apply(
        problem.hidden,
        problem.head_weight,
        None,
        problem.target_ids,
        1.0,
        _TRL_VOCAB_TILE,
        None,
        1.0,
        (),
    )
    return _differentiate(problem, log_probs)


def cut_cross_entropy(problem: Problem) -> Outcome:
    """Apple's cut-cross-entropy: its Triton kernels on a GPU, its compiled torch elsewhere."""
    from cut_cross_entropy import linear_cross_entropy

    impl = "cce" if problem.hidden.is_cuda else "torch_compile"
    nll = linear_cross_entropy(
        problem.hidden, problem.head_weight, problem.target_ids, reduction="none", impl=impl
    )
    return _differentiate(problem, -nll)


@dataclass(frozen=True)
class Contender:
    """One row of the tables."""

    run: Callable[[Problem], Outcome]
    package: str
    """The distribution that provides it, whose version is recorded."""
    label: str
    """For people."""
    log_probs: Callable[[Problem], Tensor] | None = None
    """Where `run` does not return them."""


CONTENDERS = {
    "ours": Contender(ours, "care-rl", "linear_policy_loss"),
    "ours_log_probs": Contender(ours_log_probs, "care-rl", "linear_log_probs + loss"),
    "torch": Contender(torch_float32, "torch", "torch, fp32 softmax"),
    "torch_bfloat16": Contender(torch_bfloat16, "torch", "torch, bf16 softmax"),
    "torch_compiled": Contender(torch_compiled, "torch", "torch.compile, fp32 softmax"),
    "torch_linear_cross_entropy": Contender(
        torch_linear_cross_entropy, "torch", "F.linear_cross_entropy"
    ),
    "cut_cross_entropy": Contender(cut_cross_entropy, "cut-cross-entropy", "cut-cross-entropy"),
    "liger_scaled_ce": Contender(liger_scaled_ce, "liger-kernel", "Liger scaled cross-entropy"),
    "liger_grpo": Contender(liger_grpo, "liger-kernel", "Liger GRPO", liger_grpo_log_probs),
    "trl_chunked": Contender(trl_chunked, "trl", "TRL chunked log-probs"),
}
OURS = ("ours", "ours_log_probs")
PEERS = tuple(name for name in CONTENDERS if name not in OURS)


def installed_version(package: str) -> str | None:
    """The version of a distribution, or None where it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def chosen_contenders(skipped: list[str]) -> dict[str, Contender]:
    """All contenders but the skipped.

    Raises:
        MeasurementError: one is not installed; the message names it and the ways out.
    """
    chosen = {name: c for name, c in CONTENDERS.items() if name not in skipped}
    missing = [
        name for name in PEERS if name in chosen and not installed_version(chosen[name].package)
    ]
    if missing:
        packages = " ".join(sorted({chosen[name].package for name in missing}))
        raise MeasurementError(
            f"not installed: {', '.join(missing)}; "
            f"pip install {packages}, or leave out with --skip-peer {' '.join(missing)}"
        )
    return chosen
