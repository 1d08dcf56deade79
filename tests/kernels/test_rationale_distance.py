"""Eq. 4: `rationale_distance` by hand, against the oracle and against the trainer."""

from importlib import import_module
from typing import Any

import pytest
import torch

from care_kernels.rationale_distance import pool_rationale, rationale_distance
from care_train.algorithm.selection import pairwise_distances
from tests.kernels.cases import error
from tests.kernels.oracle import reference_rationale_distance
from tests.kernels.span_cases import pad, random_spans
from tests.kernels.tolerances import VALUE_FLOOR

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
SEQ_LENS = [17, 5, 9, 0, 30, 12]
SPANS = torch.tensor([[0, 17], [2, 4], [3, 3], [0, 0], [29, 30], [5, 11]])
ANCHORS = torch.tensor([0, 0, 0, 4, 4, 1])


def sequences(
    seq_lens: list[int], width: int, dtype: torch.dtype = torch.float32, *, seed: int = 0
) -> list[torch.Tensor]:
    """Random hidden states [T_i, D] that have a direction in common, as a model's do."""
    generator = torch.Generator().manual_seed(seed)
    common = torch.randn(width, generator=generator)
    return [(common + torch.randn(n, width, generator=generator)).to(dtype) for n in seq_lens]


def cu_seqlens(seq_lens: list[int]) -> torch.Tensor:
    return torch.tensor([0, *seq_lens]).cumsum(0).to(torch.int32)


def check(got: torch.Tensor, states: list[torch.Tensor], spans: torch.Tensor, anchors: Any) -> None:
    want = reference_rationale_distance(states, spans, anchors)
    assert got.dtype == (torch.float64 if states[0].dtype == torch.float64 else torch.float32)
    assert error(got, want, least_scale=1.0) <= VALUE_FLOOR[got.dtype]


def test_by_hand() -> None:
    """Means of (1, 0) and (0, 1) lie at 45 degrees; the opposite direction is at distance 2."""
    hidden = torch.tensor(
        [[[1, 0], [0, 1], [9, 9]], [[5, 0], [5, 0], [5, 0]], [[0, 0], [-3, -3], [7, 0]]]
    )
    spans = torch.tensor([[0, 2], [0, 3], [1, 2]])
    got = rationale_distance(hidden.float(), spans, torch.tensor([0, 0, 0]))
    torch.testing.assert_close(got, torch.tensor([0.0, 1 - 0.5**0.5, 2.0]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", (1, 3, 64, 130))
@pytest.mark.parametrize("layout", ("padded", "packed"))
def test_follows_the_oracle(dtype: torch.dtype, width: int, layout: str) -> None:
    """Several groups in one call, spans that are whole, single, empty, or of no token at all."""
    states = sequences(SEQ_LENS, width, dtype)
    if layout == "padded":
        got = rationale_distance(pad(states, 30), SPANS, ANCHORS)
    else:
        packed = torch.cat(states)
        got = rationale_distance(packed, SPANS, ANCHORS, cu_seqlens=cu_seqlens(SEQ_LENS))
    check(got, states, SPANS, ANCHORS)


@pytest.mark.parametrize("seed", range(5))
def test_random_groups(seed: int) -> None:
    """Any spans, any anchors; padded and packed agree to the last bit."""
    generator = torch.Generator().manual_seed(seed)
    seq_lens = torch.randint(40, (9,), generator=generator).tolist()
    states = sequences(seq_lens, 20, seed=seed)
    spans = random_spans(seq_lens, generator)
    anchors = torch.randint(9, (9,), generator=generator)
    got = rationale_distance(pad(states, 40), spans, anchors)
    check(got, states, spans, anchors)
    packed = rationale_distance(torch.cat(states), spans, anchors, cu_seqlens=cu_seqlens(seq_lens))
    assert torch.equal(got, packed)


def test_agrees_with_the_trainer() -> None:
    """The embeddings and distances of `care_train`, which rounds to what float32 resolves."""
    states = sequences([20] * 6, 32)
    hidden = torch.stack(states)
    spans = random_spans([20] * 6, torch.Generator().manual_seed(3))
    embeddings = pool_rationale(hidden, spans)
    for anchor in range(6):
        got = rationale_distance(hidden, spans, torch.full((6,), anchor))
        want = pairwise_distances(embeddings)[anchor].float()
        torch.testing.assert_close(got, want, rtol=0, atol=2e-6)


def test_an_empty_span_is_at_distance_one_from_everything() -> None:
    """The zero vector: from the anchor, as the anchor, and from itself."""
    hidden = torch.randn(3, 4, 8)
    spans = torch.tensor([[2, 2], [0, 4], [0, 0]])
    assert rationale_distance(hidden, spans, torch.tensor([1, 0, 2])).tolist() == [1, 1, 1]


def test_bfloat16_sums_in_float32() -> None:
    """Long, nearly parallel rationales, as of near misses: a bfloat16 mean would blur them."""
    states = sequences([3000, 2500], 64, torch.bfloat16)
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
    states = sequences([10, 10], 6)
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
    states = sequences([12] * 4, 10)
    spans, anchors = torch.tensor([[0, 9], [3, 12], [4, 5], [1, 11]]), torch.tensor([2, 2, 0, 1])
    hidden = torch.stack(states, 1).mT.contiguous().mT.transpose(0, 1)
    assert not hidden.is_contiguous()
    got = rationale_distance(hidden, spans.to(torch.int32), anchors.to(torch.uint8))
    check(got, states, spans, anchors)


def test_no_gradient() -> None:
    """Sec. 3.3: nothing is back-propagated through the embeddings."""
    hidden = torch.randn(2, 4, 8, requires_grad=True)
    spans = torch.tensor([[0, 4], [0, 4]])
    assert not rationale_distance(hidden, spans, torch.tensor([0, 0])).requires_grad


def test_empty_batch() -> None:
    """No sequences, no distances."""
    spans, anchors = torch.zeros(0, 2, dtype=torch.int64), torch.zeros(0, dtype=torch.int64)
    assert rationale_distance(torch.zeros(0, 4, 8), spans, anchors).shape == (0,)
    got = rationale_distance(torch.zeros(0, 8), spans, anchors, cu_seqlens=torch.tensor([0]))
    assert got.shape == (0,)


PACKED = {"hidden": torch.zeros(10, 4), "cu_seqlens": torch.tensor([0, 4, 10])}

WRONG: tuple[tuple[dict[str, Any], str], ...] = (
    ({"hidden": torch.zeros(10, 4)}, r"hidden: got shape \(10, 4\); wanted \(any, any, any\)"),
    ({"hidden": torch.zeros(2, 5, 4, dtype=torch.int64)}, "hidden: got dtype torch.int64"),
    (PACKED | {"hidden": torch.zeros(2, 5, 4)}, r"hidden: got .*; wanted \(any, any\)"),
    ({"think_spans": torch.zeros(3, 2, dtype=torch.int64)}, r"think_spans: .*; wanted \(2, 2\)"),
    ({"think_spans": torch.zeros(2, 2)}, "think_spans: got dtype torch.float32"),
    (
        {"think_spans": torch.tensor([[0, 1], [2, 6]])},
        r"think_spans: got \[2, 6\] at row 1; wanted 0 <= start <= end <= 5",
    ),
    (
        PACKED | {"think_spans": torch.tensor([[0, 5], [2, 6]])},
        r"think_spans: got \[0, 5\] at row 0; wanted 0 <= start <= end <= 4",
    ),
    ({"anchors": torch.zeros(2)}, "anchors: got dtype torch.float32"),
    ({"anchors": torch.zeros(3, dtype=torch.int64)}, r"anchors: got shape \(3,\); wanted \(2,\)"),
    ({"anchors": torch.tensor([0, 2])}, "anchors: got 2 at row 1; wanted 0 to 1"),
    ({"anchors": torch.tensor([-1, 0])}, "anchors: got -1 at row 0; wanted 0 to 1"),
    (PACKED | {"cu_seqlens": torch.zeros(0, dtype=torch.int64)}, r"cu_seqlens: got shape \(0,\)"),
    (PACKED | {"cu_seqlens": torch.tensor([0, 4, 11])}, "cu_seqlens: got 11 at row 2; wanted at"),
    ({"backend": "cuda"}, "backend: got 'cuda'"),
    ({"hidden": torch.zeros(2, 5, 4, device="meta")}, "hidden: got a meta tensor"),
)


@pytest.mark.parametrize(("wrong", "message"), WRONG)
def test_refuses(wrong: dict[str, Any], message: str) -> None:
    """Every argument that does not fit is refused by name, with its row."""
    arguments = {
        "hidden": torch.zeros(2, 5, 4),
        "think_spans": torch.tensor([[0, 1], [2, 5]]),
        "anchors": torch.tensor([0, 0]),
    }
    with pytest.raises(ValueError, match=message):
        rationale_distance(**(arguments | wrong))
