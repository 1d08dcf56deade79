"""Eqs. 11 and 4 by hand and against the oracle, on both backends."""

from importlib import import_module
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from care_kernels import rationale_distance, token_advantages
from care_kernels.rationale_distance import pool_rationale
from care_kernels.region_weights import Regions
from tests.kernels.cases import DEVICE, error
from tests.kernels.oracle import reference_rationale_distance, reference_token_advantages
from tests.kernels.tolerances import FLOOR, VALUE_FLOOR

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# The fixture holds for the whole test: no example changes it.
FEW_EXAMPLES = settings(
    max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


class SpanBatch(NamedTuple):
    """What Eq. 11 needs to know of B sequences."""

    seq_lens: list[int]
    advantages: Tensor
    think_spans: Tensor
    answer_spans: Tensor
    is_positive: Tensor


BATCH = SpanBatch(
    seq_lens=[8, 6, 5],
    advantages=torch.tensor([2.0, -0.5, 1.0]),
    think_spans=torch.tensor([[1, 4], [0, 3], [0, 0]]),
    answer_spans=torch.tensor([[5, 7], [4, 6], [0, 0]]),
    is_positive=torch.tensor([True, False, True]),
)


def placed(backend: str, *values: Any) -> list[Any]:
    """Tensors where the backend runs."""
    device = DEVICE if backend == "triton" else "cpu"
    return [value.to(device) if isinstance(value, Tensor) else value for value in values]


def padded(batch: SpanBatch, backend: str = "torch", **options: Any) -> Tensor:
    arguments, longest = placed(backend, *batch[1:]), max(batch.seq_lens, default=0)
    return token_advantages(*arguments, seq_len=longest, backend=backend, **options).cpu()


def packed(batch: SpanBatch, backend: str = "torch", **options: Any) -> Tensor:
    *arguments, ends = placed(backend, *batch[1:], cu_seqlens_of(batch.seq_lens))
    return token_advantages(*arguments, cu_seqlens=ends, backend=backend, **options).cpu()


def cu_seqlens_of(seq_lens: list[int]) -> Tensor:
    return torch.tensor([0, *seq_lens]).cumsum(0).to(torch.int32)


def pad(sequences: list[Tensor], num_tokens: int) -> Tensor:
    """Sequences [T_i, ...] as [B, num_tokens, ...], with zeros behind each."""
    result = sequences[0].new_zeros(len(sequences), num_tokens, *sequences[0].shape[1:])
    for row, sequence in zip(result, sequences, strict=True):
        row[: len(sequence)] = sequence
    return result


def random_spans(seq_lens: list[int], generator: torch.Generator) -> Tensor:
    """[B, 2] ranges, some of them empty."""
    cuts = [torch.randint(n + 1, (2,), generator=generator).sort().values for n in seq_lens]
    return torch.stack(cuts)


def random_batch(seq_lens: list[int]) -> SpanBatch:
    generator = torch.Generator().manual_seed(0)
    return SpanBatch(
        seq_lens,
        torch.randn(len(seq_lens), generator=generator),
        random_spans(seq_lens, generator),
        random_spans(seq_lens, generator),
        torch.rand(len(seq_lens), generator=generator) > 0.5,
    )


def normal_floats(low: float, high: float) -> st.SearchStrategy[float]:
    """Numbers of float32 whose products with each other do not vanish."""
    return st.floats(low, high, width=32).filter(lambda x: x == 0 or abs(x) > 1e-6)


@st.composite
def span_batches(draw: st.DrawFn) -> SpanBatch:
    """Up to 5 sequences of up to 12 tokens with spans anywhere in them, overlapping or empty."""
    seq_lens = draw(st.lists(st.integers(0, 12), min_size=1, max_size=5))

    def spans() -> Tensor:
        ranges = [sorted(draw(st.tuples(*[st.integers(0, n)] * 2))) for n in seq_lens]
        return torch.tensor(ranges, dtype=torch.int64).reshape(-1, 2)

    advantages = [draw(normal_floats(-4, 4)) for _ in seq_lens]
    signs = torch.tensor([draw(st.booleans()) for _ in seq_lens])
    return SpanBatch(seq_lens, torch.tensor(advantages), spans(), spans(), signs)


def test_advantages_by_hand(backend: str) -> None:
    """A positive's three rationale and two answer tokens; a negative's answer; no spans at all.
    Nothing has a gradient."""
    gamma = 0.005
    total = 3 * gamma + 2
    expected = [
        [0, *[2 * gamma / total] * 3, 0, *[2 / total] * 2, 0],
        [0, 0, 0, 0, -0.25, -0.25, 0, 0],
        [0.0] * 8,
    ]
    batch = BATCH._replace(advantages=BATCH.advantages.clone().requires_grad_())
    got = padded(batch, backend)
    torch.testing.assert_close(got, torch.tensor(expected))
    assert not got.requires_grad and not packed(batch, backend).requires_grad


@given(span_batches(), normal_floats(0, 2), st.sampled_from((1e-8, 1e-3, 1.0)), st.integers(0, 3))
@FEW_EXAMPLES
def test_advantages_follow_the_oracle(
    backend: str, batch: SpanBatch, think_weight: float, weight_eps: float, room: int
) -> None:
    """Whatever the spans: exactly 0 where no token weighs, and the same bits padded, packed with
    room behind the last sequence, and on the other backend."""
    options = {"think_weight": think_weight, "weight_eps": weight_eps}
    for dtype in (torch.float32, torch.float64):
        batch = batch._replace(advantages=batch.advantages.to(dtype))
        oracle = reference_token_advantages(*batch[1:], batch.seq_lens, **options)
        want = pad(oracle, max(batch.seq_lens))
        got = padded(batch, backend, **options)
        assert got.dtype == dtype
        assert error(got, want) <= FLOOR[dtype] and not got[want == 0].any()
        assert torch.equal(got, padded(batch, **options))
        rows = [row[:length] for row, length in zip(got, batch.seq_lens, strict=True)]
        total = sum(batch.seq_lens)
        roomy = packed(batch, backend, total_tokens=total + room, **options)
        assert torch.equal(torch.cat(rows), roomy[:total]) and not roomy[total:].any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("span_dtype", (torch.uint8, torch.int32))
def test_advantages_of_any_dtype_and_stride(
    backend: str, dtype: torch.dtype, span_dtype: torch.dtype
) -> None:
    """Low precision is widened first, float64 keeps every digit; strides do not matter."""
    batch = BATCH._replace(
        advantages=torch.stack((BATCH.advantages.to(dtype),) * 2, 1)[:, 0],
        think_spans=BATCH.think_spans.to(span_dtype).T.contiguous().T,
        answer_spans=torch.cat((BATCH.answer_spans.to(span_dtype),) * 2, 1)[:, :2],
    )
    got = padded(batch, backend)
    assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(got.float(), padded(BATCH))


@pytest.mark.parametrize("normalize", (True, False))
@pytest.mark.parametrize("seq_lens", ([9, 4, 13], [1025, 3000, 0, 17], [5] * 8 + [4000]))
def test_a_trainers_regions(triton_backend: str, seq_lens: list[int], normalize: bool) -> None:
    """Regions over the paper's two, overlapping, empty and past each other, in sequences of any
    number of blocks, also many more than the mean: torch's bits."""
    batch, generator = random_batch(seq_lens), torch.Generator().manual_seed(1)
    spans = torch.stack([random_spans(seq_lens, generator) for _ in range(4)], 1)
    weights = torch.rand(len(seq_lens), 4, generator=generator)
    for layout in (padded, packed):
        got, want = (
            layout(batch, name, regions=Regions(*placed(name, spans, weights)), normalize=normalize)
            for name in (triton_backend, "torch")
        )
        assert torch.equal(got, want)


def test_spans_are_cut_to_their_sequence(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What would be refused on the CPU touches no neighbour where values are not read."""
    monkeypatch.setattr("care_kernels.checks.check_spans", lambda *_: None)
    batch, hidden = random_batch([6, 6, 6]), torch.randn(3, 6, 8)
    advantages, means = [], []
    for cut in ([[-3, 4], [2, 99], [5, 1]], [[0, 4], [2, 6], [5, 5]]):
        spans = torch.tensor(cut)
        changed = batch._replace(think_spans=spans, answer_spans=spans.flip(0))
        advantages.append(padded(changed, backend))
        means.append(pool_rationale(*placed(backend, hidden, spans), backend=backend))
    assert torch.equal(*advantages) and torch.equal(*means)


def test_device_values_are_not_read() -> None:
    """No host synchronisation: tensors without any values will do, given total_tokens."""
    *batch, ends = (value.to("meta") for value in (*BATCH[1:], cu_seqlens_of(BATCH.seq_lens)))
    assert token_advantages(*batch, seq_len=8).shape == (3, 8)
    assert token_advantages(*batch, cu_seqlens=ends, total_tokens=20).shape == (20,)


def test_empty_batches(backend: str) -> None:
    """No sequences, or sequences without tokens."""
    spans = torch.zeros(0, 2, dtype=torch.int64)
    nothing = SpanBatch([], torch.zeros(0), spans, spans, torch.zeros(0, dtype=torch.bool))
    assert padded(nothing, backend).shape == (0, 0) and packed(nothing, backend).shape == (0,)
    no_tokens = BATCH._replace(
        seq_lens=[0] * 3, think_spans=BATCH[2] * 0, answer_spans=BATCH[3] * 0
    )
    assert padded(no_tokens, backend).shape == (3, 0)
    anchors = torch.zeros(0, dtype=torch.int64)
    hidden, spans, anchors = placed(backend, torch.zeros(0, 4, 8), spans, anchors)
    assert rationale_distance(hidden, spans, anchors, backend=backend).shape == (0,)
    ends = torch.tensor([0], device=hidden.device)
    assert rationale_distance(
        hidden.flatten(0, 1), spans, anchors, cu_seqlens=ends, backend=backend
    ).shape == (0,)


SEQ_LENS = [17, 70, 5, 9, 0, 200, 12]
SPANS = torch.tensor([[0, 17], [5, 70], [2, 4], [3, 3], [0, 0], [29, 30], [5, 11]])
ANCHORS = torch.tensor([0, 0, 0, 0, 4, 5, 1])


def distances(backend: str, hidden: Tensor, *others: Tensor, ends: Tensor | None = None) -> Tensor:
    *arguments, ends = placed(backend, hidden, *others, ends)
    return rationale_distance(*arguments, cu_seqlens=ends, backend=backend).cpu()


def random_states(
    seq_lens: list[int], width: int, dtype: torch.dtype = torch.float32
) -> list[Tensor]:
    """Random hidden states [T_i, D] that have a direction in common, as a model's do."""
    generator = torch.Generator().manual_seed(0)
    common = torch.randn(width, generator=generator)
    return [(common + torch.randn(n, width, generator=generator)).to(dtype) for n in seq_lens]


def check_distances(got: Tensor, states: list[Tensor], spans: Tensor, anchors: Tensor) -> None:
    want = reference_rationale_distance(states, spans, anchors)
    assert got.dtype == (torch.float64 if states[0].dtype == torch.float64 else torch.float32)
    assert error(got, want, least_scale=1.0) <= VALUE_FLOOR[got.dtype]


def test_distances_by_hand(backend: str) -> None:
    """Means of (1, 0) and (0, 1) lie at 45 degrees; the opposite direction is at distance 2; an
    empty span is at distance 1 from everything, itself too. What lies outside the spans, NaN here,
    is not read, and nothing has a gradient (Sec. 3.3)."""
    nan = [torch.nan] * 2
    hidden = torch.tensor(
        [
            *[[[1.0, 0], [0, 1], nan], [[5, 0], [5, 0], [5, 0]], [nan, [-3, -3], nan]],
            *[[nan] * 3] * 2,
        ],
        requires_grad=True,
    )
    spans = torch.tensor([[0, 2], [0, 3], [1, 2], [2, 2], [0, 0]])
    got = distances(backend, hidden, spans, torch.tensor([0, 0, 0, 0, 4]))
    torch.testing.assert_close(got, torch.tensor([0.0, 1 - 0.5**0.5, 2.0, 1.0, 1.0]))
    assert not got.requires_grad


@pytest.mark.parametrize(
    ("width", "dtype"), ((1, torch.float32), *((63, dtype) for dtype in DTYPES)), ids=str
)
def test_distances_follow_the_oracle(backend: str, width: int, dtype: torch.dtype) -> None:
    """Several groups, with spans that are whole, single, empty, or of no token at all, and widths
    that divide nothing; padded and packed agree to the last bit, and so does a second call."""
    states = random_states(SEQ_LENS, width, dtype)
    hidden = pad(states, max(SEQ_LENS))
    got = distances(backend, hidden, SPANS, ANCHORS)
    check_distances(got, states, SPANS, ANCHORS)
    assert torch.equal(got, distances(backend, hidden, SPANS, ANCHORS))
    ends = cu_seqlens_of(SEQ_LENS)
    assert torch.equal(got, distances(backend, torch.cat(states), SPANS, ANCHORS, ends=ends))


def test_distances_of_wide_and_strided_states(backend: str) -> None:
    """Means of several blocks; neither tokens nor columns need be adjacent, nor ids be int64."""
    states = random_states([12] * 4, 1030)
    spans, anchors = torch.tensor([[0, 9], [3, 12], [4, 5], [1, 11]]), torch.tensor([2, 2, 0, 1])
    hidden = torch.stack(states).transpose(0, 2).contiguous().transpose(0, 2)
    got = distances(backend, hidden, spans.to(torch.int32), anchors.to(torch.uint8))
    check_distances(got, states, spans, anchors)


def test_no_float32_copy_of_hidden() -> None:
    """Low-precision hidden states are converted a block at a time."""
    # By module name: the package's attribute of that name is the function.
    block = import_module("care_kernels.rationale_distance").BLOCK_TOKENS
    hidden = torch.zeros(1, 8 * block, 16, dtype=torch.bfloat16)
    spans, anchors = torch.tensor([[0, hidden.shape[1]]]), torch.tensor([0])
    with torch.profiler.profile(profile_memory=True) as profile:
        rationale_distance(hidden, spans, anchors)
    events = profile.profiler.kineto_results.events()
    allocated = [event.nbytes() for event in events if event.name() == "[memory]"]
    assert 0 < max(allocated) <= block * 16 * 4
