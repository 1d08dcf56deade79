"""Promises of `linear_policy_loss` beyond agreement with the oracle."""

from typing import Any

import pytest
import torch

from care_kernels import Clip, linear_log_probs, linear_policy_loss
from care_kernels.chunks import HeadChunks
from tests.kernels.cases import (
    Case,
    assert_same,
    assert_same_bits,
    assert_same_run,
    double_logits,
    leaves_of,
    policy_case,
    row_vector,
    rows_that_count,
    run_ours,
    with_kl,
)
from tests.kernels.dispatch import Watch
from tests.kernels.oracle import reference_log_probs

LEVELS = ("token", "sequence")


def in_sequences(case: Case, level: str, length: int = 9) -> Case:
    ids = torch.arange(case["hidden"].shape[0]) // length
    return case | {"ratio_level": level, "sequence_ids": ids}


def watched(case: Case, *, frozen: tuple[str, ...] = (), grad_mode: bool = True) -> Watch:
    """Run forward and, in grad mode, backward under a `Watch`."""
    with Watch() as watch, torch.set_grad_enabled(grad_mode):
        loss = linear_policy_loss(**(case | leaves_of(case, frozen))).loss
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
@pytest.mark.parametrize("estimator", ("k3", "exact"))
def test_never_holds_all_logits(estimator: str, level: str) -> None:
    """No tensor grows to [N, V], whatever is computed, forward or backward."""
    case = with_kl(in_sequences(policy_case(num_rows=400, width=8), level), estimator)
    case |= {"chunk_rows": 16, "entropy_weights": row_vector(case, 0.0, 0.1)}
    vocab_size = case["head_weight"].shape[0]
    largest_allowed = max(16 * vocab_size, case["hidden"].numel(), case["head_weight"].numel())
    assert watched(case).largest <= largest_allowed < 400 * vocab_size


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
    want = linear_log_probs(*operands, case["target_ids"])
    assert torch.equal(log_probs, want)
    assert torch.float32 not in watch.gemm_dtypes and leaves["head_weight"].grad is not None


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


@pytest.mark.parametrize("level", LEVELS)
def test_exponentials_are_kept_for_gradients_alone(
    level: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first pass of a sequence ratio asks for statistics, not for what nobody reads."""
    kept: list[bool] = []
    project = HeadChunks.project

    def watched_project(self: HeadChunks, chunk: slice, *, keep: bool = False) -> Any:
        kept.append(keep)
        return project(self, chunk, keep=keep)

    monkeypatch.setattr(HeadChunks, "project", watched_project)
    run_ours(in_sequences(policy_case(dtype=torch.bfloat16), level))
    assert kept == ([True] if level == "token" else [False, True])


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


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
def test_autocast_does_not_round_logits(dtype: torch.dtype) -> None:
    """An enclosing autocast changes no bit and no GEMM."""
    case = with_kl(policy_case(dtype=dtype), "exact")
    plain, gemm_dtypes = run_ours(case), watched(case).gemm_dtypes
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_same_bits(run_ours(case), plain)
        assert watched(case).gemm_dtypes == gemm_dtypes


def test_skipped_rows_never_reach_a_gemm() -> None:
    """Compute scales with the rows that count, and a skipped row reads as documented."""
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
    assert loss.entropy is not None and (loss.entropy[skipped] == 0).all()
    assert (loss.ratio[skipped] == 1).all()
    assert not (loss.clipped_low | loss.clipped_high)[skipped].any()
    assert (grads["hidden"][skipped] == 0).all()
    assert (grads["hidden"][~skipped] != 0).any(1).all()


@pytest.mark.parametrize("num_rows", (0, 5))
@pytest.mark.parametrize("level", LEVELS)
def test_nothing_to_learn_from(num_rows: int, level: str) -> None:
    """No rows, or none that counts: a zero loss that still belongs to the graph."""
    case = with_kl(in_sequences(policy_case(num_rows, bias=True), level), "exact")
    for name in ("advantages", "kl_weights"):
        case[name] = torch.zeros(num_rows)
    loss, grads = run_ours(case)
    assert loss.loss.requires_grad and loss.loss.item() == 0
    for name in ("hidden", "head_weight", "bias"):
        assert grads[name].shape == case[name].shape
        assert (grads[name] == 0).all()


def test_vocabulary_tiles_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles that divide no vocabulary give what one tile gives."""
    case = with_kl(policy_case(), "exact") | {"entropy_weights": torch.full((63,), 0.1)}
    whole = run_ours(case)
    monkeypatch.setattr("care_kernels.softmax.VOCAB_TILE", 64)
    assert_same_run(run_ours(case), whole)


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


def test_optional_outputs() -> None:
    """Entropy comes with entropy weights, KL with KL weights; a zero weight still reports them."""
    case = policy_case()
    case["advantages"] = torch.ones(63)
    loss = linear_policy_loss(**case)
    assert loss.entropy is None and loss.kl is None
    loss = linear_policy_loss(**(with_kl(case, "k3") | {"entropy_weights": torch.zeros(63)}))
    assert loss.entropy is not None and (loss.entropy > 0).all()
    assert loss.kl is not None and (loss.kl >= 0).all()


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


def test_loss_scale_reaches_gradients_before_float16() -> None:
    """A gradient too small for float16 survives when the upstream loss scale lifts it."""
    case = policy_case(dtype=torch.float16)
    scale = 2.0**16
    case["advantages"] = case["advantages"] * 1e-9
    _, tiny = run_ours(case)
    _, scaled = run_ours(case, upstream=scale)
    assert (tiny["hidden"] == 0).all()
    assert (scaled["hidden"] != 0).any()


@pytest.mark.parametrize("level", LEVELS)
def test_infinite_ratio_stays_on_its_row(level: str) -> None:
    """An overflowing ratio is clipped where a > 0 and silent where a row has no advantage."""
    case: dict[str, Any] = in_sequences(policy_case(), level) | {
        "kl_estimator": "k2",
        "kl_weights": torch.full((63,), 0.1),
    }
    current = reference_log_probs(double_logits(case), case["target_ids"]).float()
    case["ref_log_probs"] = current
    case["advantages"] = (torch.arange(63) % 2).float()
    case["old_log_probs"] = current - 1000.0
    loss, grads = run_ours(case)
    assert torch.isinf(loss.ratio).all()
    assert torch.isfinite(loss.loss)
    assert all(torch.isfinite(grad).all() for grad in grads.values())
