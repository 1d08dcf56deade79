"""Promises of `linear_policy_loss` beyond agreement with the oracle."""

import operator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from care_kernels import Clip, linear_log_probs, linear_policy_loss
from tests.kernels.cases import (
    PER_ROW,
    Case,
    assert_close,
    assert_same,
    assert_same_bits,
    double_logits,
    error,
    leaves_of,
    only_rows,
    policy_case,
    row_vector,
    rows_that_count,
    run_ours,
    run_reference,
    with_kl,
)
from tests.kernels.dispatch import Watch
from tests.kernels.oracle import reference_log_probs
from tests.kernels.tolerances import SAME_MATHS

LEVELS = ("token", "sequence")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def in_sequences(case: Case, level: str, length: int = 9) -> Case:
    ids = torch.arange(case["hidden"].shape[0]) // length
    return case | {"ratio_level": level, "sequence_ids": ids}


def watched(case: Case, *, frozen: tuple[str, ...] = (), grad_mode: bool = True) -> Watch:
    """Run forward and, in grad mode, backward under a `Watch`."""
    case = case | leaves_of(case, frozen)
    with Watch() as watch, torch.set_grad_enabled(grad_mode):
        loss = linear_policy_loss(**case).loss
        if grad_mode:
            loss.backward()
    return watch


@pytest.mark.parametrize(
    ("level", "options", "gemms"),
    (
        ("token", {}, 3),
        ("token", {"frozen": ("head_weight",)}, 2),
        ("token", {"frozen": ("hidden",)}, 2),
        ("token", {"grad_mode": False}, 1),
        ("sequence", {}, 4),
        ("sequence", {"grad_mode": False}, 1),
    ),
)
def test_number_of_gemms(level: str, options: dict[str, Any], gemms: int) -> None:
    """Three GEMMs with gradients, one fewer for a frozen input, one without; GSPO adds one, but for
    a ratio of 1, which needs no first pass."""
    case = in_sequences(policy_case(), level)
    case["advantages"] = row_vector(case, 0.5, 1.0)
    one = case["hidden"].numel() * case["head_weight"].shape[0]
    assert watched(case, **options).multiply_adds == gemms * one
    del case["old_log_probs"]
    assert watched(case, **options).multiply_adds == min(gemms, 3) * one


@pytest.mark.parametrize("level", LEVELS)
def test_never_holds_all_logits(level: str) -> None:
    """No tensor grows to [N, V], whatever is computed, forward or backward."""
    case = with_kl(in_sequences(policy_case(num_rows=400, width=8), level), "exact")
    case |= {"chunk_rows": 16, "entropy_weights": row_vector(case, 0.0, 0.1)}
    vocab_size = case["head_weight"].shape[0]
    largest_allowed = max(16 * vocab_size, case["hidden"].numel(), case["head_weight"].numel())
    assert watched(case).largest <= largest_allowed < 400 * vocab_size


def test_backward_holds_no_second_gradient() -> None:
    """What waits for the upstream factor is scaled in place: no tensor of [V, D] is made for it."""
    case = policy_case(num_rows=40, width=32, vocab_size=900, dtype=torch.bfloat16)
    for rows in (None, 8):
        loss = linear_policy_loss(**(case | leaves_of(case)), chunk_rows=rows).loss
        dtypes = [grad.dtype for grad in loss.grad_fn.gradients if grad is not None]
        assert dtypes == [torch.bfloat16] * 2
        with Watch() as watch:
            (0.3 * loss).backward()
        assert watch.largest_allocated < 900 * 32


@pytest.mark.parametrize("hidden_dtype", (torch.float32, torch.bfloat16), ids=str)
def test_autocast_reaches_a_float32_head(hidden_dtype: torch.dtype) -> None:
    """Float32 weights under bfloat16 autocast, TRL's default: bfloat16 GEMMs, float32 statistics.

    The loss and gradients are those of operands cast by hand, but dW, which is never rounded to
    less than the parameter's float32.
    """
    case = policy_case(width=16)
    case["hidden"] = case["hidden"].to(hidden_dtype)
    by_hand = case | {name: case[name].bfloat16() for name in ("hidden", "head_weight")}
    plain, plain_grads = run_ours(by_hand)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast, cast_grads = run_ours(case)
        assert torch.float32 not in watched(case).gemm_dtypes
    assert torch.equal(plain.log_probs, cast.log_probs)
    assert torch.equal(plain.loss, cast.loss)
    assert cast_grads["hidden"].dtype == hidden_dtype
    assert torch.equal(cast_grads["hidden"], plain_grads["hidden"].to(hidden_dtype))
    assert cast_grads["head_weight"].dtype == torch.float32
    assert torch.equal(cast_grads["head_weight"].bfloat16(), plain_grads["head_weight"])
    assert not torch.equal(cast_grads["head_weight"], plain_grads["head_weight"].float())


def test_autocast_reaches_log_probs_and_their_backward() -> None:
    """The backward, which autocast does not enclose, multiplies in the forward's type."""
    case = policy_case(width=16)
    leaves = leaves_of(case)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        log_probs = linear_log_probs(**leaves, target_ids=case["target_ids"])
    with Watch() as watch:
        log_probs.sum().backward()
    operands = (case[name].bfloat16() for name in ("hidden", "head_weight"))
    assert torch.equal(log_probs, linear_log_probs(*operands, case["target_ids"]))
    assert torch.float32 not in watch.gemm_dtypes and leaves["head_weight"].grad is not None


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
def test_autocast_does_not_round_logits(dtype: torch.dtype) -> None:
    """An enclosing autocast changes no bit and no GEMM."""
    case = with_kl(policy_case(dtype=dtype), "exact")
    plain, gemm_dtypes = run_ours(case), watched(case).gemm_dtypes
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_same_bits(run_ours(case), plain)
        assert watched(case).gemm_dtypes == gemm_dtypes


@pytest.mark.parametrize("level", LEVELS)
def test_infinite_ratio_stays_on_its_row(level: str) -> None:
    """An overflowing ratio is clipped where a > 0 and silent where a row has no advantage."""
    case: Case = in_sequences(policy_case(), level)
    current = reference_log_probs(double_logits(case), case["target_ids"]).float()
    case |= {"kl_estimator": "k2", "kl_weights": torch.full((63,), 0.1), "ref_log_probs": current}
    case |= {"advantages": (torch.arange(63) % 2).float(), "old_log_probs": current - 1000.0}
    loss, grads = run_ours(case)
    assert torch.isinf(loss.ratio).all() and torch.isfinite(loss.loss)
    assert all(torch.isfinite(grad).all() for grad in grads.values())


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float32), ids=str)
def test_entropy_can_always_be_asked_for(dtype: torch.dtype) -> None:
    """`return_entropy` reports it and changes no bit of loss or gradients."""
    case = policy_case(dtype=dtype)
    plain, ours = run_ours(case), run_ours(case | {"return_entropy": True})
    weighted, _ = run_ours(case | {"entropy_weights": torch.ones(63)})
    assert plain[0].entropy is None
    assert ours[0].entropy is not None and weighted.entropy is not None
    counted = rows_that_count(case)
    assert_same(ours[0].entropy[counted], weighted.entropy[counted])
    assert_same_bits(ours, plain)


def test_two_losses_share_a_graph() -> None:
    """The loss is an ordinary node that adds to others; a second walk is refused, not wrong."""
    case = policy_case()
    hidden = case["hidden"].clone().requires_grad_()
    policy = linear_policy_loss(**(case | {"hidden": hidden * 2})).loss
    (both,) = torch.autograd.grad(policy + hidden.square().sum(), hidden, retain_graph=True)
    _, alone = run_ours(case | {"hidden": case["hidden"] * 2})
    assert_same(both, 2 * alone["hidden"] + 2 * case["hidden"])
    with pytest.raises(RuntimeError, match="a second backward over the same graph"):
        torch.autograd.grad(policy, hidden)


def test_what_carries_gradient() -> None:
    """The loss does, to hidden and head alone: row statistics are detached, and old and reference
    log-probs, weights and advantages are constants, even when they ask. Under no_grad nothing."""
    case = with_kl(policy_case(), "k3") | {"entropy_weights": torch.full((63,), 0.1)}
    constants = ("advantages", "old_log_probs", "kl_weights", "ref_hidden", "ref_head_weight")
    for name in (*constants, "hidden"):
        case[name] = case[name].clone().requires_grad_()
    loss, *per_row = linear_policy_loss(**case)
    assert not any(field.requires_grad for field in per_row if field is not None)
    loss.backward()
    assert case["hidden"].grad is not None
    assert all(case[name].grad is None for name in constants)
    with torch.no_grad():
        assert not linear_policy_loss(**case).loss.requires_grad


def test_partitioned_weight_may_be_released_before_backward() -> None:
    """The backward reads neither hidden nor head: a ZeRO-3 weight may be gone by then."""
    case = policy_case()
    _, grads = run_ours(case)
    weight = torch.nn.Parameter(case["head_weight"].clone())
    hidden = case["hidden"].clone().requires_grad_()
    loss = linear_policy_loss(**(case | {"hidden": hidden, "head_weight": weight})).loss
    gathered, weight.data = weight.data, torch.empty(0)
    (grad,) = torch.autograd.grad(loss, hidden)
    weight.data = gathered
    assert torch.equal(grad, grads["hidden"])


def sparse_case(dtype: torch.dtype, level: str, extra: str, num_rows: int = 60) -> Case:
    """Rows 20 to 39 count for nothing, other rows for some terms only; sequences of 10 rows."""
    case = policy_case(num_rows, dtype=dtype, bias=True) | {"chunk_rows": 16}
    case = in_sequences(case, level, length=10)
    index = torch.arange(num_rows)
    idle = (index >= 20) & (index < 40)
    case["advantages"] = case["advantages"].masked_fill(idle | (index < 7), 0.0)
    if extra != "none":
        case = with_kl(case, "exact" if extra == "exact" else "k3")
        case["kl_weights"] = case["kl_weights"].masked_fill(idle | (index >= 50), 0.0)
    if extra == "k3, entropy":
        weights = row_vector(case, 0.05, 0.1)
        case["entropy_weights"] = weights.masked_fill(idle | (index % 3 > 0), 0.0)
    counts = rows_that_count(case)
    assert 0 < int(counts.sum()) < num_rows and not counts[20:40].any()
    return case


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("extra", ("none", "exact", "k3, entropy"))
def test_skipping_changes_no_bit(backend: str, extra: str, level: str, dtype: torch.dtype) -> None:
    """With report_all_rows, and where the active rows alone are passed, loss, gradients and the
    active rows' fields keep their bits. What is reported of skipped rows is the oracle's."""
    case = sparse_case(dtype, level, extra) | {"backend": backend}
    counts = rows_that_count(case)
    default, default_grads = run_ours(case)
    reported, reported_grads = run_ours(case | {"report_all_rows": True})
    compact, compact_grads = run_ours(only_rows(case, counts))
    assert torch.equal(default.loss, reported.loss) and torch.equal(default.loss, compact.loss)
    assert default_grads.keys() == reported_grads.keys() == compact_grads.keys()
    assert not default_grads["hidden"][~counts].any()
    for name, grad in default_grads.items():
        assert torch.equal(grad, reported_grads[name])
        rows = counts if name == "hidden" else slice(None)
        assert torch.equal(grad[rows], compact_grads[name])
    for got, want, alone in zip(reported[1:], default[1:], compact[1:], strict=True):
        assert (got is None) == (want is None) == (alone is None)
        if got is not None and want is not None and alone is not None:
            assert torch.equal(got[counts], want[counts]) and torch.equal(alone, want[counts])

    (oracle, _), (eager, _) = run_reference(case), run_reference(case, torch.float32)
    for name in PER_ROW:
        got, want, torch_result = (getattr(run, name) for run in (reported, oracle, eager))
        if got is not None:
            assert_close(got, want, torch_result, is_gradient=False)
    assert torch.equal(reported.clipped_low, oracle.clipped_low)
    assert torch.equal(reported.clipped_high, oracle.clipped_high)


def test_skipped_rows_never_reach_a_gemm() -> None:
    """Compute scales with the rows that count, and a skipped row reads as documented; its target id
    may be anything, unless its statistics are asked for."""
    case = policy_case() | {"entropy_weights": torch.zeros(63)}
    case["advantages"] = torch.zeros(63).index_fill(0, torch.tensor([3, 50]), 1.0)
    case["old_log_probs"] = torch.zeros(63) - 10.0
    case["surrogate"] = Clip(high=float("inf"))
    one_row = case["head_weight"].numel()
    assert watched(case).multiply_adds == 3 * 2 * one_row

    case["target_ids"] = case["target_ids"].index_fill(0, torch.tensor([4]), -100)
    loss, grads = run_ours(case)
    skipped = case["advantages"] == 0
    assert (loss.log_probs[skipped] == 0).all()
    assert loss.entropy is not None and torch.equal(loss.entropy == 0, skipped)
    assert (loss.ratio[skipped] == 1).all()
    assert not (loss.clipped_low | loss.clipped_high)[skipped].any()
    assert (grads["hidden"][skipped] == 0).all()
    assert (grads["hidden"][~skipped] != 0).any(1).all()
    with pytest.raises(ValueError, match="target_ids: got ids from -100"):
        run_ours(case | {"report_all_rows": True})


@pytest.mark.parametrize("num_rows", (0, 5))
@pytest.mark.parametrize("level", LEVELS)
def test_nothing_to_learn_from(num_rows: int, level: str) -> None:
    """No rows, or none that counts: a zero loss that still belongs to the graph, the oracle's
    statistics where they are asked for, and a buffer for dW that keeps its bits."""
    case = with_kl(in_sequences(policy_case(num_rows, bias=True), level), "exact")
    for name in ("advantages", "kl_weights"):
        case[name] = torch.zeros(num_rows)
    loss, grads = run_ours(case)
    assert loss.loss.requires_grad and loss.loss.item() == 0
    for name in ("hidden", "head_weight", "bias"):
        assert grads[name].shape == case[name].shape
        assert (grads[name] == 0).all()
    buffer = torch.ones_like(case["head_weight"])
    reported, _ = run_ours(case | {"report_all_rows": True, "weight_grad": buffer})
    assert (buffer == 1).all()
    oracle, _ = run_reference(case)
    for name in PER_ROW[:1] + PER_ROW[2:]:
        assert_same(getattr(reported, name), getattr(oracle, name).detach().float())


ROWS = st.lists(st.integers(0, 89), min_size=1, max_size=12)


@settings(max_examples=25, deadline=None)
@given(rows=ROWS, dtype=st.sampled_from(DTYPES[:2]), chunk_rows=st.integers(1, 12))
def test_rows_do_not_see_each_other(rows: list[int], dtype: torch.dtype, chunk_rows: int) -> None:
    """Any choice of rows, in any order and repeated, in any chunks, gives each its own results."""
    case = with_kl(policy_case(90, dtype=dtype), "exact")
    case |= {"entropy_weights": row_vector(case, 0.05, 0.1), "advantages": case["advantages"] + 2}
    whole, whole_grads = run_ours(case)
    chosen = torch.tensor(rows)
    some, some_grads = run_ours(only_rows(case, chosen) | {"chunk_rows": chunk_rows})
    for name in PER_ROW:
        got, want = getattr(some, name), getattr(whole, name)
        assert error(got, want[chosen], 1.0) <= SAME_MATHS[torch.float32]
    got, want = some_grads["hidden"], whole_grads["hidden"]
    assert error(got, want[chosen], float(want.abs().max())) <= SAME_MATHS[dtype]


def run_into(case: Case, buffer: Tensor, *, upstream: float = 1.0) -> dict[str, Tensor]:
    """The leaves' own gradients of a call with `weight_grad`."""
    return run_ours(case | {"weight_grad": buffer}, upstream=upstream)[1]


@pytest.mark.parametrize("buffer_dtype", (*DTYPES, torch.float64), ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("chunk_rows", (None, 20), ids=("one_chunk", "chunks"))
def test_weight_grad_gains_dw(
    dtype: torch.dtype, buffer_dtype: torch.dtype, chunk_rows: int | None
) -> None:
    """The buffer, of any floating type, gains dW; dX is untouched; head_weight.grad stays None."""
    case = with_kl(policy_case(width=18, dtype=dtype), "exact") | {"chunk_rows": chunk_rows}
    _, plain = run_ours(case)
    generator = torch.Generator().manual_seed(3)
    buffer = torch.randn(case["head_weight"].shape, generator=generator).to(buffer_dtype)
    if chunk_rows is not None:
        # It need not be contiguous.
        buffer = buffer.T.contiguous().T
    want = buffer.double() + plain["head_weight"].double()
    grads = run_into(case, buffer)
    assert grads.keys() == {"hidden"} and torch.equal(grads["hidden"], plain["hidden"])
    assert error(buffer, want) <= max(SAME_MATHS[dtype], SAME_MATHS[buffer_dtype])


def test_weight_grad_keeps_small_contributions() -> None:
    """A float32 buffer keeps what bfloat16 would round away, call after call."""
    case = policy_case(dtype=torch.bfloat16)
    buffer = torch.full(case["head_weight"].shape, 100.0)
    once = torch.zeros_like(buffer)
    run_into(case, once)
    for _ in range(10):
        run_into(case | {"advantages": case["advantages"] * 1e-2}, buffer)
    assert error(buffer - 100.0, 0.1 * once) <= SAME_MATHS[torch.bfloat16]


@pytest.mark.parametrize("buffer_dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_weight_grad_is_the_only_buffer(dtype: torch.dtype, buffer_dtype: torch.dtype) -> None:
    """Nothing else of [V, D] is allocated, forward or backward."""
    case = policy_case(num_rows=40, width=32, vocab_size=9000, dtype=dtype) | {"chunk_rows": 8}
    buffer = torch.zeros(case["head_weight"].shape, dtype=buffer_dtype)
    watch = watched(case | {"weight_grad": buffer})
    assert 8 * 9000 <= watch.largest_allocated <= buffer.numel() // 2
    assert watched(case).largest_allocated == buffer.numel()


def test_weight_grad_sees_no_upstream_gradient() -> None:
    """The buffer is filled in the forward, also where head or hidden states are detached, not under
    no_grad: a factor on the loss scales dX alone."""
    case = policy_case()
    once, thrice, detached = (torch.zeros(case["head_weight"].shape) for _ in range(3))
    grads = run_into(case, once)
    tripled = run_into(case, thrice, upstream=3.0)
    assert torch.equal(once, thrice)
    assert_same(tripled["hidden"], 3 * grads["hidden"])
    linear_policy_loss(**case, weight_grad=detached)
    assert_same(detached, once)
    with torch.no_grad():
        linear_policy_loss(**case, weight_grad=detached)
    assert_same(detached, once)


def test_a_compiled_caller_leaves_the_calls_out() -> None:
    """Compiled, they would unroll their chunks for each number of rows, and hold twice as much."""
    case, compiled = policy_case(), []

    def backend(graph: Any, _: Any) -> Any:
        compiled.extend(node.target for node in graph.graph.nodes if "call" in node.op)
        return graph.forward

    def step(hidden: Tensor) -> Tensor:
        policy = linear_policy_loss(hidden + 1, **case)
        return policy.loss * linear_log_probs(hidden, case["head_weight"], case["target_ids"])

    # Dynamo compiles nothing within the dispatch mode that these tests run in.
    with _disable_current_modes():
        torch.compile(step, backend=backend)(case.pop("hidden"))
    assert compiled == [operator.add, operator.mul]
