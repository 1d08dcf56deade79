"""The C++ CPU kernels against float64, against the portable code, and how they come to be."""

import stat
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from care_kernels import cpu, linear_log_probs
from care_kernels.backends import (
    ChunkRows,
    ChunkSpec,
    LogitChunk,
    NativeChunk,
    TorchChunk,
)
from care_kernels.softmax import LogitTransform, RowGradients, RowStatistics
from tests.kernels.cases import (
    Case,
    assert_close,
    check_against_oracle,
    double_logits,
    error,
    head_case,
    policy_case,
    run_ours,
)
from tests.kernels.dispatch import kind_of, use_twice
from tests.kernels.oracle import reference_entropy, reference_log_probs
from tests.kernels.ranks import in_processes
from tests.kernels.tolerances import TWO_ROUNDINGS

needs_native = pytest.mark.skipif(
    cpu.native_ops() is None,
    reason="the C++ CPU kernels do not run here (AVX-512 and a C++20 compiler)",
)

TRANSFORMS: dict[str, LogitTransform] = {
    "plain": LogitTransform(),
    "temperature": LogitTransform(temperature=0.6, scale=1.5),
    "softcap": LogitTransform(temperature=1.2, softcap=4.0, scale=1.5),
}
SHAPES = (
    *((1, 1, 2), (63, 1, 34), (65, 16, 2), (63, 63, 34)),
    *((64, 64, 64), (130, 65, 34), (65, 211, 66), (3, 4099, 34)),
)
"""Rows, vocabulary and hidden size, on and beside the kernels' blocks of 64, 64 (16) and 32."""


def upstream_of(num_rows: int, *, with_entropy: bool) -> RowGradients:
    """Gradients of both signs, some of them zero."""
    ramp = torch.linspace(-1, 1, num_rows) if num_rows > 1 else torch.ones(1)
    entropy = ramp.flip(0).masked_fill(torch.arange(num_rows) % 3 == 2, 0.0)
    return RowGradients(ramp, entropy if with_entropy else None)


def run_chunk(
    kind: type[LogitChunk], case: Case, transform: LogitTransform, upstream: RowGradients
) -> tuple[RowStatistics, Tensor]:
    """Statistics and the gradient of the raw logits."""
    weight, bias, with_entropy = case["head_weight"], case.get("bias"), upstream.entropy is not None
    spec = ChunkSpec(case["hidden"].dtype, weight, bias, transform, None, with_entropy, True)
    chunk = kind(spec, len(case["hidden"]))
    stats = chunk.project(ChunkRows(case["hidden"], case["target_ids"]), keep=True)
    return stats, chunk.gradients(case["target_ids"], stats, upstream).matrix


def run_double(
    case: Case, transform: LogitTransform, upstream: RowGradients
) -> tuple[RowStatistics, Tensor]:
    """The same in float64, by autograd: a raw logit's gradient is that of a bias of its own."""
    bias = torch.zeros(len(case["hidden"]), len(case["head_weight"]), dtype=torch.float64)
    bias = (bias + case.get("bias", 0.0)).requires_grad_()
    options = {"temperature": transform.temperature, "logit_softcap": transform.softcap}
    z = double_logits(case | options | {"logit_scale": transform.scale, "bias": bias})
    log_probs, entropy = reference_log_probs(z, case["target_ids"]), reference_entropy(z)
    value = (upstream.log_probs.double() * log_probs).sum()
    if upstream.entropy is not None:
        value = value + (upstream.entropy.double() * entropy).sum()
    (gradient,) = torch.autograd.grad(value, bias)
    top = z.detach().max(1).values
    total = (z.detach() - top[:, None]).exp().sum(1).log()
    return RowStatistics(log_probs.detach(), top, total, entropy.detach()), gradient


def check_chunk(case: Case, transform: LogitTransform) -> None:
    """Statistics, the split normaliser included, and both parts of the gradient follow float64 as
    torch's operations in float32 do."""
    for with_entropy in (False, True):
        upstream = upstream_of(len(case["hidden"]), with_entropy=with_entropy)
        got, gradient = run_chunk(NativeChunk, case, transform, upstream)
        portable, torch_gradient = run_chunk(TorchChunk, case, transform, upstream)
        wanted, want = run_double(case, transform, upstream)
        assert (got.entropy is None) == (not with_entropy)
        for name in ("log_probs", "max_logit", "log_total", "entropy"):
            if getattr(got, name) is not None:
                values = (getattr(stats, name) for stats in (got, wanted, portable))
                assert_close(*values, is_gradient=False)
        assert gradient.dtype == torch.bfloat16
        if case["head_weight"].shape[0] == 1:
            assert torch.isfinite(gradient).all() and gradient.abs().max() < 1e-5
        elif transform.scale < 10:
            assert error(gradient, want) <= TWO_ROUNDINGS
        else:
            assert_close(gradient, want, torch_gradient.bfloat16(), is_gradient=True)


@needs_native
@pytest.mark.parametrize("bias", (False, True), ids=("no_bias", "bias"))
@pytest.mark.parametrize("kind", TRANSFORMS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_statistics_and_gradients(shape: tuple[int, int, int], kind: str, bias: bool) -> None:
    """For every shape and transform, with a bias and without."""
    num_rows, vocab_size, width = shape
    case = head_case(num_rows, width, vocab_size, torch.bfloat16, bias=bias, spread=3.0)
    check_chunk(case, TRANSFORMS[kind])


@needs_native
@pytest.mark.parametrize("size", (1e4, -1e4))
def test_huge_logits(size: float) -> None:
    """Logits of +-1e4 overflow nothing, and cost no more precision than torch's float32 does."""
    case = head_case(65, 34, 211, torch.bfloat16)
    case["hidden"], case["head_weight"] = case["hidden"].abs(), case["head_weight"].abs()
    raw = double_logits(case)
    check_chunk(case, LogitTransform(scale=size / float(raw.max())))


@needs_native
def test_log_prob_precision() -> None:
    """At D = 2048 and V = 20,000 bfloat16 log-probs are within 1e-5 nats RMS of float64."""
    case = head_case(64, 2048, 20_000, torch.bfloat16, spread=3.5)
    logits = double_logits(case)
    assert 3.0 <= float(logits.std()) <= 4.0
    want = reference_log_probs(logits, case["target_ids"])
    got = linear_log_probs(**case)
    assert (got.double() - want).square().mean().sqrt() <= 1e-5


def _zeros(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.bfloat16)


LAYOUTS: dict[str, tuple[Callable[[int, int], Tensor], type]] = {
    "transposed": (lambda v, d: _zeros(d, v).T, TorchChunk),
    "every other": (lambda v, d: _zeros(v, 2 * d)[:, ::2], TorchChunk),
    "odd rows": (lambda v, d: _zeros(v, d + 1)[:, :d], TorchChunk),
    "even rows": (lambda v, d: _zeros(v, d + 2)[:, :d], NativeChunk),
    "offset": (lambda v, d: _zeros(v, d + 2)[:, 1:-1], NativeChunk),
    "odd width": (lambda v, d: _zeros(v, d - 1), TorchChunk),
}
"""Room for a [V, D] weight, and what multiplies with it."""


@needs_native
@pytest.mark.parametrize("layout", LAYOUTS)
def test_weight_layouts(layout: str) -> None:
    """A weight whose rows cannot be read in pairs goes to `TorchChunk`; every layout is right."""
    make, kind = LAYOUTS[layout]
    room = make(211, 18)
    case = policy_case(width=room.shape[1], dtype=torch.bfloat16)
    case["head_weight"] = room.copy_(case["head_weight"])
    assert kind_of(case) is kind
    check_against_oracle(case)


@needs_native
def test_bits_do_not_depend_on_threads_or_runs() -> None:
    """Loss, statistics and dW are the same bits on one thread, on two, and a second time."""
    case = policy_case(150, 34, 4099, torch.bfloat16, bias=True) | {"chunk_rows": 70}
    case["entropy_weights"] = torch.full((150,), 0.1)
    before = torch.get_num_threads()
    try:
        runs = []
        for num_threads in (2, 2, 1):
            torch.set_num_threads(num_threads)
            loss, grads = run_ours(case)
            fields = (loss.loss, loss.log_probs, loss.entropy, loss.ratio)
            runs.append((*fields, grads["head_weight"]))
    finally:
        torch.set_num_threads(before)
    for values in zip(*runs, strict=True):
        assert all(torch.equal(values[0], value) for value in values[1:])


@needs_native
def test_fallbacks(tmp_path: Path) -> None:
    """Switched off: torch, silently. No working compiler: torch, and one warning with the fix."""
    broken = {"CXX": "/bin/false", "CARE_KERNELS_CACHE": str(tmp_path)}
    off, (kind, told) = in_processes(use_twice, {"CARE_KERNELS_NATIVE": "0"}, broken)
    assert off == (TorchChunk, []) and kind is TorchChunk
    assert len(told) == 1
    for part in ("Install a C++20 compiler", "CARE_KERNELS_NATIVE=0"):
        assert part in told[0]
    assert list(tmp_path.iterdir()) == []


@needs_native
def test_concurrent_first_builds(tmp_path: Path) -> None:
    """Two processes that both find no library both build one, and both run it."""
    library = cpu.load()
    cache, calls = tmp_path / "cache", tmp_path / "calls"
    calls.mkdir()
    # In place of the compiler: wait until both builds are under way, then copy what it would make.
    compiler = tmp_path / "compiler"
    compiler.write_text(
        "#!/bin/sh\n"
        'while [ "$1" != "-o" ]; do shift; done\n'
        f'touch "{calls}/$$"\n'
        f'for _ in $(seq 600); do [ "$(ls {calls} | wc -l)" -ge 2 ] && break; sleep 0.1; done\n'
        f'cp "{library}" "$2"\n'
    )
    compiler.chmod(compiler.stat().st_mode | stat.S_IXUSR)
    environment = {"CXX": str(compiler), "CARE_KERNELS_CACHE": str(cache)}
    assert in_processes(use_twice, environment, environment) == [(NativeChunk, [])] * 2
    assert len(list(calls.iterdir())) == 2
    assert [path.name for path in cache.iterdir()] == [library.name]
