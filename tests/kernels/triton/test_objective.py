"""The fused objective against `care_kernels.objective`; expm1 and tanh against float64."""

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from care_kernels import objective
from care_kernels.objective import Cispo, Clip, RowTerms, Sapo, Surrogate
from care_kernels.softmax import RowStatistics
from care_kernels.triton.launch import expm1, tanh
from care_kernels.triton.objective import row_objective
from tests.kernels.cases import assert_close, assert_same
from tests.kernels.triton.interpreter import DEVICE, decorate

ESTIMATORS = ("k1", "k2", "k3", "k3_unbiased")
SURROGATES = (Clip(), Clip(dual=1.5), Cispo(1.5, 0.8), Sapo(2.0, 0.5))


def rows_of(num_rows: int, seed: int = 0) -> tuple[RowStatistics, RowTerms]:
    """One vector of everything, with zeros among the advantages and the weights."""
    generator = torch.Generator().manual_seed(seed)

    def normal() -> Tensor:
        return torch.randn(num_rows, generator=generator)

    def weights(period: int) -> Tensor:
        values = normal().abs()
        values[::period] = 0
        return values.to(DEVICE)

    log_probs = -3 * normal().abs()
    stats = RowStatistics(
        log_probs.to(DEVICE),
        *(torch.zeros(num_rows, device=DEVICE) for _ in range(2)),
        entropy=normal().abs().to(DEVICE),
    )
    advantages = normal()
    advantages[::3] = 0
    terms = RowTerms(
        advantages.to(DEVICE),
        (log_probs + 0.4 * normal()).to(DEVICE),
        (log_probs + normal() * 10 ** (-2 + normal())).to(DEVICE),
        weights(4),
        weights(5),
    )
    return stats, terms


def check(stats: RowStatistics, terms: RowTerms, surrogate: Surrogate, estimator: str) -> None:
    """Values, ratios, flags and derivatives as torch has them, held to float64."""

    def in_torch(dtype: torch.dtype) -> tuple:
        cast = [
            record._make(None if field is None else field.to(dtype) for field in record)
            for record in (stats, terms)
        ]
        return objective.row_objective(*cast, surrogate, estimator)

    (ours, upstream), (eager, eager_upstream) = (
        row_objective(stats, terms, surrogate, estimator),
        in_torch(torch.float32),
    )
    oracle, oracle_upstream = in_torch(torch.float64)
    pairs = [(name, *(getattr(r, name) for r in (ours, oracle, eager))) for name in ours._fields]
    pairs.append(("gradient", upstream[0], oracle_upstream[0], eager_upstream[0]))
    for name, got, want, torch_result in pairs:
        if got is None:
            continue
        if got.dtype == torch.bool:
            assert torch.equal(got, torch_result), name
        else:
            assert_close(got, want, torch_result, is_gradient=name == "gradient")


@pytest.mark.parametrize("surrogate", SURROGATES, ids=repr)
@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("num_rows", (0, 1, 700))
def test_objective(num_rows: int, estimator: str, surrogate: Surrogate) -> None:
    """Every surrogate with every KL, over one block of rows and several."""
    check(*rows_of(num_rows), surrogate, estimator)


@pytest.mark.parametrize("absent", ("old_log_probs", "entropy_weights", "kl_weights"))
def test_absent_terms(absent: str) -> None:
    """Without old log-probs the ratio is 1; without weights a term is not there."""
    stats, terms = rows_of(33)
    terms = terms._replace(**{absent: None})
    check(stats, terms, Clip(), "k3")
    if absent == "old_log_probs":
        ratio = row_objective(stats, terms, Clip(), "k3")[0].ratio
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
    terms = RowTerms(advantages, zeros, log_ratio - d, zeros + 0.5, None)
    check(RowStatistics(log_ratio, zeros, zeros), terms, Clip(low, high, dual), "k3")


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_zero_weight_silences_an_infinity() -> None:
    """0 * inf = 0 in the surrogate, the KL and the entropy."""
    infinite = torch.full((2,), 1e4, device=DEVICE)
    zeros = torch.zeros_like(infinite)
    stats = RowStatistics(zeros, zeros, zeros, entropy=zeros + float("inf"))
    terms = RowTerms(zeros, -infinite, infinite, zeros, zeros)
    ours, upstream = row_objective(stats, terms, Clip(), "k3")
    assert torch.equal(ours.loss, zeros)
    assert torch.equal(upstream.log_probs, zeros)
    assert ours.ratio.isinf().all()


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
