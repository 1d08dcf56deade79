"""The C++ CPU kernels against float64, against the portable code, and how they come to be."""

import json
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

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
    chunk_kind,
)
from care_kernels.softmax import LogitTransform, RowGradients, RowStatistics
from tests.kernels.cases import (
    Case,
    assert_close,
    assert_same,
    check_against_oracle,
    error,
    head_case,
    policy_case,
    run_ours,
    with_kl,
)
from tests.kernels.oracle import reference_entropy, reference_log_probs, reference_logits
from tests.kernels.tolerances import SAME_MATHS, TWO_ROUNDINGS

ROOT = Path(__file__).parents[2]

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
    (1, 1, 2),
    (63, 1, 34),
    (1, 15, 2),
    (65, 16, 2),
    (63, 63, 34),
    (64, 64, 64),
    (130, 65, 34),
    (65, 211, 66),
    (3, 4099, 34),
)
"""Rows, vocabulary and hidden size, on and beside the kernels' blocks of 64, 64 (16) and 32."""


def spec_of(
    case: Case, transform: LogitTransform = TRANSFORMS["plain"], *, with_entropy: bool = False
) -> ChunkSpec:
    weight, bias = case["head_weight"], case.get("bias")
    options = {"with_entropy": with_entropy, "with_gradients": True}
    return ChunkSpec(case["hidden"].dtype, weight, bias, transform, **options)


def upstream_of(num_rows: int) -> RowGradients:
    """Gradients of both signs, some of them zero."""
    ramp = torch.linspace(-1, 1, num_rows) if num_rows > 1 else torch.ones(1)
    return RowGradients(ramp, ramp.flip(0).masked_fill(torch.arange(num_rows) % 3 == 2, 0.0))


def chunks_of(
    case: Case, transform: LogitTransform, *, with_entropy: bool = True
) -> tuple[NativeChunk, TorchChunk]:
    """The C++ kernels, and the torch operations in float32 that they are held against."""
    spec = spec_of(case, transform, with_entropy=with_entropy)
    num_rows = len(case["hidden"])
    return NativeChunk(spec, num_rows), TorchChunk(spec, num_rows)


def run_chunk(
    chunk: LogitChunk, case: Case, upstream: RowGradients, *, with_entropy: bool = True
) -> tuple[RowStatistics, Tensor]:
    """Statistics and the gradient of the raw logits."""
    stats = chunk.project(ChunkRows(case["hidden"], case["target_ids"]), keep=True)
    if not with_entropy:
        upstream = upstream._replace(entropy=None)
    return stats, chunk.gradients(case["target_ids"], stats, upstream).matrix


def run_double(
    case: Case, transform: LogitTransform, upstream: RowGradients, *, with_entropy: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probs, entropies and the gradient of the raw logits in float64, by autograd."""
    bias = case["bias"].double() if "bias" in case else None
    raw = reference_logits(case["hidden"].double(), case["head_weight"].double(), bias=bias)
    raw = raw.detach().requires_grad_()
    z = raw * transform.scale
    if transform.softcap is not None:
        z = transform.softcap * torch.tanh(z / transform.softcap)
    z = z / transform.temperature
    log_probs, entropy = reference_log_probs(z, case["target_ids"]), reference_entropy(z)
    value = (upstream.log_probs.double() * log_probs).sum()
    if with_entropy:
        assert upstream.entropy is not None
        value = value + (upstream.entropy.double() * entropy).sum()
    (gradient,) = torch.autograd.grad(value, raw)
    return log_probs.detach(), entropy.detach(), gradient


@needs_native
@pytest.mark.parametrize("bias", (False, True), ids=("no_bias", "bias"))
@pytest.mark.parametrize("kind", TRANSFORMS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_statistics_and_gradients(shape: tuple[int, int, int], kind: str, bias: bool) -> None:
    """Log-probs, entropies and both parts of the logits' gradient follow float64, like torch's."""
    num_rows, vocab_size, width = shape
    case = head_case(num_rows, width, vocab_size, torch.bfloat16, bias=bias, spread=3.0)
    transform, upstream = TRANSFORMS[kind], upstream_of(num_rows)
    for with_entropy in (False, True):
        native, portable = chunks_of(case, transform, with_entropy=with_entropy)
        got, gradient = run_chunk(native, case, upstream, with_entropy=with_entropy)
        torch_stats, _ = run_chunk(portable, case, upstream, with_entropy=with_entropy)
        log_probs, entropy, want = run_double(case, transform, upstream, with_entropy=with_entropy)
        assert_close(got.log_probs, log_probs, torch_stats.log_probs, is_gradient=False)
        assert (got.entropy is None) == (not with_entropy)
        if got.entropy is not None and torch_stats.entropy is not None:
            assert_close(got.entropy, entropy, torch_stats.entropy, is_gradient=False)
        assert gradient.dtype == torch.bfloat16
        if vocab_size > 1:
            assert error(gradient, want) <= TWO_ROUNDINGS
        else:
            assert torch.isfinite(gradient).all() and gradient.abs().max() < 1e-5


@needs_native
@pytest.mark.parametrize("kind", TRANSFORMS)
def test_agrees_with_the_portable_code(kind: str) -> None:
    """Same inputs, same statistics and gradients as `TorchChunk`, the split normaliser included."""
    case = head_case(70, 34, 211, torch.bfloat16, bias=True, spread=3.0)
    native, portable = chunks_of(case, TRANSFORMS[kind])
    upstream = upstream_of(70)
    got, gradient = run_chunk(native, case, upstream)
    want, want_gradient = run_chunk(portable, case, upstream)
    for name in ("log_probs", "max_logit", "log_total", "entropy"):
        assert error(getattr(got, name), getattr(want, name), 1.0) <= SAME_MATHS[torch.float32]
    assert_same(gradient, want_gradient.bfloat16())


@needs_native
@pytest.mark.parametrize("size", (1e4, -1e4))
def test_huge_logits(size: float) -> None:
    """Logits of +-1e4 overflow nothing, and cost no more precision than torch's float32 does."""
    case = head_case(65, 34, 211, torch.bfloat16)
    case["hidden"], case["head_weight"] = case["hidden"].abs(), case["head_weight"].abs()
    raw = reference_logits(case["hidden"].double(), case["head_weight"].double())
    transform = LogitTransform(scale=size / float(raw.max()))
    native_chunk, torch_chunk = chunks_of(case, transform)
    upstream = upstream_of(65)
    got, gradient = run_chunk(native_chunk, case, upstream)
    portable, torch_gradient = run_chunk(torch_chunk, case, upstream)
    log_probs, entropy, want = run_double(case, transform, upstream)
    assert got.entropy is not None and portable.entropy is not None
    assert_close(got.log_probs, log_probs, portable.log_probs, is_gradient=False)
    assert_close(got.entropy, entropy, portable.entropy, is_gradient=False)
    assert_close(gradient, want, torch_gradient.bfloat16(), is_gradient=True)


@needs_native
def test_log_prob_precision() -> None:
    """At D = 2048 and V = 20,000 bfloat16 log-probs are within 1e-5 nats RMS of float64."""
    case = head_case(64, 2048, 20_000, torch.bfloat16, spread=3.5)
    logits = reference_logits(case["hidden"].double(), case["head_weight"].double())
    assert 3.0 <= float(logits.std()) <= 4.0
    want = reference_log_probs(logits, case["target_ids"])
    got = linear_log_probs(**case)
    assert (got.double() - want).square().mean().sqrt() <= 1e-5


def kind_of(case: Case) -> type[LogitChunk]:
    return chunk_kind("torch", spec_of(case))[0]


def restrided(case: Case, layout: str) -> Case:
    """The same numbers in a head weight of another layout."""
    weight = case["head_weight"]
    vocab_size, width = weight.shape
    if layout == "contiguous":
        return case
    if layout == "transposed":
        return case | {"head_weight": weight.T.contiguous().T}
    if layout == "every_other":
        return case | {"head_weight": weight.repeat_interleave(2, 1)[:, ::2]}
    padding = {"odd_rows": 1, "even_rows": 2, "offset": 2}[layout]
    padded = weight.new_zeros(vocab_size, width + padding)
    view = padded[:, 1:-1] if layout == "offset" else padded[:, :width]
    view.copy_(weight)
    return case | {"head_weight": view}


@needs_native
@pytest.mark.parametrize(
    ("layout", "width", "kind"),
    (
        ("transposed", 18, TorchChunk),
        ("every_other", 18, TorchChunk),
        ("odd_rows", 18, TorchChunk),
        ("even_rows", 18, NativeChunk),
        ("offset", 18, NativeChunk),
        ("contiguous", 1, TorchChunk),
        ("contiguous", 17, TorchChunk),
    ),
)
def test_weight_layouts(layout: str, width: int, kind: type) -> None:
    """A weight whose rows cannot be read in pairs goes to `TorchChunk`; every layout is right."""
    case = restrided(policy_case(width=width, dtype=torch.bfloat16), layout)
    assert case["head_weight"].is_contiguous() == (layout == "contiguous")
    assert kind_of(case) is kind
    check_against_oracle(case)


@needs_native
@pytest.mark.parametrize("extra", ("none", "exact"))
def test_bits_do_not_depend_on_threads_or_runs(extra: str) -> None:
    """Loss, statistics and dW are the same bits on one thread, on two, and a second time."""
    case = policy_case(150, 34, 4099, torch.bfloat16, bias=True) | {"chunk_rows": 70}
    case["entropy_weights"] = torch.full((150,), 0.1)
    if extra == "exact":
        case = with_kl(case, "exact")
    before = torch.get_num_threads()
    try:
        runs = []
        for num_threads in (2, 2, 1):
            torch.set_num_threads(num_threads)
            runs.append(run_ours(case))
    finally:
        torch.set_num_threads(before)
    (first, first_grads), (again, again_grads), (alone, alone_grads) = runs
    for name in ("loss", "log_probs", "entropy", "ratio"):
        assert torch.equal(getattr(first, name), getattr(again, name))
        assert torch.equal(getattr(first, name), getattr(alone, name))
    assert all(torch.equal(grad, again_grads[name]) for name, grad in first_grads.items())
    assert torch.equal(first_grads["head_weight"], alone_grads["head_weight"])


PROBE = """
import json, warnings
import torch
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    from tests.kernels.cases import check_against_oracle, policy_case
    from tests.kernels.test_native_cpu import kind_of
    for _ in range(2):
        check_against_oracle(policy_case(dtype=torch.bfloat16))
    kind = kind_of(policy_case(dtype=torch.bfloat16)).__name__
ours = [str(w.message) for w in caught if "care_kernels" in str(w.message)]
print(json.dumps({"warnings": ours, "kind": kind}))
"""


def start_probe(**environment: str) -> subprocess.Popen[str]:
    """A fresh process that runs the loss twice, checks it, and tells how."""
    return subprocess.Popen(
        [sys.executable, "-c", PROBE],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(probe: subprocess.Popen[str]) -> dict[str, Any]:
    try:
        out, err = probe.communicate(timeout=200)
    finally:
        probe.kill()
    assert probe.returncode == 0, err
    return json.loads(out.splitlines()[-1])


@needs_native
def test_fallbacks(tmp_path: Path) -> None:
    """Switched off: torch, silently. No working compiler: torch, and one warning with the fix."""
    off = start_probe(CARE_KERNELS_NATIVE="0")
    broken = start_probe(CXX="/bin/false", CARE_KERNELS_CACHE=str(tmp_path))
    assert finish(off) == {"warnings": [], "kind": "TorchChunk"}
    told = finish(broken)
    assert told["kind"] == "TorchChunk"
    assert len(told["warnings"]) == 1
    for part in ("Install a C++20 compiler", "CARE_KERNELS_NATIVE=0"):
        assert part in told["warnings"][0]
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
    probes = [start_probe(CXX=str(compiler), CARE_KERNELS_CACHE=str(cache)) for _ in range(2)]
    for probe in probes:
        assert finish(probe) == {"warnings": [], "kind": "NativeChunk"}
    assert len(list(calls.iterdir())) == 2
    assert [path.name for path in cache.iterdir()] == [library.name]
    shutil.rmtree(cache)
