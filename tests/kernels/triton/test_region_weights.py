"""The Triton kernel of Eq. 11: the same bits as the torch path, in every layout."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from care_kernels.region_weights import Regions, token_advantages
from tests.kernels.span_cases import SpanBatch, normal_floats, random_spans, span_batches
from tests.kernels.triton.interpreter import DEVICE, interpret_kernels_of

interpret_kernels_of("care_kernels.region_weights")

# The fixtures hold for the whole test: no example changes them.
FEW_EXAMPLES = settings(
    max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.fixture(autouse=True)
def allow_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let `backend="triton"` take CPU tensors."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")


def random_batch(seq_lens: list[int], seed: int = 0) -> SpanBatch:
    generator = torch.Generator().manual_seed(seed)
    return SpanBatch(
        seq_lens,
        torch.randn(len(seq_lens), generator=generator),
        random_spans(seq_lens, generator),
        random_spans(seq_lens, generator),
        torch.rand(len(seq_lens), generator=generator) > 0.5,
    )


def check(batch: SpanBatch, *, room: int = 0, think_weight: float = 0.005) -> None:
    """Padded, and packed with room behind the last sequence: as torch has them."""
    arguments = [value.to(DEVICE) for value in batch.arguments]
    cu_seqlens = batch.cu_seqlens.to(DEVICE)
    total = int(cu_seqlens[-1])
    layouts = (
        {"seq_len": batch.longest},
        {"cu_seqlens": cu_seqlens, "total_tokens": total + room},
    )
    for layout in layouts:
        options = layout | {"think_weight": think_weight}
        got = token_advantages(*arguments, **options, backend="triton")
        assert torch.equal(got, token_advantages(*arguments, **options, backend="torch"))


@given(span_batches(), st.integers(0, 3), normal_floats(0, 2))
@FEW_EXAMPLES
def test_same_bits_as_torch(batch: SpanBatch, room: int, think_weight: float) -> None:
    """Any spans, overlapping or empty, in any layout."""
    check(batch, room=room, think_weight=think_weight)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16, torch.float32, torch.float64))
@pytest.mark.parametrize("span_dtype", (torch.int32, torch.int64))
def test_dtypes(dtype: torch.dtype, span_dtype: torch.dtype) -> None:
    """float64 keeps every digit; low precision is widened first."""
    batch = random_batch([9, 4, 13])
    check(
        batch.to(
            advantages=batch.advantages.to(dtype),
            think_spans=batch.think_spans.to(span_dtype),
            answer_spans=batch.answer_spans.to(span_dtype),
        )
    )


@pytest.mark.parametrize("seq_lens", ([1023], [1024, 1], [1025, 3000, 0, 17], [5] * 8 + [4000]))
def test_many_blocks(seq_lens: list[int]) -> None:
    """Sequences of any number of blocks, also many more than the mean."""
    check(random_batch(seq_lens), room=5)


def test_non_contiguous_inputs() -> None:
    """Strides do not matter."""
    batch = random_batch([9, 4, 13])
    check(
        batch.to(
            advantages=torch.stack((batch.advantages,) * 2, 1)[:, 0],
            think_spans=batch.think_spans.T.contiguous().T,
            answer_spans=torch.cat((batch.answer_spans,) * 2, 1)[:, :2],
        )
    )


@pytest.mark.parametrize("backend", ("triton", "torch"))
def test_spans_are_cut_to_their_sequence(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What would be refused on the CPU writes into no neighbour where values are not read."""
    monkeypatch.setattr("care_kernels.checks.check_spans", lambda *_: None)
    batch = random_batch([6, 6, 6])
    wild = torch.tensor([[-3, 4], [2, 99], [5, 1]])
    cut = torch.tensor([[0, 4], [2, 6], [5, 5]])
    results = []
    for spans in (wild, cut):
        changed = batch.to(think_spans=spans, answer_spans=spans.flip(0))
        arguments = [value.to(DEVICE) for value in changed.arguments]
        results.append(token_advantages(*arguments, seq_len=6, backend=backend))
    assert torch.equal(*results)


@pytest.mark.parametrize("normalize", (True, False))
def test_a_trainers_regions(normalize: bool) -> None:
    """Regions over the paper's two, overlapping, empty and past each other: torch's bits."""
    batch = random_batch([9, 4, 13])
    generator = torch.Generator().manual_seed(1)
    spans = torch.stack([random_spans(batch.seq_lens, generator) for _ in range(4)], 1)
    weights = torch.rand(3, 4, generator=generator)
    arguments = [value.to(DEVICE) for value in batch.arguments]
    for layout in ({"seq_len": batch.longest}, {"cu_seqlens": batch.cu_seqlens.to(DEVICE)}):
        got, want = (
            token_advantages(
                *arguments,
                regions=Regions(spans.to(DEVICE), weights.to(DEVICE)),
                normalize=normalize,
                backend=backend,
                **layout,
            )
            for backend in ("triton", "torch")
        )
        assert torch.equal(got, want) and (got != 0).any()
