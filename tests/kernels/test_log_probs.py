"""`linear_log_probs` against the oracle, and what it promises about memory and the backward."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from care_kernels import linear_log_probs
from tests.kernels.cases import (
    LEAVES,
    RUN_OPTIONS,
    Case,
    assert_close,
    assert_same,
    error,
    gradients_of,
    head_case,
    leaves_of,
    on_its_device,
    oracle_leaves,
)
from tests.kernels.dispatch import Watch
from tests.kernels.oracle import reference_entropy, reference_log_probs, reference_logits
from tests.kernels.tolerances import FLOOR

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
Outcome = tuple[Tensor, Tensor, dict[str, Tensor]]
"""Log-probs, entropies, and the gradients of the leaves."""


def run(case: Case, upstream: Tensor) -> Outcome:
    """Ours, under the upstream gradients [2, N] of log-probs and entropies."""
    case = on_its_device(case)
    leaves = leaves_of(case)
    log_probs, entropy = linear_log_probs(**(case | leaves), return_entropy=True)
    return _finish(log_probs, entropy, leaves, upstream.to(log_probs.device))


def run_reference(case: Case, upstream: Tensor, dtype: torch.dtype) -> Outcome:
    """The oracle, computed in `dtype`."""
    leaves = oracle_leaves(case, dtype)
    options = {n: v for n, v in case.items() if n not in (*LEAVES, *RUN_OPTIONS, "target_ids")}
    logits = reference_logits(**{n: leaf.to(dtype) for n, leaf in leaves.items()}, **options)
    log_probs, entropy = reference_log_probs(logits, case["target_ids"]), reference_entropy(logits)
    return _finish(log_probs, entropy, leaves, upstream)


def _finish(
    log_probs: Tensor, entropy: Tensor, leaves: dict[str, Tensor], upstream: Tensor
) -> Outcome:
    (upstream[0] * log_probs + upstream[1] * entropy).sum().backward()
    return log_probs.cpu(), entropy.cpu(), gradients_of(leaves)


def check(case: Case) -> None:
    generator = torch.Generator().manual_seed(5)
    upstream = torch.randn(2, len(case["hidden"]), generator=generator)
    upstream[:, ::4] = 0
    dtype = torch.float64 if case["hidden"].dtype == torch.float64 else torch.float32
    ours, eager = run(case, upstream), run_reference(case, upstream, dtype)
    oracle = run_reference(case, upstream, torch.float64)
    for got, want, torch_result in zip(ours[:2], oracle[:2], eager[:2], strict=True):
        assert got.dtype == dtype
        assert_close(got, want, torch_result, is_gradient=False)
    assert set(ours[2]) == set(oracle[2])
    for name, grad in ours[2].items():
        assert grad.dtype == case[name].dtype
        assert_close(grad, oracle[2][name], eager[2][name], is_gradient=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("chunk_rows", (None, 13))
@pytest.mark.parametrize(
    "options",
    ({}, {"logit_softcap": 4.0, "logit_scale": 1.5, "temperature": 1.2}),
    ids=("plain", "softcap"),
)
def test_values_and_gradients(
    backend: str, dtype: torch.dtype, chunk_rows: int | None, options: Case
) -> None:
    """Log-probs, entropies and their gradients for any upstream follow the float64 oracle."""
    case = head_case(23, dtype=dtype, bias=True) | options
    check(case | {"chunk_rows": chunk_rows, "backend": backend})


@pytest.mark.parametrize("shape", ((0, 5, 7), (1, 5, 1), (5, 5, 7), (63, 5, 9001)), ids=str)
def test_shapes(shape: tuple[int, int, int]) -> None:
    """No shape is special."""
    check(head_case(*shape))


def test_log_probs_alone() -> None:
    """Without return_entropy the result is one tensor, the same one, and just as differentiable."""
    case = head_case()
    hidden = [case["hidden"].clone().requires_grad_() for _ in range(2)]
    both, _ = linear_log_probs(**(case | {"hidden": hidden[0]}), return_entropy=True)
    alone = linear_log_probs(**(case | {"hidden": hidden[1]}))
    assert torch.equal(alone, both)
    grads = [torch.autograd.grad(r.sum(), h)[0] for r, h in zip((both, alone), hidden, strict=True)]
    assert_same(*grads)


@pytest.mark.parametrize(("grad_mode", "gemms"), ((False, 1), (True, 4)))
def test_number_of_gemms(grad_mode: bool, gemms: int) -> None:
    """One GEMM without gradients, four with; rows a loss masks out cost the backward nothing."""
    case = head_case()
    leaves = leaves_of(case)
    with Watch() as watch, torch.set_grad_enabled(grad_mode):
        log_probs = linear_log_probs(**(case | leaves))
        if grad_mode:
            log_probs.sum().backward(retain_graph=True)
    assert watch.multiply_adds == gemms * case["hidden"].numel() * case["head_weight"].shape[0]
    if grad_mode:
        mask = torch.zeros(63).index_fill(0, torch.tensor([1, 2, 60]), 1.0)
        with Watch() as watch:
            (grad,) = torch.autograd.grad((log_probs * mask).sum(), leaves["hidden"])
        assert watch.multiply_adds == 3 * 3 * case["head_weight"].numel()
        assert torch.equal((grad != 0).any(1), mask != 0)


def test_never_holds_all_logits() -> None:
    """No tensor grows to [N, V], forward or backward."""
    case = head_case(400, 8) | {"chunk_rows": 16}
    vocab_size = case["head_weight"].shape[0]
    with Watch() as watch:
        log_probs, entropy = linear_log_probs(**(case | leaves_of(case)), return_entropy=True)
        (log_probs + entropy).sum().backward()
    assert watch.largest <= max(16 * vocab_size, case["hidden"].numel()) < 400 * vocab_size


def test_without_gradients_holds_no_logits(triton_backend: str) -> None:
    """The fused projection leaves a few numbers for each row and vocabulary tile."""
    case = on_its_device(head_case(40, 16, 3000, torch.bfloat16) | {"backend": triton_backend})
    with Watch() as watch, torch.no_grad():
        linear_log_probs(**case)
    assert watch.largest < 40 * 3000


def test_spread_logits_keep_their_log_probs() -> None:
    """log p = (z_y - max) - log sum: no digit is lost to the size of the logits themselves."""
    weight = torch.tensor([[20000.0], [20000.0], [19999.0]])
    ours = linear_log_probs(torch.ones(1, 1), weight, torch.tensor([0]))
    want = torch.log_softmax(weight.double()[:, 0], 0)[0]
    assert float((ours - want).abs()) < 1e-6


def test_float16_keeps_what_is_small(triton_backend: str) -> None:
    """Upstream gradients of 2e-4, of which dL/dz would be a few steps of float16."""
    case = head_case(23, dtype=torch.float16)
    upstream = torch.stack((torch.linspace(-1, 1, 23), torch.zeros(23)))
    _, _, oracle = run_reference(case, upstream, torch.float64)
    case["backend"] = triton_backend
    (_, _, plain), (_, _, tiny) = (run(case, scale * upstream) for scale in (1.0, 2e-4))
    for name, want in oracle.items():
        as_exact = 1.5 * error(plain[name], want) + FLOOR[torch.float16]
        assert error(tiny[name].double() / 2e-4, want) <= as_exact


@pytest.mark.parametrize("frozen", ((), ("head_weight",), ("hidden", "bias")), ids="-".join)
def test_a_weight_that_is_gathered_for_the_backward(frozen: tuple[str, ...]) -> None:
    """As under ZeRO-3 the head is empty between forward and backward: the gradients are those of
    one that stays. Without `gathered` an error says what is missing."""
    case = head_case(bias=True) | {"temperature": 0.8, "logit_softcap": 2.0, "logit_scale": 1.5}
    upstream = torch.linspace(-1, 1, 63).masked_fill(torch.arange(63) % 4 == 0, 0.0)
    empty, whole = torch.empty(0), case["head_weight"]

    @contextmanager
    def gathered(weight: Tensor, bias: Tensor) -> Iterator[None]:
        weight.data = whole
        yield
        weight.data = empty

    def gradients(**options: Any) -> tuple[Tensor, ...]:
        leaves = leaves_of(case, frozen)
        log_probs, entropy = linear_log_probs(**(case | leaves), return_entropy=True, **options)
        if options:
            leaves["head_weight"].data = empty
        loss = (upstream * log_probs + upstream.flip(0) * entropy).sum()
        return torch.autograd.grad(loss, [leaf for leaf in leaves.values() if leaf.requires_grad])

    for found, wanted in zip(gradients(gathered=gathered), gradients(), strict=True):
        assert torch.equal(found, wanted)
    with pytest.raises(RuntimeError, match="head_weight: got shape \\(0,\\) in the backward"):
        gradients(gathered=None)
