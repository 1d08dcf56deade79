"""`row_objective` against `care_kernels.objective`, and expm1 and tanh against float64."""

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from care_kernels.objective import ClipRange, sampled_kl, token_surrogate, weighted
from care_kernels.triton.launch import expm1, tanh
from care_kernels.triton.objective import RowObjective, row_objective
from tests.kernels.cases import assert_close, assert_same
from tests.kernels.triton.interpreter import DEVICE, decorate

ESTIMATORS = ("k1", "k2", "k3", "exact")
BOOLS = ("clipped_low", "clipped_high")


def row_inputs(num_rows: int, seed: int = 0) -> dict[str, Tensor]:
    """One vector of everything, with zeros among the advantages and the weights."""
    generator = torch.Generator().manual_seed(seed)

    def normal() -> Tensor:
        return torch.randn(num_rows, generator=generator)

    log_probs = -3 * normal().abs()
    inputs = {
        "log_probs": log_probs,
        "advantages": normal(),
        "old_log_probs": log_probs + 0.4 * normal(),
        "ref_log_probs": log_probs + normal() * 10 ** (-2 + normal()),
        "kl_weights": normal().abs(),
        "exact_kl": normal().abs(),
        "entropy": normal().abs(),
        "entropy_weights": normal().abs(),
    }
    for period, name in enumerate(("advantages", "kl_weights", "entropy_weights"), 3):
        inputs[name][::period] = 0
    return {name: value.to(DEVICE) for name, value in inputs.items()}


def expected(
    inputs: dict[str, Tensor], clip: ClipRange, estimator: str | None, dtype: torch.dtype
) -> RowObjective:
    """The same from `objective`, in `dtype`."""
    rows = {name: value.to(dtype) for name, value in inputs.items()}
    log_probs, kl_weights = rows["log_probs"], rows.get("kl_weights")
    old = rows.get("old_log_probs", log_probs)
    surrogate = token_surrogate(log_probs - old, rows["advantages"], clip)
    kl, grad = None, -surrogate.grad_log_probs
    if estimator == "exact":
        kl = rows["exact_kl"]
    elif estimator is not None:
        kl, slope = sampled_kl(estimator, log_probs, rows["ref_log_probs"])
        grad = grad + weighted(kl_weights, slope)
    value = weighted(kl_weights if estimator else None, kl) - surrogate.value
    value = value - weighted(rows.get("entropy_weights"), rows.get("entropy"))
    return RowObjective(
        value, surrogate.ratio, kl, surrogate.clipped_low, surrogate.clipped_high, grad
    )


def run(inputs: dict[str, Tensor], clip: ClipRange, estimator: str | None) -> RowObjective:
    used = {name: value for name, value in inputs.items() if estimator or name != "kl_weights"}
    return row_objective(clip=clip, kl_estimator=estimator or "k3", **used)


def check(inputs: dict[str, Tensor], clip: ClipRange, estimator: str | None) -> None:
    ours = run(inputs, clip, estimator)
    eager = expected(inputs, clip, estimator, torch.float32)
    oracle = expected(inputs, clip, estimator, torch.float64)
    for name, got, want, torch_result in zip(ours._fields, ours, oracle, eager, strict=True):
        assert (got is None) == (want is None)
        if name in BOOLS:
            assert torch.equal(got, torch_result)
        elif got is not None:
            assert_close(got, want, torch_result, is_gradient=name == "grad_log_probs")


@pytest.mark.parametrize("dual", (None, 1.5))
@pytest.mark.parametrize("estimator", (None, *ESTIMATORS))
@pytest.mark.parametrize("num_rows", (0, 1, 700))
def test_objective(num_rows: int, estimator: str | None, dual: float | None) -> None:
    """Every KL with and without the dual clip, over one block of rows and several."""
    check(row_inputs(num_rows), ClipRange(0.2, 0.28, dual), estimator)


@pytest.mark.parametrize(
    "absent", (("old_log_probs",), ("entropy", "entropy_weights"), ("kl_weights",))
)
def test_absent_terms(absent: tuple[str, ...]) -> None:
    """Without old log-probs the ratio is 1; without weights a term is not there."""
    inputs = {name: value for name, value in row_inputs(33).items() if name not in absent}
    estimator = None if "kl_weights" in absent else "k3"
    check(inputs, ClipRange(0.2, 0.28), estimator)
    if "old_log_probs" in absent:
        ratio = run(inputs, ClipRange(0.2, 0.28), estimator).ratio
        assert torch.equal(ratio, torch.ones_like(ratio))


FINITE = st.floats(-3, 3, width=32).filter(lambda x: x == 0 or abs(x) > 1e-6)


@settings(max_examples=30, deadline=None)
@given(
    rows=st.lists(st.tuples(FINITE, FINITE, FINITE), min_size=1, max_size=20),
    low=st.floats(0, 0.9),
    high=st.floats(0, 2),
    dual=st.none() | st.floats(1.01, 10),
)
def test_objective_of_drawn_rows(
    rows: list[tuple[float, float, float]], low: float, high: float, dual: float | None
) -> None:
    """Any log-ratio, advantage and clip: away from the bounds, the same branch as torch takes."""
    log_ratio, advantages, d = torch.tensor(rows, device=DEVICE).T
    ratio = log_ratio.double().exp()
    for bound in (1 - low, 1 + high, *(() if dual is None else (dual,))):
        near = (ratio - bound).abs() < 1e-5
        log_ratio = torch.where(near, log_ratio + 1e-4, log_ratio)
    zeros = torch.zeros_like(log_ratio)
    inputs = {
        "log_probs": log_ratio,
        "advantages": advantages,
        "old_log_probs": zeros,
        "ref_log_probs": log_ratio - d,
        "kl_weights": zeros + 0.5,
    }
    check(inputs, ClipRange(low, high, dual), "k3")


@pytest.mark.parametrize(
    ("ratio", "advantage", "grad", "low", "high"),
    (
        (1.27, 2.0, -2.54, False, False),
        (1.29, 2.0, 0.0, False, True),
        (0.5, 2.0, -1.0, False, False),
        (0.81, -2.0, 1.62, False, False),
        (0.79, -2.0, 0.0, True, False),
        (2.9, -2.0, 5.8, False, False),
        (3.1, -2.0, 0.0, False, True),
        (5.0, 0.0, 0.0, False, False),
    ),
)
def test_clip_edges(ratio: float, advantage: float, grad: float, low: bool, high: bool) -> None:
    """Eq. 12's derivative is cut beyond the bound on the advantage's side only, and flagged."""
    log_probs = torch.tensor([ratio], device=DEVICE).log()
    ours = row_objective(
        log_probs,
        torch.tensor([advantage], device=DEVICE),
        ClipRange(0.2, 0.28, 3.0),
        old_log_probs=torch.zeros_like(log_probs),
    )
    assert ours.grad_log_probs.item() == pytest.approx(grad, rel=1e-6)
    assert (bool(ours.clipped_low), bool(ours.clipped_high)) == (low, high)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_zero_weight_silences_an_infinity() -> None:
    """0 * inf = 0 in the surrogate, the KL and the entropy."""
    infinite = torch.full((2,), 1e4, device=DEVICE)
    zeros = torch.zeros_like(infinite)
    ours = row_objective(
        zeros,
        zeros,
        ClipRange(0.2, 0.28),
        old_log_probs=-infinite,
        kl_weights=zeros,
        ref_log_probs=infinite,
        entropy=zeros + float("inf"),
        entropy_weights=zeros,
    )
    assert torch.equal(ours.value, zeros)
    assert torch.equal(ours.grad_log_probs, zeros)
    assert ours.ratio.isinf().all()


def test_a_missing_vector_is_named() -> None:
    """Weights without what they weigh, and an unknown estimator."""
    inputs = row_inputs(3)
    del inputs["ref_log_probs"]
    with pytest.raises(ValueError, match="ref_log_probs: got None"):
        run(inputs, ClipRange(0.2, 0.28), "k3")
    with pytest.raises(ValueError, match="kl_estimator: got 'k4'"):
        run(inputs, ClipRange(0.2, 0.28), "k4")


def _elementary_kernel(x_ptr, expm1_ptr, tanh_ptr, BLOCK: tl.constexpr):
    lanes = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + lanes)
    tl.store(expm1_ptr + lanes, expm1(x))
    tl.store(tanh_ptr + lanes, tanh(x))


def test_expm1_and_tanh_keep_small_digits() -> None:
    """The relative error stays near float32's over twelve orders of magnitude, both signs."""
    size = torch.logspace(-10, 1.5, 512)
    x = torch.cat((size, -size)).to(DEVICE)
    got_expm1, got_tanh = torch.empty_like(x), torch.empty_like(x)
    decorate(_elementary_kernel)[(1,)](x, got_expm1, got_tanh, BLOCK=triton.next_power_of_2(len(x)))
    for got, want in ((got_expm1, torch.expm1(x.double())), (got_tanh, torch.tanh(x.double()))):
        assert float(((got - want) / want).abs().max()) < 2e-6
    assert_same(got_tanh[:512], -got_tanh[512:])
