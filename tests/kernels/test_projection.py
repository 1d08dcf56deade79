"""Triton's fused projection: both ways to load, and what the public functions never ask of it."""

from collections.abc import Callable

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from care_kernels import softmax
from care_kernels.softmax import LogitTransform, RowGradients
from care_kernels.triton import projection
from care_kernels.triton.launch import expm1, tanh
from care_kernels.triton.projection import GemmTile, TileStatistics, empty_exps, project
from care_kernels.triton.softmax import combine, exp_gradients_
from tests.kernels.cases import (
    DEVICE,
    Case,
    assert_same,
    check_against_oracle,
    policy_case,
    row_vector,
    with_kl,
)
from tests.kernels.interpreter import IS_INTERPRETED, decorate, interpreting

pytestmark = pytest.mark.usefixtures("triton_backend")
HAS_DESCRIPTORS = IS_INTERPRETED or torch.cuda.get_device_capability()[0] >= 9


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


def edge(*shape: int, **options: float) -> Case:
    """Entropy of both signs, k3, a bias in float32 and old log-probs beyond the clip."""
    case = with_kl(policy_case(*shape, torch.bfloat16, bias=True, drift=0.5), "k3")
    entropy_weights = row_vector(case, -0.1, 0.1, seed=3)
    return case | {"bias": case["bias"].float(), "entropy_weights": entropy_weights} | options


def last_column() -> Case:
    """A target there, of a vocabulary that 16 does not divide: the last tile is stored up to the
    padded width."""
    case = policy_case(3, 16, 1297, torch.bfloat16) | {"advantages": torch.ones(3)}
    case["target_ids"][-1] = 1296
    return case


def far_apart() -> Case:
    """Rows further apart than a row, NaN between them."""
    case = edge(5, 96, 203)
    for name in ("hidden", "head_weight"):
        matrix = case[name]
        wide = matrix.new_full((2 * len(matrix), 128), torch.nan)
        wide[::2, :96] = matrix
        case[name] = wide[::2, :96]
    return case


EDGES: dict[str, Callable[[], Case]] = {
    "one word": lambda: edge(1, 32, 1),
    "one tile": lambda: edge(5, 64, 17, temperature=0.7, logit_scale=0.5),
    "tiles": lambda: edge(20, 96, 2307, logit_softcap=10.0, temperature=0.7, logit_scale=2.0),
    "softcap": lambda: edge(33, 100, 1000, logit_softcap=10.0),
    "float16": lambda: policy_case(23, dtype=torch.float16) | {"chunk_rows": 17},
    "last column": last_column,
    "far apart": far_apart,
}


@pytest.mark.parametrize("name", EDGES)
def test_every_way_to_load(loads: str, name: str) -> None:
    """Edges of every dimension, from pointers and from tensor descriptors."""
    check_against_oracle(EDGES[name]() | {"backend": "triton"})


class Problem:
    """Operands in bfloat16 with a bias, and the float64 logits they make."""

    def __init__(self, vocab_size: int, *, offset: float = 0.0) -> None:
        generator = torch.Generator().manual_seed(vocab_size)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator).to(DEVICE)

        self.hidden = normal(5, 64).bfloat16()
        self.weight = (3 / 8 * normal(vocab_size, 64)).bfloat16()
        self.bias = normal(vocab_size) + offset
        self.target_ids = torch.randint(vocab_size, (5,), generator=generator).to(DEVICE)
        self.logits = self.hidden.double() @ self.weight.double().T + self.bias.double()

    def project(self, exps: Tensor | None = None, **options: Tensor | None) -> TileStatistics:
        operands = (self.hidden, self.weight, self.bias, self.target_ids)
        return project(*operands, LogitTransform(), with_entropy=True, exps=exps, **options)

    def empty_exps(self) -> Tensor:
        return empty_exps(*self.logits.shape, self.hidden.dtype, self.hidden.device)


@pytest.mark.parametrize("offset", (1e3, -1e3))
def test_large_logits(offset: float) -> None:
    """A common offset of 1,000 costs the spacing of float32 there, 6e-5, and no more."""
    problem = Problem(1000, offset=offset)
    got = combine(problem.project())
    want = softmax.row_statistics(problem.logits, problem.target_ids, with_entropy=True)
    for name in ("log_probs", "log_total"):
        assert float((getattr(got, name) - getattr(want, name)).abs().max()) < 3e-4


def test_a_target_of_another_head(loads: str) -> None:
    """-1: the derivative is that of the normaliser alone."""
    problem = Problem(211)
    upstream = torch.linspace(-1, 1, 5, device=DEVICE)
    want = -upstream[:, None] * torch.softmax(problem.logits, 1)
    nowhere, exps = torch.full_like(problem.target_ids, -1), problem.empty_exps()
    tiles = problem.project(exps)
    gradients = RowGradients(upstream)
    exp_gradients_(exps, tiles, nowhere, combine(tiles), gradients, LogitTransform())
    assert float((exps - want).abs().max()) <= 2**-8 * float(want.abs().max())


@pytest.mark.parametrize("anchored", (False, True))
def test_an_impossible_token(anchored: bool, loads: str) -> None:
    """A bias of -inf: no probability, no derivative, and the entropy of the others."""
    problem = Problem(300)
    impossible = torch.arange(300, device=DEVICE) % 7 == 0
    impossible[128:] = True
    problem.bias[impossible] = -torch.inf
    problem.target_ids.fill_(3)
    kept = problem.logits[:, ~impossible]
    want, exps = torch.log_softmax(kept, 1), problem.empty_exps()
    anchor = kept.logsumexp(1).float() if anchored else None
    stats = combine(problem.project(exps, anchor=anchor))
    assert not exps[:, :128][:, impossible[:128]].any()
    assert stats.entropy is not None
    assert float((stats.entropy + (want.exp() * want).sum(1)).abs().max()) < 1e-5
    # Token 3 is the third of those that are left.
    assert float((stats.log_probs - want[:, 2]).abs().max()) < 1e-5


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
    problem = Problem(17)
    problem.target_ids = torch.tensor([-1, 17, 0, 16, 2**31], device=DEVICE)
    log_probs = combine(problem.project()).log_probs
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


def test_triton_is_left_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every member of Triton's language is the one it was; kernels made elsewhere are compiled."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    owners = (tl, tl.core, tl.math, tl.standard, tl.tensor, tl.dtype)
    before = [dict(vars(owner)) for owner in owners]
    with interpreting():
        hidden = torch.zeros(1, 16, device=DEVICE, dtype=torch.bfloat16)
        project(hidden, hidden, None, torch.tensor([0], device=DEVICE), LogitTransform())
    for owner, members in zip(owners, before, strict=True):
        changed = [name for name, member in vars(owner).items() if members.get(name) is not member]
        assert not changed
    assert isinstance(triton.jit(_elementary_kernel), triton.JITFunction)
