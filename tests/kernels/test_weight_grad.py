"""`weight_grad`: the head's gradient goes straight into a buffer of the caller's."""

import pytest
import torch
from torch import Tensor

from care_kernels import linear_policy_loss
from tests.kernels.cases import (
    Case,
    assert_same,
    error,
    leaves_of,
    only_rows,
    policy_case,
    run_ours,
    with_kl,
)
from tests.kernels.dispatch import Watch
from tests.kernels.tolerances import SAME_MATHS

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BUFFER_DTYPES = (*DTYPES, torch.float64)


def run_into(case: Case, buffer: Tensor, *, upstream: float = 1.0) -> dict[str, Tensor | None]:
    """One call with `weight_grad` and its backward; the leaves' own gradients."""
    leaves = leaves_of(case)
    loss = linear_policy_loss(**(case | leaves), weight_grad=buffer).loss
    (upstream * loss).backward()
    return {name: leaf.grad for name, leaf in leaves.items()}


def started(case: Case, dtype: torch.dtype, seed: int = 3) -> Tensor:
    """A buffer that already holds numbers of the gradient's size."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(case["head_weight"].shape, generator=generator).to(dtype)


@pytest.mark.parametrize("buffer_dtype", BUFFER_DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("chunk_rows", (None, 20), ids=("one_chunk", "chunks"))
def test_adds_what_the_backward_would(
    dtype: torch.dtype, buffer_dtype: torch.dtype, chunk_rows: int | None
) -> None:
    """The buffer, of any floating type, gains dW; dX is untouched; head_weight.grad stays None."""
    case = with_kl(policy_case(width=18, dtype=dtype), "exact") | {"chunk_rows": chunk_rows}
    _, plain = run_ours(case)
    buffer = started(case, buffer_dtype)
    if chunk_rows is not None:
        # It need not be contiguous.
        buffer = buffer.T.contiguous().T
    want = buffer.double() + plain["head_weight"].double()
    grads = run_into(case, buffer)
    assert grads["head_weight"] is None
    assert grads["hidden"] is not None and torch.equal(grads["hidden"], plain["hidden"])
    coarser = max(SAME_MATHS[dtype], SAME_MATHS[buffer_dtype])
    assert error(buffer, want) <= coarser


@pytest.mark.parametrize("level", ("token", "sequence"))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_accumulates_over_calls(dtype: torch.dtype, level: str) -> None:
    """Micro-batches add up in the buffer as they would in `.grad`."""
    case = with_kl(policy_case(dtype=dtype), "k3")
    case |= {"ratio_level": level, "sequence_ids": torch.arange(63) // 9}
    buffer = torch.zeros(case["head_weight"].shape)
    weight = case["head_weight"].clone().requires_grad_()
    for rows in torch.arange(63).chunk(3):
        part = only_rows(case, rows)
        run_into(part, buffer)
        linear_policy_loss(**(part | {"head_weight": weight})).loss.backward()
    assert weight.grad is not None
    assert_same(buffer.to(dtype), weight.grad)


def test_small_contributions_survive_in_float32() -> None:
    """A float32 buffer keeps what bfloat16 would round away, call after call."""
    case = policy_case(dtype=torch.bfloat16)
    buffer = torch.full(case["head_weight"].shape, 100.0)
    once = torch.zeros_like(buffer)
    run_into(case, once)
    small = case | {"advantages": case["advantages"] * 1e-2}
    for _ in range(10):
        run_into(small, buffer)
    assert error(buffer - 100.0, 0.1 * once) <= SAME_MATHS[torch.bfloat16]


@pytest.mark.parametrize(
    ("dtype", "buffer_dtype"),
    (
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.bfloat16, torch.bfloat16),
        (torch.float32, torch.bfloat16),
    ),
    ids=str,
)
def test_no_second_gradient_buffer(dtype: torch.dtype, buffer_dtype: torch.dtype) -> None:
    """Nothing else of [V, D] is allocated, forward or backward."""
    case = policy_case(num_rows=40, width=32, vocab_size=9000, dtype=dtype) | {"chunk_rows": 8}
    buffer = torch.zeros(case["head_weight"].shape, dtype=buffer_dtype)
    leaves = leaves_of(case)
    with Watch() as watch:
        linear_policy_loss(**(case | leaves), weight_grad=buffer).loss.backward()
    assert 8 * 9000 <= watch.largest_allocated <= buffer.numel() // 2
    with Watch() as watch:
        linear_policy_loss(**(case | leaves)).loss.backward()
    assert watch.largest_allocated == buffer.numel()


def test_upstream_gradient_does_not_reach_it() -> None:
    """The buffer is filled in the forward: a factor on the loss scales dX alone."""
    case = policy_case()
    once, thrice = (torch.zeros(case["head_weight"].shape) for _ in range(2))
    grads = run_into(case, once)["hidden"]
    tripled = run_into(case, thrice, upstream=3.0)["hidden"]
    assert torch.equal(once, thrice)
    assert grads is not None and tripled is not None
    assert_same(tripled, 3 * grads)


def test_detached_inputs() -> None:
    """Neither a detached head nor detached hidden states keep dW from the buffer; no_grad does."""
    case = policy_case()
    _, plain = run_ours(case)
    for trained in (("hidden",), ()):
        leaves = leaves_of(case, names=trained)
        buffer = torch.zeros(case["head_weight"].shape)
        linear_policy_loss(**(case | leaves), weight_grad=buffer)
        assert_same(buffer, plain["head_weight"])
    with torch.no_grad():
        before = buffer.clone()
        linear_policy_loss(**case, weight_grad=buffer)
        assert torch.equal(buffer, before)


def test_nothing_to_learn_from_leaves_it_alone() -> None:
    """Without a row that counts, and with statistics of every row, the buffer keeps its bits."""
    case = policy_case()
    case["advantages"] = torch.zeros(63)
    buffer = started(case, torch.float32)
    before = buffer.clone()
    run_into(case | {"report_all_rows": True}, buffer)
    assert torch.equal(buffer, before)
