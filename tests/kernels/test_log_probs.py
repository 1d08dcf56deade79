"""`linear_log_probs` against the oracle, and what it promises about memory and the backward."""

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
    head_case,
    leaves_of,
)
from tests.kernels.dispatch import Watch
from tests.kernels.oracle import reference_entropy, reference_log_probs, reference_logits

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def upstreams(num_rows: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    pair = torch.randn(2, num_rows, generator=generator)
    pair[:, ::4] = 0
    return pair[0], pair[1]


def run(case: Case) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    leaves = leaves_of(case)
    log_probs, entropy = linear_log_probs(**(case | leaves), return_entropy=True)
    up_log_probs, up_entropy = upstreams(log_probs.numel())
    (up_log_probs * log_probs + up_entropy * entropy).sum().backward()
    return log_probs, entropy, {n: leaf.grad for n, leaf in leaves.items() if leaf.grad is not None}


def run_reference(case: Case, dtype: torch.dtype) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    leaves = {}
    for name in LEAVES:
        if name in case:
            own = dtype if dtype == torch.float64 else case[name].dtype
            leaves[name] = case[name].detach().to(own).requires_grad_()
    options = {n: v for n, v in case.items() if n not in (*LEAVES, *RUN_OPTIONS, "target_ids")}
    logits = reference_logits(**{n: leaf.to(dtype) for n, leaf in leaves.items()}, **options)
    log_probs, entropy = reference_log_probs(logits, case["target_ids"]), reference_entropy(logits)
    up_log_probs, up_entropy = upstreams(log_probs.numel())
    (up_log_probs * log_probs + up_entropy * entropy).sum().backward()
    return log_probs, entropy, {n: leaf.grad for n, leaf in leaves.items() if leaf.grad is not None}


def check(case: Case) -> None:
    ours, oracle = run(case), run_reference(case, torch.float64)
    dtype = torch.float64 if case["hidden"].dtype == torch.float64 else torch.float32
    eager = run_reference(case, dtype)
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
    ({}, {"temperature": 0.6}, {"logit_softcap": 4.0, "logit_scale": 1.5, "temperature": 1.2}),
    ids=("plain", "temperature", "softcap"),
)
def test_values_and_gradients(dtype: torch.dtype, chunk_rows: int | None, options: dict) -> None:
    """Log-probs, entropies and their gradients for any upstream follow the float64 oracle."""
    check(head_case(dtype=dtype, bias=True) | options | {"chunk_rows": chunk_rows})


@pytest.mark.parametrize("num_rows", (0, 1, 63))
@pytest.mark.parametrize("vocab_size", (1, 7, 9001))
def test_shapes(num_rows: int, vocab_size: int) -> None:
    """No shape is special."""
    check(head_case(num_rows, 5, vocab_size))


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
    """One GEMM without gradients, four with."""
    case = head_case()
    with Watch() as watch, torch.set_grad_enabled(grad_mode):
        log_probs = linear_log_probs(**(case | leaves_of(case)))
        if grad_mode:
            log_probs.sum().backward()
    assert watch.multiply_adds == gemms * case["hidden"].numel() * case["head_weight"].shape[0]


def test_backward_skips_rows_without_gradient() -> None:
    """Rows a loss masks out cost the backward nothing."""
    case = head_case()
    hidden = case["hidden"].clone().requires_grad_()
    log_probs = linear_log_probs(**(case | {"hidden": hidden}))
    mask = torch.zeros(63).index_fill(0, torch.tensor([1, 2, 60]), 1.0)
    with Watch() as watch:
        (log_probs * mask).sum().backward()
    assert watch.multiply_adds == 2 * 3 * case["head_weight"].numel()
    assert hidden.grad is not None and torch.equal((hidden.grad != 0).any(1), mask != 0)


def test_never_holds_all_logits() -> None:
    """No tensor grows to [N, V], forward or backward."""
    case = head_case(400, 8) | {"chunk_rows": 16}
    vocab_size = case["head_weight"].shape[0]
    with Watch() as watch:
        log_probs, entropy = linear_log_probs(**(case | leaves_of(case)), return_entropy=True)
        (log_probs + entropy).sum().backward()
    assert watch.largest <= max(16 * vocab_size, case["hidden"].numel()) < 400 * vocab_size


def test_low_precision_logits_are_not_rounded() -> None:
    """bfloat16 inputs lose 0.01 nats and more when logits are rounded; ours stay within 1e-5."""
    case = head_case(dtype=torch.bfloat16, spread=4.0)
    want = reference_log_probs(
        reference_logits(case["hidden"].double(), case["head_weight"].double()), case["target_ids"]
    )
    rounded = (case["hidden"] @ case["head_weight"].T).float()
    ours = linear_log_probs(**case)
    assert float((ours - want).abs().max()) < 1e-5
    assert float((reference_log_probs(rounded, case["target_ids"]) - want).abs().max()) > 1e-2


def test_spread_logits_keep_their_log_probs() -> None:
    """log p = (z_y - max) - log sum: no digit is lost to the size of the logits themselves."""
    hidden = torch.tensor([[1.0]])
    weight = torch.tensor([[20000.0], [20000.0], [19999.0]])
    ours = linear_log_probs(hidden, weight, torch.tensor([0]))
    want = torch.log_softmax(weight.double()[:, 0], 0)[0]
    assert float((ours - want).abs()) < 1e-6


def test_weight_released_before_backward() -> None:
    """The recompute needs the head again, and says so if a partitioned one is gone."""
    case = head_case()
    weight = torch.nn.Parameter(case["head_weight"].clone())
    log_probs = linear_log_probs(**(case | {"head_weight": weight}))
    weight.data = torch.empty(0)
    with pytest.raises(RuntimeError, match="head_weight: got shape \\(0,\\) in the backward"):
        log_probs.sum().backward()
