"""Offsets and real sizes: more than 2^31 logits in one chunk, and real heads against float64."""

import torch
from torch import Tensor

from bench.accuracy import relative_error, true_outcome
from bench.gpu.measuring import attempt, release, rounded, sizes_of
from bench.gpu.section import Bench
from bench.peers import make_problem, ours
from care_kernels import linear_log_probs

_VOCAB_SLICE = 4096
# Relative errors of the gradients and the largest log-prob error in nats that pass.
_GRADIENT = {torch.bfloat16: 1e-2, torch.float32: 1e-4}
_LOG_PROB = {torch.bfloat16: 1e-4, torch.float32: 1e-3}


def run(bench: Bench) -> None:
    """In bfloat16 through the fused projection, in float32 through the kernels of rows."""
    for dtype in (torch.bfloat16, torch.float32):
        name = f"more than 2^31 logits, {str(dtype).removeprefix('torch.')}"
        attempt(bench, name, lambda dtype=dtype, name=name: _deep(bench, name, dtype))
        release(bench)
    for head in sizes_of(bench.dry).heads:
        attempt(bench, f"real head {head}", lambda head=head: _real(bench, head))
        release(bench)


def _deep(bench: Bench, name: str, dtype: torch.dtype) -> None:
    """All log-probs, and dX and dW at the first, the last and some rows between."""
    num, width, vocab = sizes_of(bench.dry).deep
    problem = make_problem(num, width, vocab, bench.device, dtype)
    log_probs, grad_hidden, grad_weight = ours(problem, backend="triton", chunk_rows=num)
    assert log_probs is not None
    hidden, weight = problem.hidden.detach().double(), problem.head_weight.detach().double()
    targets, advantages = problem.target_ids, problem.advantages.double()[:, None]
    normaliser = torch.stack(
        [(hidden @ part.T).logsumexp(-1) for part in weight.split(_VOCAB_SLICE)]
    ).logsumexp(0)
    truth = (hidden * weight[targets]).sum(-1) - normaliser
    rows, words = _sample(num, bench.device), _sample(vocab, bench.device)
    of_rows = (hidden[rows] @ weight.T - normaliser[rows, None]).exp()
    of_rows[torch.arange(len(rows), device=rows.device), targets[rows]] -= 1
    of_words = (hidden @ weight[words].T - normaliser[:, None]).exp()
    of_words -= (targets[:, None] == words[None]).double()
    _put(
        bench,
        name,
        dtype,
        {
            "log_prob_max": float((log_probs - truth).abs().max()),
            "d_hidden": relative_error(grad_hidden[rows], (of_rows * advantages[rows]) @ weight),
            "d_weight": relative_error(grad_weight[words], (of_words * advantages).T @ hidden),
        },
        {"logits": num * vocab},
    )


def _sample(length: int, device: torch.device | str) -> Tensor:
    """The first and the last indices, and an even spread."""
    ends = min(8, length)
    between = torch.linspace(0, length - 1, 48).long()
    indices = torch.cat([torch.arange(ends), between, torch.arange(length - ends, length)])
    return indices.unique().to(device)


def _real(bench: Bench, head: str) -> None:
    """A real head in the chunks that the package chooses, every gradient against float64."""
    sizes = sizes_of(bench.dry)
    problem = make_problem(sizes.real_rows, *sizes.heads[head], bench.device)
    truth = true_outcome(problem)
    log_probs, grad_hidden, grad_weight = ours(problem, backend="triton")
    assert log_probs is not None
    with torch.no_grad():
        inputs = problem.hidden, problem.head_weight, problem.target_ids
        alone = linear_log_probs(*inputs, backend="triton")
    off = log_probs.double() - truth.log_probs
    errors = {
        "log_prob_max": float(off.abs().max()),
        "d_hidden": relative_error(grad_hidden, truth.grad_hidden),
        "d_weight": relative_error(grad_weight, truth.grad_weight),
    }
    more = {
        "log_prob_rms": rounded(float(off.square().mean().sqrt())),
        "log_probs_alone_differ": rounded(float((alone - log_probs).abs().max())),
    }
    _put(bench, f"real head {head}, N={sizes.real_rows}", torch.bfloat16, errors, more)


def _put(
    bench: Bench, name: str, dtype: torch.dtype, errors: dict[str, float], more: dict[str, float]
) -> None:
    allowed = {"log_prob_max": _LOG_PROB[dtype]} | dict.fromkeys(
        ("d_hidden", "d_weight"), _GRADIENT[dtype]
    )
    passes = all(errors[key] <= most for key, most in allowed.items())
    figures = {key: rounded(value) for key, value in errors.items()} | more | {"ok": passes}
    bench.record.put(name, figures)
    print(f"  {'ok' if passes else 'FAILED'}  {name}: {figures}")
