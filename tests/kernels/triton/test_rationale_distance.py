"""The Triton kernels of Eq. 4 against the float64 oracle, and where values are not read."""

import pytest
import torch

from care_kernels.rationale_distance import pool_rationale, rationale_distance
from tests.kernels.cases import error
from tests.kernels.oracle import reference_rationale_distance
from tests.kernels.span_cases import pad, random_spans
from tests.kernels.tolerances import VALUE_FLOOR
from tests.kernels.triton.interpreter import DEVICE, interpret_kernels_of

interpret_kernels_of("care_kernels.region_weights")
interpret_kernels_of("care_kernels.rationale_distance")

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@pytest.fixture(autouse=True)
def allow_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let `backend="triton"` take CPU tensors."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")


def check(
    seq_lens: list[int], width: int, dtype: torch.dtype = torch.float32, *, packed: bool = False
) -> None:
    """Distances of random groups follow the oracle; the same call gives the same bits."""
    generator = torch.Generator().manual_seed(width)
    common = torch.randn(width, generator=generator)
    states = [(common + torch.randn(n, width, generator=generator)).to(dtype) for n in seq_lens]
    spans = random_spans(seq_lens, generator)
    anchors = torch.randint(len(seq_lens), (len(seq_lens),), generator=generator)
    hidden, cu_seqlens = pad(states, max(seq_lens)), None
    if packed:
        hidden = torch.cat(states)
        cu_seqlens = torch.tensor([0, *seq_lens]).cumsum(0).to(DEVICE, torch.int32)
    arguments = [value.to(DEVICE) for value in (hidden, spans, anchors)]
    got = rationale_distance(*arguments, cu_seqlens=cu_seqlens, backend="triton")
    want = reference_rationale_distance(states, spans, anchors)
    assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert error(got.cpu(), want, least_scale=1.0) <= VALUE_FLOOR[got.dtype]
    assert torch.equal(got, rationale_distance(*arguments, cu_seqlens=cu_seqlens, backend="triton"))


@pytest.mark.parametrize("packed", (False, True), ids=("padded", "packed"))
@pytest.mark.parametrize(
    ("width", "dtype"), ((1, torch.float32), *((63, dtype) for dtype in DTYPES)), ids=str
)
def test_follows_the_oracle(width: int, dtype: torch.dtype, packed: bool) -> None:
    """Every dtype and layout, with widths that divide nothing."""
    check([17, 70, 5, 0, 200, 64], width, dtype, packed=packed)


def test_wide() -> None:
    """Means of several blocks in both kernels."""
    check([9, 3], 1030)


def test_strides() -> None:
    """Neither tokens nor columns need be adjacent."""
    hidden = torch.randn(4, 12, 10, generator=torch.Generator().manual_seed(0))
    strided = hidden.transpose(0, 2).contiguous().transpose(0, 2).to(DEVICE)
    spans = torch.tensor([[0, 9], [3, 12], [4, 5], [1, 11]])
    anchors = torch.tensor([2, 2, 0, 1])
    got = rationale_distance(strided, spans.to(DEVICE), anchors.to(DEVICE), backend="triton")
    want = reference_rationale_distance(list(hidden), spans, anchors)
    assert error(got.cpu(), want, least_scale=1.0) <= VALUE_FLOOR[torch.float32]


def test_empty_span_and_unread_padding() -> None:
    """Distance 1 to everything; NaN outside the spans stays outside."""
    hidden = torch.full((3, 6, 8), torch.nan, device=DEVICE)
    hidden[1, 2:4] = 1
    spans = torch.tensor([[2, 2], [2, 4], [6, 6]], device=DEVICE)
    anchors = torch.tensor([1, 1, 2], device=DEVICE)
    got = rationale_distance(hidden, spans, anchors, backend="triton")
    torch.testing.assert_close(got.cpu(), torch.tensor([1.0, 0.0, 1.0]))


def test_spans_are_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    """What would be refused on the CPU reads no memory but its own where values are not read."""
    monkeypatch.setattr("care_kernels.checks.check_spans", lambda *_: None)
    hidden = torch.randn(3, 6, 8, device=DEVICE)
    wild = torch.tensor([[-3, 4], [2, 99], [5, 1]], device=DEVICE)
    cut = torch.tensor([[0, 4], [2, 6], [5, 5]], device=DEVICE)
    means, want = (pool_rationale(hidden, spans, backend="triton") for spans in (wild, cut))
    assert torch.equal(means, want)
