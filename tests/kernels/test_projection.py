"""Triton's `projection` and `softmax` against float64 from the same 16-bit operands."""

from collections.abc import Iterator

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from care_kernels import softmax
from care_kernels.softmax import LogitTransform, RowGradients, RowStatistics
from care_kernels.triton import projection
from care_kernels.triton.launch import expm1, tanh
from care_kernels.triton.projection import GemmTile, TileStatistics, empty_exps, project
from care_kernels.triton.softmax import anchor_targets_, combine, exp_gradients_
from tests.kernels.cases import DEVICE, assert_close, assert_same, error
from tests.kernels.interpreter import IS_INTERPRETED, decorate, interpreting
from tests.kernels.tolerances import FLOOR

SHAPES = [(0, 64, 17), (1, 32, 1), (5, 64, 17), (33, 100, 1000), (20, 96, 2307), (37, 80, 211)]
TRANSFORMS = {
    "plain": LogitTransform(),
    "temperature": LogitTransform(temperature=0.7, scale=0.5),
    "softcap": LogitTransform(temperature=0.7, softcap=10.0, scale=2.0),
}
DTYPES = (torch.bfloat16, torch.float16)
VARIATIONS = [(shape, "softcap", True) for shape in SHAPES]
VARIATIONS += [(SHAPES[3], "softcap", False), (SHAPES[3], "plain", True)]
VARIATIONS += [(SHAPES[3], "temperature", False)]
"""Edges of every dimension; then the other transforms, and without the entropy's moment."""
MAX_LOG_PROB_RMS = 1e-5
HAS_DESCRIPTORS = IS_INTERPRETED or torch.cuda.get_device_capability()[0] >= 9


@pytest.fixture(autouse=True)
def interpreter() -> Iterator[None]:
    """Every test here calls kernels."""
    with interpreting():
        yield


@pytest.fixture(params=("pointers", "descriptors"))
def loads(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """How aligned rows are loaded: by one program per tile, or by a few that make many tiles."""
    if request.param == "descriptors" and not HAS_DESCRIPTORS:
        pytest.skip("this GPU has no tensor descriptors")

    def gemm_tile(architecture: str, form: str) -> GemmTile:
        tile = choose(architecture, form)
        if request.param == "pointers" and not IS_INTERPRETED:
            return choose("8", form)
        return tile._replace(USE_TMA=request.param == "descriptors" and form != "unaligned")

    choose = projection.gemm_tile
    monkeypatch.setattr(projection, "gemm_tile", gemm_tile)
    return request.param


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
        target_ids = torch.randint(vocab_size, (num_rows,), generator=generator)
        self.target_ids = target_ids.to(DEVICE)
        self.transform = transform
        self.g, self.d_entropy = torch.randn(2, num_rows, generator=generator).to(DEVICE)
        self.drift = (torch.rand(num_rows, generator=generator) * 6 - 3).to(DEVICE)
        self.logits = self.hidden.double() @ self.weight.double().T
        if self.bias is not None:
            self.logits += self.bias.double()
        transform.apply_(self.logits)
        self.stats = softmax.row_statistics(self.logits, self.target_ids, with_entropy=True)

    def empty_exps(self) -> Tensor:
        """A buffer whose padding is poisoned, as uninitialised memory may be."""
        shape = (self.hidden.shape[0], self.weight.shape[0])
        exps = empty_exps(*shape, self.hidden.dtype, self.hidden.device)
        exps.as_strided((shape[0], exps.stride(0)), (exps.stride(0), 1)).fill_(float("nan"))
        return exps

    def project(
        self,
        exps: Tensor | None = None,
        *,
        with_entropy: bool = True,
        anchor: Tensor | None = None,
    ) -> tuple[RowStatistics, TileStatistics]:
        tiles = project(
            self.hidden,
            self.weight,
            self.bias,
            self.target_ids,
            self.transform,
            with_entropy=with_entropy,
            anchor=anchor,
            exps=exps,
        )
        return combine(tiles), tiles

    def log_normalizer(self) -> Tensor:
        return self.stats.max_logit + self.stats.log_total

    def gradients(self, logits: Tensor, upstream: RowGradients) -> Tensor:
        """dL/draw by torch, in the dtype of `logits`."""
        stats = RowStatistics(*(cast(field, logits.dtype) for field in self.stats))
        upstream = RowGradients(*(cast(field, logits.dtype) for field in upstream))
        out = torch.empty_like(logits)
        softmax.logit_gradients(logits, self.target_ids, stats, upstream, self.transform, out=out)
        return out


def cast(value: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if value is None else value.to(dtype)


def check_statistics(problem: Problem, ours: RowStatistics) -> None:
    for got, want in zip(ours[:4], problem.stats[:4], strict=True):
        if got is not None and got.numel():
            assert want is not None
            assert float((got - want).square().mean().sqrt()) <= MAX_LOG_PROB_RMS


def check_padding(exps: Tensor) -> None:
    """Zeros from each row's end to the next multiple of 16."""
    num_rows, vocab_size = exps.shape
    padding = exps.as_strided(
        (num_rows, exps.stride(0) - vocab_size), (exps.stride(0), 1), vocab_size
    )
    assert not padding.any()


def check_exp_gradients(problem: Problem, *, with_entropy: bool = True) -> Tensor:
    """As close as float32 logits rounded once to the dtype of the exponentials."""
    exps = problem.empty_exps()
    stats, tiles = problem.project(exps)
    check_statistics(problem, stats)
    upstream = RowGradients(problem.g, problem.d_entropy if with_entropy else None)
    exp_gradients_(exps, tiles, problem.target_ids, stats, upstream, problem.transform)
    want = problem.gradients(problem.logits, upstream)
    eager = problem.gradients(problem.logits.float(), upstream).to(exps.dtype)
    assert_close(exps, want, eager, is_gradient=True)
    norm = float(want.norm())
    if norm > 0:
        ours, torchs = (float((value - want).norm()) / norm for value in (exps, eager))
        assert ours <= 1.3 * torchs + 1e-4
    check_padding(exps)
    return exps


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
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


@pytest.mark.parametrize(("shape", "transform", "with_entropy"), VARIATIONS)
def test_gradients(
    shape: tuple[int, int, int], transform: str, with_entropy: bool, loads: str
) -> None:
    """From bfloat16 exponentials, and statistics without them."""
    problem = Problem(*shape, TRANSFORMS[transform])
    check_exp_gradients(problem, with_entropy=with_entropy)
    if with_entropy:
        check_statistics(problem, problem.project()[0])


def test_a_target_in_the_last_column(loads: str) -> None:
    """Of a vocabulary that 16 does not divide: the last tile is stored up to the padded width.

    Exponentials and derivatives come in the operands' own dtype.
    """
    float16 = Problem(20, 96, 2307, TRANSFORMS["temperature"], dtype=torch.float16)
    assert check_exp_gradients(float16).dtype == torch.float16
    problem = Problem(3, 16, 1297, TRANSFORMS["plain"], bias_dtype=None)
    problem.target_ids[-1] = 1296
    problem.stats = softmax.row_statistics(problem.logits, problem.target_ids, with_entropy=True)
    check_exp_gradients(problem)


@pytest.mark.parametrize("shape", (SHAPES[0], SHAPES[3], SHAPES[5]))
def test_anchored(shape: tuple[int, int, int], loads: str) -> None:
    """For drifts of the log-normaliser up to 3 nats: its statistics, and c E as the derivative,
    with one number of each row changed and none of the others."""
    problem = Problem(*shape, TRANSFORMS["temperature"])
    anchor = (problem.log_normalizer() + problem.drift).float()
    exps = problem.empty_exps()
    stats, tiles = problem.project(exps, anchor=anchor)
    assert tiles.max_logit is None and torch.equal(stats.max_logit, anchor)
    want = problem.gradients(problem.logits, RowGradients(problem.g))
    problem.stats = problem.stats._replace(
        max_logit=anchor.double(), log_total=problem.log_normalizer() - anchor.double()
    )
    check_statistics(problem, stats)
    anchor_targets_(exps, problem.target_ids, stats.log_probs, stats.log_total)
    slope = problem.transform.slope(stats.log_total)
    factor = -problem.g * torch.exp(-stats.log_total) * slope
    # E is rounded once, by at most 2^-8 of it.
    assert error(exps.double() * factor.double()[:, None], want) <= 2**-8 + FLOOR[torch.float32]
    check_padding(exps)


def test_a_target_of_another_head(loads: str) -> None:
    """-1: the derivative is that of the normaliser alone."""
    problem = Problem(5, 64, 211, TRANSFORMS["plain"])
    want = -problem.g[:, None] * torch.softmax(problem.logits, 1)
    nowhere = torch.full_like(problem.target_ids, -1)
    exps = problem.empty_exps()
    stats, tiles = problem.project(exps)
    exp_gradients_(exps, tiles, nowhere, stats, RowGradients(problem.g), problem.transform)
    assert float((exps - want).abs().max()) <= 2**-8 * float(want.abs().max())


@pytest.mark.parametrize("anchored", (False, True))
def test_an_impossible_token(anchored: bool, loads: str) -> None:
    """A bias of -inf: no probability, no derivative, and the entropy of the others."""
    problem = Problem(5, 64, 300, TRANSFORMS["plain"], bias_dtype=torch.float32)
    assert problem.bias is not None
    impossible = torch.arange(300, device=DEVICE) % 7 == 0
    impossible[128:] = True
    problem.bias[impossible] = -torch.inf
    problem.target_ids.fill_(3)
    kept = problem.logits[:, ~impossible]
    want = torch.log_softmax(kept, 1)
    exps = problem.empty_exps()
    anchor = kept.logsumexp(1).float() if anchored else None
    stats, _ = problem.project(exps, anchor=anchor)
    assert not exps[:, :128][:, impossible[:128]].any()
    assert stats.entropy is not None
    entropy = -(want.exp() * want).sum(1)
    assert float((stats.entropy - entropy).abs().max()) < 1e-5
    # Token 3 is the third of those that are left.
    assert float((stats.log_probs - want[:, 2]).abs().max()) < 1e-5


def test_strided_operands_and_buffer(loads: str) -> None:
    """Rows further apart than a row; zeros are written between the buffer's. The same sums in the
    same order: the same bits."""
    wide = Problem(10, 128, 203, TRANSFORMS["plain"], bias_dtype=None)
    problem = Problem(5, 96, 203, TRANSFORMS["plain"], bias_dtype=None)
    wide.hidden[::2, :96] = problem.hidden
    wide.weight[:, :96] = problem.weight
    apart = problem.empty_exps()
    want, _ = problem.project(apart)
    problem.hidden, problem.weight = wide.hidden[::2, :96], wide.weight[:, :96]
    buffer = torch.full((5, 256), 7.0, dtype=torch.bfloat16, device=DEVICE)
    got, _ = problem.project(buffer[:, :203])
    assert torch.equal(got.log_probs, want.log_probs)
    assert torch.equal(buffer[:, :203], apart)
    assert not buffer[:, 203:].any()


def test_a_target_too_unlikely_for_an_exponential() -> None:
    """Its E is 0, so nothing of z is left in it: its slope comes from the float32 logit."""
    transform = LogitTransform(softcap=100.0)
    hidden = torch.ones(1, 16, device=DEVICE, dtype=torch.bfloat16)
    weight = torch.zeros(64, 16, device=DEVICE, dtype=torch.bfloat16)
    weight[3], weight[5] = -6.0, 6.0
    target_ids = torch.tensor([3], device=DEVICE)
    exps = empty_exps(1, 64, hidden.dtype, hidden.device)
    tiles = project(hidden, weight, None, target_ids, transform, exps=exps)
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


def test_triton_is_left_as_it_was() -> None:
    """Every member of Triton's language is the one it was; kernels made elsewhere are compiled."""
    owners = (tl, tl.core, tl.math, tl.standard, tl.tensor, tl.dtype)
    before = [dict(vars(owner)) for owner in owners]
    with interpreting():
        hidden = torch.zeros(1, 16, device=DEVICE, dtype=torch.bfloat16)
        project(hidden, hidden, None, torch.tensor([0], device=DEVICE), LogitTransform())
    for owner, members in zip(owners, before, strict=True):
        changed = [name for name, member in vars(owner).items() if members.get(name) is not member]
        assert not changed
    assert isinstance(triton.jit(_elementary_kernel), triton.JITFunction)
