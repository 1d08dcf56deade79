"""`fused_projection` and `exp_gradients` against float64 from the same bfloat16 operands."""

import pytest
import torch
from torch import Tensor

from care_kernels import row_softmax
from care_kernels.softmax import LogitTransform, RowGradients, RowStatistics
from care_kernels.triton_backend.exp_gradients import exp_gradients_
from care_kernels.triton_backend.fused_projection import empty_exps, project, supports
from care_kernels.triton_backend.tile_statistics import TileStatistics, combine
from tests.kernels.cases import assert_close
from tests.kernels.triton_backend.interpreter import DEVICE
from tests.kernels.triton_backend.test_row_kernels import (
    TRANSFORMS,
    make_gradients,
    make_targets,
)

SHAPES = [(0, 64, 17), (1, 32, 1), (5, 64, 17), (33, 100, 1000), (20, 96, 4099)]
MAX_LOG_PROB_RMS = 1e-5


class Problem:
    """Operands of one shape, the float64 logits they make, and their statistics."""

    def __init__(
        self,
        num_rows: int,
        width: int,
        vocab_size: int,
        transform: LogitTransform,
        *,
        dtype: torch.dtype = torch.bfloat16,
        offset: float = 0.0,
        bias_dtype: torch.dtype | None = torch.bfloat16,
    ) -> None:
        generator = torch.Generator().manual_seed(num_rows + width + vocab_size)
        self.hidden = torch.randn(num_rows, width, generator=generator).to(DEVICE, dtype)
        weight = torch.randn(vocab_size, width, generator=generator) * 3 * width**-0.5
        self.weight = weight.to(DEVICE, dtype)
        self.bias = None
        if bias_dtype is not None:
            bias = torch.randn(vocab_size, generator=generator) + offset
            self.bias = bias.to(DEVICE, bias_dtype)
        self.target_ids = make_targets(num_rows, vocab_size)
        self.transform = transform
        self.logits = self.hidden.double() @ self.weight.double().T
        if self.bias is not None:
            self.logits += self.bias.double()
        transform.apply_(self.logits)
        self.stats = row_softmax.row_statistics(self.logits, self.target_ids, with_entropy=True)

    def project(
        self, exps: Tensor | None = None, *, with_entropy: bool = True
    ) -> tuple[RowStatistics, TileStatistics]:
        tiles = project(
            self.hidden,
            self.weight,
            self.bias,
            self.target_ids,
            self.transform,
            with_entropy=with_entropy,
            exps=exps,
        )
        return combine(tiles), tiles

    def gradients(self, logits: Tensor, upstream: RowGradients) -> Tensor:
        """dL/draw by torch, in the dtype of `logits`."""
        stats = RowStatistics(*(cast(field, logits.dtype) for field in self.stats))
        upstream = RowGradients(*(cast(field, logits.dtype) for field in upstream))
        out = torch.empty_like(logits)
        row_softmax.logit_gradients(
            logits, self.target_ids, stats, upstream, self.transform, out=out
        )
        return out


def cast(value: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if value is None else value.to(dtype)


def check_statistics(problem: Problem, ours: RowStatistics) -> None:
    for got, want in zip(ours[:4], problem.stats[:4], strict=True):
        if got is not None and got.numel():
            assert want is not None
            assert float((got - want).square().mean().sqrt()) <= MAX_LOG_PROB_RMS


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
@pytest.mark.parametrize("shape", SHAPES)
def test_statistics(shape: tuple[int, int, int], transform: LogitTransform) -> None:
    """Log-prob, maximum, normaliser and entropy, for edges of every dimension."""
    problem = Problem(*shape, transform)
    check_statistics(problem, problem.project()[0])


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("bias_dtype", (None, torch.float32, torch.float16), ids=str)
def test_dtypes(bias_dtype: torch.dtype | None, dtype: torch.dtype) -> None:
    """Both operand types, with a bias of any type or none, without the entropy."""
    problem = Problem(5, 64, 1000, TRANSFORMS["plain"], dtype=dtype, bias_dtype=bias_dtype)
    stats, tiles = problem.project(with_entropy=False)
    assert stats.entropy is None and tiles.moment is None
    check_statistics(problem, stats)


@pytest.mark.parametrize("offset", (1e3, -1e3))
def test_large_logits(offset: float) -> None:
    """A common offset of 1,000 costs the spacing of float32 there, 6e-5, and no more."""
    problem = Problem(5, 64, 1000, TRANSFORMS["plain"], offset=offset, bias_dtype=torch.float32)
    stats = problem.project()[0]
    assert float((stats.log_probs - problem.stats.log_probs).abs().max()) < 3e-4
    assert float((stats.log_total - problem.stats.log_total).abs().max()) < 3e-4


@pytest.mark.parametrize("with_entropy", (False, True))
@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
@pytest.mark.parametrize("shape", SHAPES)
def test_gradients(
    shape: tuple[int, int, int], transform: LogitTransform, with_entropy: bool
) -> None:
    """From bfloat16 exponentials, as close as float32 logits rounded once to bfloat16."""
    problem = Problem(*shape, transform)
    exps = empty_exps(shape[0], shape[2], problem.hidden.device)
    stats, tiles = problem.project(exps)
    g, d_entropy, _ = make_gradients(shape[0], True)
    upstream = RowGradients(g, d_entropy if with_entropy else None)
    exp_gradients_(exps, tiles, problem.target_ids, stats, upstream, transform)
    want = problem.gradients(problem.logits, upstream)
    eager = problem.gradients(problem.logits.float(), upstream).bfloat16()
    assert_close(exps, want, eager, is_gradient=True)
    norm = float(want.norm())
    if norm > 0:
        assert (
            float((exps - want).norm()) / norm <= 1.3 * float((eager - want).norm()) / norm + 1e-4
        )


def test_strided_operands_and_buffer() -> None:
    """Rows further apart than a row; nothing is written between them."""
    wide = Problem(10, 128, 203, TRANSFORMS["plain"], bias_dtype=None)
    problem = Problem(5, 100, 203, TRANSFORMS["plain"], bias_dtype=None)
    wide.hidden[::2, :100] = problem.hidden
    wide.weight[:, :100] = problem.weight
    apart = empty_exps(5, 203, problem.hidden.device)
    want, _ = problem.project(apart)
    problem.hidden, problem.weight = wide.hidden[::2, :100], wide.weight[:, :100]
    buffer = torch.full((5, 256), 7.0, dtype=torch.bfloat16, device=DEVICE)
    got, _ = problem.project(buffer[:, :203])
    assert torch.equal(got.log_probs, want.log_probs)
    assert torch.equal(buffer[:, :203], apart)
    assert bool((buffer[:, 203:] == 7).all())


def test_a_target_too_unlikely_for_an_exponential() -> None:
    """Its E is 0, so nothing of z is left in it: its slope comes from the float32 logit."""
    transform = LogitTransform(softcap=100.0)
    hidden = torch.ones(1, 16, device=DEVICE, dtype=torch.bfloat16)
    weight = torch.zeros(64, 16, device=DEVICE, dtype=torch.bfloat16)
    weight[3], weight[5] = -6.0, 6.0
    target_ids = torch.tensor([3], device=DEVICE)
    exps = empty_exps(1, 64, hidden.device)
    tiles = project(hidden, weight, None, target_ids, transform, with_entropy=False, exps=exps)
    assert exps[0, 3] == 0
    upstream = RowGradients(torch.ones(1, device=DEVICE))
    exp_gradients_(exps, tiles, target_ids, combine(tiles), upstream, transform)
    slope = 1 - torch.tanh(torch.tensor(0.96)) ** 2
    assert exps[0, 3].item() == pytest.approx(float(slope), rel=4e-3)


def test_an_id_outside_the_vocabulary_gives_nan() -> None:
    """No tile holds it."""
    problem = Problem(5, 64, 17, TRANSFORMS["plain"])
    problem.target_ids = torch.tensor([-1, 17, 0, 16, 2**31], device=DEVICE)
    log_probs = problem.project()[0].log_probs
    assert log_probs.isnan().tolist() == [True, True, False, False, True]


def test_supports() -> None:
    """16-bit operands, bfloat16 where gradients are wanted, and no exact KL."""
    options = {"with_exact_kl": False, "with_gradients": True}
    weight = torch.zeros(4, 3)
    assert supports(torch.bfloat16, weight.bfloat16(), **options)
    assert not supports(torch.bfloat16, weight, **options)
    assert not supports(torch.float32, weight, **options)
    assert not supports(torch.float16, weight.half(), **options)
    assert supports(torch.float16, weight.half(), with_exact_kl=False, with_gradients=False)
    assert not supports(torch.bfloat16, weight.bfloat16(), **options | {"with_exact_kl": True})
    assert not supports(torch.bfloat16, torch.zeros(3, 4).bfloat16().T, **options)


def test_the_exact_kl_is_refused() -> None:
    """It needs the reference's logits beside the policy's."""
    problem = Problem(5, 64, 17, TRANSFORMS["plain"])
    exps = empty_exps(5, 17, problem.hidden.device)
    stats, tiles = problem.project(exps)
    with pytest.raises(ValueError, match=r"gradients.kl: got a tensor; wanted None"):
        exp_gradients_(
            exps, tiles, problem.target_ids, stats, make_gradients(5, True), problem.transform
        )
