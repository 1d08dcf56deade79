"""Eq. 4: `rationale_distance` by hand, against the oracle and against the trainer."""

from importlib import import_module

import pytest
import torch
from torch import Tensor

from care_kernels.rationale_distance import pool_rationale, rationale_distance
from care_train.algorithm.selection import pairwise_distances
from tests.kernels.batches import cu_seqlens_of, pad, random_spans, random_states
from tests.kernels.cases import error
from tests.kernels.oracle import reference_rationale_distance
from tests.kernels.tolerances import VALUE_FLOOR

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
SEQ_LENS = [17, 5, 9, 0, 30, 12]
SPANS = torch.tensor([[0, 17], [2, 4], [3, 3], [0, 0], [29, 30], [5, 11]])
ANCHORS = torch.tensor([0, 0, 0, 4, 4, 1])


def check(got: Tensor, states: list[Tensor], spans: Tensor, anchors: Tensor) -> None:
    want = reference_rationale_distance(states, spans, anchors)
    assert got.dtype == (torch.float64 if states[0].dtype == torch.float64 else torch.float32)
    assert error(got, want, least_scale=1.0) <= VALUE_FLOOR[got.dtype]


def test_by_hand() -> None:
    """Means of (1, 0) and (0, 1) lie at 45 degrees; the opposite direction is at distance 2; an
    empty span is at distance 1 from everything, itself too. Nothing has a gradient (Sec. 3.3)."""
    hidden = torch.tensor(
        [
            *[[[1.0, 0], [0, 1], [9, 9]], [[5, 0], [5, 0], [5, 0]], [[0, 0], [-3, -3], [7, 0]]],
            *[[[1, 0], [2, 0], [3, 0]]] * 2,
        ],
        requires_grad=True,
    )
    spans = torch.tensor([[0, 2], [0, 3], [1, 2], [2, 2], [0, 0]])
    got = rationale_distance(hidden, spans, torch.tensor([0, 0, 0, 0, 4]))
    torch.testing.assert_close(got, torch.tensor([0.0, 1 - 0.5**0.5, 2.0, 1.0, 1.0]))
    assert not got.requires_grad


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", (1, 3, 64, 130))
def test_follows_the_oracle(dtype: torch.dtype, width: int) -> None:
    """Several groups, with spans that are whole, single, empty, or of no token at all; padded
    and packed agree to the last bit."""
    states = random_states(SEQ_LENS, width, dtype)
    got = rationale_distance(pad(states, 30), SPANS, ANCHORS)
    check(got, states, SPANS, ANCHORS)
    offsets = cu_seqlens_of(SEQ_LENS)
    assert torch.equal(
        got, rationale_distance(torch.cat(states), SPANS, ANCHORS, cu_seqlens=offsets)
    )


def test_agrees_with_the_trainer() -> None:
    """The embeddings and distances of `care_train`, which rounds to what float32 resolves."""
    hidden = torch.stack(random_states([20] * 6, 32))
    spans = random_spans([20] * 6, torch.Generator().manual_seed(3))
    distances = pairwise_distances(pool_rationale(hidden, spans)).float()
    for anchor in range(6):
        got = rationale_distance(hidden, spans, torch.full((6,), anchor))
        torch.testing.assert_close(got, distances[anchor], rtol=0, atol=2e-6)


def test_bfloat16_sums_in_float32() -> None:
    """Long, nearly parallel rationales, as of near misses: a bfloat16 mean would blur them."""
    states = random_states([3000, 2500], 64, torch.bfloat16)
    spans = torch.tensor([[0, 3000], [100, 2400]])
    anchors = torch.tensor([0, 0])
    want = reference_rationale_distance(states, spans, anchors)
    got = rationale_distance(pad(states, 3000), spans, anchors)
    assert error(got, want, least_scale=1.0) <= VALUE_FLOOR[torch.float32]
    rounded = [x[s:e].mean(0) for x, (s, e) in zip(states, spans, strict=True)]
    blurred = 1 - torch.cosine_similarity(*[x.double() for x in rounded], dim=0)
    assert abs(blurred - want[1]) > 100 * abs(got[1] - want[1])


def test_tokens_outside_the_span_are_not_read() -> None:
    """Padding may hold anything."""
    states = random_states([10, 10], 6)
    hidden = torch.full((2, 12, 6), float("nan"))
    hidden[0, 2:7] = states[0][2:7]
    hidden[1, 1:4] = states[1][1:4]
    spans, anchors = torch.tensor([[2, 7], [1, 4]]), torch.tensor([0, 0])
    check(rationale_distance(hidden, spans, anchors), states, spans, anchors)


def test_no_float32_copy_of_hidden() -> None:
    """Low-precision hidden states are converted a block at a time."""
    # By module name: the package's attribute of that name is the function.
    block = import_module("care_kernels.rationale_distance").BLOCK_TOKENS
    hidden = torch.zeros(1, 8 * block, 16, dtype=torch.bfloat16)
    spans, anchors = torch.tensor([[0, hidden.shape[1]]]), torch.tensor([0])
    with torch.profiler.profile(profile_memory=True) as profile:
        rationale_distance(hidden, spans, anchors)
    allocated = [
        event.nbytes()
        for event in profile.profiler.kineto_results.events()
        if event.name() == "[memory]"
    ]
    assert 0 < max(allocated) <= block * 16 * 4


def test_strides_and_index_types() -> None:
    """Neither memory layout nor integer type matters."""
    states = random_states([12] * 4, 10)
    spans, anchors = torch.tensor([[0, 9], [3, 12], [4, 5], [1, 11]]), torch.tensor([2, 2, 0, 1])
    hidden = torch.stack(states, 1).mT.contiguous().mT.transpose(0, 1)
    assert not hidden.is_contiguous()
    got = rationale_distance(hidden, spans.to(torch.int32), anchors.to(torch.uint8))
    check(got, states, spans, anchors)


def test_empty_batch() -> None:
    """No sequences, no distances."""
    spans, anchors = torch.zeros(0, 2, dtype=torch.int64), torch.zeros(0, dtype=torch.int64)
    assert rationale_distance(torch.zeros(0, 4, 8), spans, anchors).shape == (0,)
    got = rationale_distance(torch.zeros(0, 8), spans, anchors, cu_seqlens=torch.tensor([0]))
    assert got.shape == (0,)
