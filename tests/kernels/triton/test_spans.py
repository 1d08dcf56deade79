"""The Triton kernels of Eqs. 11 and 4: torch's bits, and the float64 oracle's distances."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from care_kernels.rationale_distance import pool_rationale, rationale_distance
from care_kernels.region_weights import Regions, token_advantages
from tests.kernels.batches import (
    SpanBatch,
    cu_seqlens_of,
    normal_floats,
    pad,
    random_spans,
    random_states,
    span_batches,
)
from tests.kernels.cases import error
from tests.kernels.oracle import reference_rationale_distance
from tests.kernels.tolerances import VALUE_FLOOR
from tests.kernels.triton.interpreter import DEVICE, interpret_kernels_of

interpret_kernels_of("care_kernels.region_weights")
interpret_kernels_of("care_kernels.rationale_distance")

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# The fixtures hold for the whole test: no example changes them.
FEW_EXAMPLES = settings(
    max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.fixture(autouse=True)
def allow_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let `backend="triton"` take CPU tensors."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")


def random_batch(seq_lens: list[int]) -> SpanBatch:
    generator = torch.Generator().manual_seed(0)
    return SpanBatch(
        seq_lens,
        torch.randn(len(seq_lens), generator=generator),
        random_spans(seq_lens, generator),
        random_spans(seq_lens, generator),
        torch.rand(len(seq_lens), generator=generator) > 0.5,
    )


def check_advantages(batch: SpanBatch, *, room: int = 0, **options) -> None:
    """Padded, and packed with room behind the last sequence: as torch has them."""
    arguments = [value.to(DEVICE) for value in batch.arguments]
    cu_seqlens = batch.cu_seqlens.to(DEVICE)
    total = int(cu_seqlens[-1]) + room
    for layout in (
        {"seq_len": batch.longest},
        {"cu_seqlens": cu_seqlens, "total_tokens": total},
    ):
        got, want = (
            token_advantages(*arguments, **layout, **options, backend=backend)
            for backend in ("triton", "torch")
        )
        assert torch.equal(got, want)


@given(span_batches(), st.integers(0, 3), normal_floats(0, 2))
@FEW_EXAMPLES
def test_same_advantages_as_torch(batch: SpanBatch, room: int, think_weight: float) -> None:
    """Any spans, overlapping or empty, in any layout."""
    check_advantages(batch, room=room, think_weight=think_weight)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("span_dtype", (torch.int32, torch.int64))
def test_dtypes_and_strides(dtype: torch.dtype, span_dtype: torch.dtype) -> None:
    """float64 keeps every digit; low precision is widened first; strides do not matter."""
    batch = random_batch([9, 4, 13])
    check_advantages(
        batch.to(
            advantages=torch.stack((batch.advantages.to(dtype),) * 2, 1)[:, 0],
            think_spans=batch.think_spans.to(span_dtype).T.contiguous().T,
            answer_spans=torch.cat((batch.answer_spans.to(span_dtype),) * 2, 1)[:, :2],
        )
    )


@pytest.mark.parametrize("seq_lens", ([1023], [1024, 1], [1025, 3000, 0, 17], [5] * 8 + [4000]))
def test_many_blocks(seq_lens: list[int]) -> None:
    """Sequences of any number of blocks, also many more than the mean."""
    check_advantages(random_batch(seq_lens), room=5)


@pytest.mark.parametrize("normalize", (True, False))
def test_a_trainers_regions(normalize: bool) -> None:
    """Regions over the paper's two, overlapping, empty and past each other."""
    batch = random_batch([9, 4, 13])
    generator = torch.Generator().manual_seed(1)
    spans = torch.stack([random_spans(batch.seq_lens, generator) for _ in range(4)], 1)
    weights = torch.rand(3, 4, generator=generator)
    regions = Regions(spans.to(DEVICE), weights.to(DEVICE))
    check_advantages(batch, regions=regions, normalize=normalize)


@pytest.mark.parametrize("backend", ("triton", "torch"))
def test_spans_are_cut_to_their_sequence(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What would be refused on the CPU touches no neighbour where values are not read."""
    monkeypatch.setattr("care_kernels.checks.check_spans", lambda *_: None)
    batch, hidden = random_batch([6, 6, 6]), torch.randn(3, 6, 8, device=DEVICE)
    advantages, means = [], []
    for cut in ([[-3, 4], [2, 99], [5, 1]], [[0, 4], [2, 6], [5, 5]]):
        spans = torch.tensor(cut)
        changed = batch.to(think_spans=spans, answer_spans=spans.flip(0))
        arguments = [value.to(DEVICE) for value in changed.arguments]
        advantages.append(token_advantages(*arguments, seq_len=6, backend=backend))
        if backend == "triton":
            means.append(pool_rationale(hidden, spans.to(DEVICE), backend=backend))
    assert torch.equal(*advantages)
    assert not means or torch.equal(*means)


def check_distances(
    states: list[torch.Tensor], hidden: torch.Tensor, cu_seqlens: torch.Tensor | None = None
) -> None:
    """Distances of random groups follow the oracle; the same call gives the same bits."""
    seq_lens, generator = [len(own) for own in states], torch.Generator().manual_seed(1)
    spans = random_spans(seq_lens, generator)
    anchors = torch.randint(len(seq_lens), (len(seq_lens),), generator=generator)
    arguments = [value.to(DEVICE) for value in (hidden, spans, anchors)]
    offsets = None if cu_seqlens is None else cu_seqlens.to(DEVICE)
    got, again = (
        rationale_distance(*arguments, cu_seqlens=offsets, backend="triton") for _ in range(2)
    )
    want = reference_rationale_distance(states, spans, anchors)
    assert got.dtype == (torch.float64 if hidden.dtype == torch.float64 else torch.float32)
    assert error(got.cpu(), want, least_scale=1.0) <= VALUE_FLOOR[got.dtype]
    assert torch.equal(got, again)


@pytest.mark.parametrize(
    ("width", "dtype"), ((1, torch.float32), *((63, dtype) for dtype in DTYPES)), ids=str
)
def test_distances_follow_the_oracle(width: int, dtype: torch.dtype) -> None:
    """Every dtype and layout, with widths that divide nothing."""
    seq_lens = [17, 70, 5, 0, 200, 64]
    states = random_states(seq_lens, width, dtype)
    check_distances(states, pad(states, 200))
    check_distances(states, torch.cat(states), cu_seqlens_of(seq_lens))


def test_distances_of_wide_and_strided_states() -> None:
    """Means of several blocks in both kernels; neither tokens nor columns need be adjacent."""
    wide = random_states([9, 3], 1030)
    check_distances(wide, pad(wide, 9))
    states = random_states([12] * 4, 10)
    check_distances(states, torch.stack(states).transpose(0, 2).contiguous().transpose(0, 2))


def test_empty_span_and_unread_padding() -> None:
    """Distance 1 to everything; NaN outside the spans stays outside."""
    hidden = torch.full((3, 6, 8), torch.nan, device=DEVICE)
    hidden[1, 2:4] = 1
    spans = torch.tensor([[2, 2], [2, 4], [6, 6]], device=DEVICE)
    anchors = torch.tensor([1, 1, 2], device=DEVICE)
    got = rationale_distance(hidden, spans, anchors, backend="triton")
    torch.testing.assert_close(got.cpu(), torch.tensor([1.0, 0.0, 1.0]))
