"""Eq. 11: `token_advantages` by hand, against the oracle and against the trainer."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from care_kernels import token_advantages
from care_train.algorithm.region_weights import spread_advantages, token_credit
from care_train.algorithm.types import TrainSequence
from care_train.config import CareSettings, Decisions
from tests.algorithm.builders import right, wrong
from tests.kernels.batches import SpanBatch, normal_floats, pad, span_batches
from tests.kernels.cases import error
from tests.kernels.oracle import reference_token_advantages
from tests.kernels.tolerances import FLOOR

GAMMA = 0.005

BATCH = SpanBatch(
    seq_lens=[8, 6, 5],
    advantages=torch.tensor([2.0, -0.5, 1.0]),
    think_spans=torch.tensor([[1, 4], [0, 3], [0, 0]]),
    answer_spans=torch.tensor([[5, 7], [4, 6], [0, 0]]),
    is_positive=torch.tensor([True, False, True]),
)


def padded(batch: SpanBatch, **options: float) -> Tensor:
    return token_advantages(*batch.arguments, seq_len=batch.longest, **options)


def packed(batch: SpanBatch, **options: float) -> Tensor:
    return token_advantages(*batch.arguments, cu_seqlens=batch.cu_seqlens, **options)


def test_by_hand() -> None:
    """A positive's three rationale and two answer tokens; a negative's answer; no spans at all.

    gamma+ defaults to the trainer's, and nothing has a gradient.
    """
    total = 3 * GAMMA + 2
    expected = [
        [0, *[2 * GAMMA / total] * 3, 0, *[2 / total] * 2, 0],
        [0, 0, 0, 0, -0.25, -0.25, 0, 0],
        [0.0] * 8,
    ]
    batch = BATCH.to(advantages=BATCH.advantages.clone().requires_grad_())
    got = padded(batch)
    torch.testing.assert_close(got, torch.tensor(expected))
    assert torch.equal(got, padded(batch, think_weight=CareSettings().think_weight))
    assert not got.requires_grad and not packed(batch).requires_grad


@given(span_batches(), normal_floats(0, 2), st.sampled_from((1e-8, 1e-3, 1.0)))
def test_follows_the_oracle(batch: SpanBatch, think_weight: float, weight_eps: float) -> None:
    """Whatever the spans: exactly 0 where no token weighs, and the same bits in both layouts."""
    options = {"think_weight": think_weight, "weight_eps": weight_eps}
    for dtype in (torch.float32, torch.float64):
        batch = batch.to(advantages=batch.advantages.to(dtype))
        want = reference_token_advantages(*batch.arguments, batch.seq_lens, **options)
        got = padded(batch, **options)
        assert got.dtype == dtype
        assert error(got, pad(want, batch.longest)) <= FLOOR[dtype]
        assert not got[pad(want, batch.longest) == 0].any()
        rows = [row[:length] for row, length in zip(got, batch.seq_lens, strict=True)]
        assert torch.equal(torch.cat(rows), packed(batch, **options))


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
    good = [rollout.accuracy == 1 for rollout in rollouts]
    sequences = [
        TrainSequence(
            rollout,
            1.5 - i,
            token_credit(rollout, settings, is_negative=not good[i], earns_rationale=good[i]),
        )
        for i, rollout in enumerate(rollouts)
    ]
    batch = SpanBatch(
        seq_lens=[len(rollout.token_ids) for rollout in rollouts],
        advantages=1.5 - torch.arange(len(rollouts)),
        think_spans=torch.tensor([rollout.spans.think_content for rollout in rollouts]),
        answer_spans=torch.tensor([rollout.spans.answer_content for rollout in rollouts]),
        is_positive=torch.tensor(good),
    )
    got = packed(batch, think_weight=think_weight)
    assert torch.equal(got, spread_advantages(sequences))


def test_room_behind_the_last_sequence() -> None:
    """With total_tokens a packed buffer may be longer than its sequences; the rest is 0."""
    got = packed(BATCH, total_tokens=25)
    assert torch.equal(got[:19], packed(BATCH))
    assert not got[19:].any()


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


def test_empty_batches() -> None:
    """No sequences, or sequences without tokens."""
    spans = torch.zeros(0, 2, dtype=torch.int64)
    nothing = SpanBatch([], torch.zeros(0), spans, spans, torch.zeros(0, dtype=torch.bool))
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
