"""Eq. 11: `token_advantages` by hand, by its properties, and against the oracle and the trainer."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from care_kernels.region_weights import token_advantages
from care_train.algorithm.region_weights import spread_advantages, token_credit
from care_train.algorithm.types import TrainSequence
from care_train.config import CareSettings, Decisions
from tests.algorithm.builders import right, wrong
from tests.kernels.cases import error
from tests.kernels.oracle import reference_token_advantages
from tests.kernels.span_cases import SpanBatch, normal_floats, pad, span_batches
from tests.kernels.tolerances import FLOOR

GAMMA = 0.005

BATCH = SpanBatch(
    seq_lens=[8, 6, 5],
    advantages=torch.tensor([2.0, -0.5, 1.0]),
    think_spans=torch.tensor([[1, 4], [0, 3], [0, 0]]),
    answer_spans=torch.tensor([[5, 7], [4, 6], [0, 0]]),
    is_positive=torch.tensor([True, False, True]),
)


def padded(batch: SpanBatch, **options: Any) -> torch.Tensor:
    return token_advantages(*batch.arguments, seq_len=batch.longest, **options)


def packed(batch: SpanBatch, **options: Any) -> torch.Tensor:
    return token_advantages(*batch.arguments, cu_seqlens=batch.cu_seqlens, **options)


def oracle(batch: SpanBatch, **options: float) -> list[torch.Tensor]:
    return reference_token_advantages(*batch.arguments, batch.seq_lens, **options)


def test_by_hand() -> None:
    """A positive's three rationale and two answer tokens; a negative's answer; no spans at all."""
    total = 3 * GAMMA + 2
    expected = [
        [0, *[2 * GAMMA / total] * 3, 0, *[2 / total] * 2, 0],
        [0, 0, 0, 0, -0.25, -0.25, 0, 0],
        [0.0] * 8,
    ]
    torch.testing.assert_close(padded(BATCH), torch.tensor(expected))


def test_the_answer_wins_where_spans_overlap() -> None:
    """A token in both spans weighs 1, and counts once in the sum."""
    got = token_advantages(
        torch.tensor([1.0]),
        torch.tensor([[0, 4]]),
        torch.tensor([[2, 5]]),
        torch.tensor([True]),
        seq_len=6,
        think_weight=0.5,
    )
    torch.testing.assert_close(got, torch.tensor([[0.5, 0.5, 1, 1, 1, 0]]) / 4)


@given(span_batches(), normal_floats(0, 2), st.sampled_from((1e-8, 1e-3, 1.0)))
def test_follows_the_oracle(batch: SpanBatch, think_weight: float, weight_eps: float) -> None:
    """Padded and packed, float32 and float64, whatever the spans."""
    options = {"think_weight": think_weight, "weight_eps": weight_eps}
    for dtype in (torch.float32, torch.float64):
        batch = batch.to(advantages=batch.advantages.to(dtype))
        want = oracle(batch, **options)
        got = padded(batch, **options)
        assert got.dtype == dtype
        assert error(got, pad(want, batch.longest)) <= FLOOR[dtype]
        assert error(packed(batch, **options), torch.cat(want)) <= FLOOR[dtype]


@given(span_batches(), normal_floats(0, 2))
def test_sums_to_the_advantage(batch: SpanBatch, think_weight: float) -> None:
    """sum_t a_it = A_i W_i / (W_i + eps): A_i itself wherever a sequence has any weight."""
    batch = batch.to(advantages=batch.advantages.double())
    got = padded(batch, think_weight=think_weight, weight_eps=0.25).sum(1)
    in_think, in_answer = (_inside(spans, batch) for spans in batch.arguments[1:3])
    weights = think_weight * (in_think & ~in_answer & batch.is_positive[:, None]) + in_answer.int()
    total = weights.sum(1).double()
    torch.testing.assert_close(got, batch.advantages * total / (total + 0.25))


@given(span_batches(), normal_floats(0, 2))
def test_a_negative_is_not_blamed_for_its_rationale(batch: SpanBatch, think_weight: float) -> None:
    """Rationale tokens of negatives, and tokens outside both spans, get exactly 0."""
    got = padded(batch, think_weight=think_weight)
    in_think, in_answer = (_inside(spans, batch) for spans in batch.arguments[1:3])
    silent = ~in_answer & ~(in_think & batch.is_positive[:, None])
    assert (got[silent] == 0).all()


@given(span_batches())
def test_padded_equals_packed(batch: SpanBatch) -> None:
    """The two layouts hold the same bits."""
    rows = [row[:length] for row, length in zip(padded(batch), batch.seq_lens, strict=True)]
    assert torch.equal(torch.cat(rows), packed(batch))


@given(span_batches(), st.integers(0, 5))
def test_shifted_spans_shift_the_result(batch: SpanBatch, shift: int) -> None:
    """Only the spans' places matter, as when a prompt is put in front."""
    moved = batch.to(
        think_spans=batch.think_spans + shift,
        answer_spans=batch.answer_spans + shift,
        seq_lens=[length + shift for length in batch.seq_lens],
    )
    assert torch.equal(padded(moved)[:, shift:], padded(batch))
    assert (padded(moved)[:, :shift] == 0).all()


@given(
    st.lists(
        st.tuples(st.integers(0, 6), st.integers(1, 4), st.booleans()), min_size=1, max_size=5
    ),
    normal_floats(0, 1),
)
def test_agrees_with_the_trainer(shapes: list[tuple[int, int, bool]], think_weight: float) -> None:
    """On well-formed rollouts whose tags and EOS weigh 0, the trainer's rows: one Eq. 11."""
    settings = CareSettings(think_weight=think_weight, decisions=Decisions(tag_weight=0.0))
    rollouts = [
        right(think=think, answer=answer) if good else wrong(think=think, answer=answer)
        for think, answer, good in shapes
    ]
    sequences = [
        TrainSequence(
            rollout,
            1.5 - i,
            token_credit(
                rollout,
                settings,
                is_negative=rollout.accuracy < 1,
                earns_rationale=rollout.accuracy == 1,
            ),
        )
        for i, rollout in enumerate(rollouts)
    ]
    want = spread_advantages(sequences)
    got = packed(
        SpanBatch(
            seq_lens=[len(rollout.token_ids) for rollout in rollouts],
            advantages=1.5 - torch.arange(len(rollouts)),
            think_spans=torch.tensor([rollout.spans.think_content for rollout in rollouts]),
            answer_spans=torch.tensor([rollout.spans.answer_content for rollout in rollouts]),
            is_positive=torch.tensor([rollout.accuracy == 1 for rollout in rollouts]),
        ),
        think_weight=think_weight,
    )
    assert torch.equal(got, want)


def test_the_trainers_defaults() -> None:
    """gamma+ defaults to the trainer's."""
    explicit = padded(BATCH, think_weight=CareSettings().think_weight)
    assert torch.equal(padded(BATCH), explicit)


def test_room_behind_the_last_sequence() -> None:
    """With total_tokens a packed buffer may be longer than its sequences; the rest is 0."""
    got = packed(BATCH, total_tokens=25)
    assert torch.equal(got[:19], packed(BATCH))
    assert (got[19:] == 0).all()


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16, torch.float32, torch.float64))
@pytest.mark.parametrize("span_dtype", (torch.uint8, torch.int32, torch.int64))
def test_dtypes(dtype: torch.dtype, span_dtype: torch.dtype) -> None:
    """Low-precision advantages are spread in float32; spans come in any integer type."""
    batch = BATCH.to(
        advantages=BATCH.advantages.to(dtype),
        think_spans=BATCH.think_spans.to(span_dtype),
        answer_spans=BATCH.answer_spans.to(span_dtype),
    )
    got = padded(batch)
    assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(got.float(), padded(BATCH))


def test_no_gradient() -> None:
    """Token advantages are constants of the loss."""
    batch = BATCH.to(advantages=BATCH.advantages.clone().requires_grad_())
    assert not padded(batch).requires_grad
    assert not packed(batch).requires_grad


def test_empty_batches() -> None:
    """No sequences, or sequences without tokens."""
    nothing = SpanBatch(
        [],
        torch.zeros(0),
        torch.zeros(0, 2, dtype=torch.int64),
        torch.zeros(0, 2, dtype=torch.int64),
        torch.zeros(0, dtype=torch.bool),
    )
    assert token_advantages(*nothing.arguments, seq_len=4).shape == (0, 4)
    assert packed(nothing).shape == (0,)
    no_spans = BATCH.to(think_spans=BATCH.think_spans * 0, answer_spans=BATCH.answer_spans * 0)
    assert token_advantages(*no_spans.arguments, seq_len=0).shape == (3, 0)


def test_device_values_are_not_read() -> None:
    """No host synchronisation: tensors without any values will do, given total_tokens."""
    batch = [value.to("meta") for value in BATCH.arguments]
    assert token_advantages(*batch, seq_len=8).shape == (3, 8)
    cu_seqlens = BATCH.cu_seqlens.to("meta")
    assert token_advantages(*batch, cu_seqlens=cu_seqlens, total_tokens=20).shape == (20,)


CU_SEQLENS = {"seq_len": None, "cu_seqlens": torch.tensor([0, 8, 14, 19])}

WRONG: tuple[tuple[dict[str, Any], str], ...] = (
    ({"advantages": torch.zeros(3, 1)}, r"advantages: got shape \(3, 1\); wanted \(any,\)"),
    ({"advantages": torch.zeros(3, dtype=torch.int64)}, "advantages: got dtype torch.int64"),
    ({"think_spans": torch.zeros(3, dtype=torch.int64)}, r"think_spans: got .*; wanted \(3, 2\)"),
    ({"answer_spans": torch.zeros(3, 2)}, "answer_spans: got dtype torch.float32; wanted one of"),
    (
        {"answer_spans": torch.zeros(3, 2, dtype=torch.int64, device="meta")},
        "answer_spans: got device meta; wanted cpu, where advantages is",
    ),
    (
        {"think_spans": torch.tensor([[0, 1], [0, 9], [0, 1]])},
        r"think_spans: got \[0, 9\] at row 1; wanted 0 <= start <= end <= 8",
    ),
    (
        {"think_spans": torch.tensor([[0, 1], [0, 1], [3, 2]])},
        r"think_spans: got \[3, 2\] at row 2; wanted 0 <= start <= end",
    ),
    (
        {"answer_spans": torch.tensor([[-1, 1], [0, 1], [0, 2]])},
        r"answer_spans: got \[-1, 1\] at row 0",
    ),
    (
        {"answer_spans": torch.tensor([[0, 1], [0, 7], [0, 1]])} | CU_SEQLENS,
        r"answer_spans: got \[0, 7\] at row 1; wanted 0 <= start <= end <= 6",
    ),
    ({"is_positive": torch.ones(3)}, "is_positive: got dtype torch.float32; wanted one of bool"),
    ({"is_positive": torch.ones(2, dtype=torch.bool)}, r"is_positive: got .*; wanted \(3,\)"),
    ({"seq_len": None}, "seq_len: got neither of seq_len and cu_seqlens; wanted exactly one"),
    (CU_SEQLENS | {"seq_len": 8}, "seq_len: got both of seq_len and cu_seqlens"),
    ({"seq_len": -1}, "seq_len: got -1; wanted None or an int of at least 0"),
    ({"seq_len": 2.5}, "seq_len: got 2.5; wanted None or an int of at least 0"),
    (CU_SEQLENS | {"total_tokens": 24.0}, "total_tokens: got 24.0; wanted None or an int"),
    ({"total_tokens": 24}, "total_tokens: got 24; wanted None without cu_seqlens"),
    (CU_SEQLENS | {"total_tokens": 18}, "cu_seqlens: got 19 at row 3; wanted at most 18"),
    (
        CU_SEQLENS | {"cu_seqlens": torch.tensor([0, 8, 14])},
        r"cu_seqlens: got shape \(3,\); wanted \(4,\)",
    ),
    (
        CU_SEQLENS | {"cu_seqlens": torch.tensor([1, 8, 14, 19])},
        "cu_seqlens: got 1 at row 0; wanted 0",
    ),
    (
        CU_SEQLENS | {"cu_seqlens": torch.tensor([0, 8, 7, 19])},
        "cu_seqlens: got 7 at row 2; wanted at least 8",
    ),
    ({"think_weight": -0.1}, "think_weight: got -0.1; wanted 0 or more"),
    ({"weight_eps": 0.0}, "weight_eps: got 0.0; wanted more than 0"),
    ({"backend": "cuda"}, "backend: got 'cuda'"),
)


@pytest.mark.parametrize(("wrong", "message"), WRONG)
def test_refuses(wrong: dict[str, Any], message: str) -> None:
    """Every argument that does not fit is refused by name, with its row."""
    names = ("advantages", "think_spans", "answer_spans", "is_positive")
    right_arguments = dict(zip(names, BATCH.arguments, strict=True)) | {"seq_len": 8}
    with pytest.raises(ValueError, match=message):
        token_advantages(**(right_arguments | wrong))


def _inside(spans: torch.Tensor, batch: SpanBatch) -> torch.Tensor:
    """[B, T] bool: the tokens within each span."""
    tokens = torch.arange(batch.longest)
    return (tokens >= spans[:, :1]) & (tokens < spans[:, 1:])
