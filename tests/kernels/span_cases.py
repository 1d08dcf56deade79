"""Batches of sequences with spans, for the tests of Eqs. 4 and 11."""

from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor


@dataclass(frozen=True)
class SpanBatch:
    """What Eq. 11 needs to know of B sequences."""

    seq_lens: list[int]
    advantages: Tensor
    think_spans: Tensor
    answer_spans: Tensor
    is_positive: Tensor

    @property
    def arguments(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The positional arguments of `token_advantages`."""
        return self.advantages, self.think_spans, self.answer_spans, self.is_positive

    @property
    def cu_seqlens(self) -> Tensor:
        """[B + 1] int32."""
        return torch.tensor([0, *self.seq_lens]).cumsum(0).to(torch.int32)

    @property
    def longest(self) -> int:
        """T of the padded batch."""
        return max(self.seq_lens, default=0)

    def to(self, **changes: Any) -> "SpanBatch":
        """The same batch with other tensors."""
        return SpanBatch(**(self.__dict__ | changes))


def pad(sequences: list[Tensor], num_tokens: int) -> Tensor:
    """Sequences [T_i, ...] as [B, num_tokens, ...], with zeros behind each."""
    shape = (len(sequences), num_tokens, *sequences[0].shape[1:])
    padded = torch.zeros(shape, dtype=sequences[0].dtype)
    for row, sequence in zip(padded, sequences, strict=True):
        row[: len(sequence)] = sequence
    return padded


def random_spans(seq_lens: list[int], generator: torch.Generator) -> Tensor:
    """[B, 2] ranges, some of them empty."""
    cuts = [torch.randint(n + 1, (2,), generator=generator).sort().values for n in seq_lens]
    return torch.stack(cuts)


def normal_floats(low: float, high: float) -> st.SearchStrategy[float]:
    """Numbers of float32 whose products with each other do not vanish."""
    return st.floats(low, high, width=32).filter(lambda x: x == 0 or abs(x) > 1e-6)


@st.composite
def span_batches(draw: st.DrawFn, min_sequences: int = 1) -> SpanBatch:
    """Up to 5 sequences of up to 12 tokens with spans anywhere in them, overlapping or empty."""
    seq_lens = draw(st.lists(st.integers(0, 12), min_size=min_sequences, max_size=5))

    def spans() -> Tensor:
        ranges = [sorted(draw(st.tuples(*[st.integers(0, n)] * 2))) for n in seq_lens]
        return torch.tensor(ranges, dtype=torch.int64).reshape(-1, 2)

    def values(each: st.SearchStrategy, dtype: torch.dtype) -> Tensor:
        drawn = draw(st.lists(each, min_size=len(seq_lens), max_size=len(seq_lens)))
        return torch.tensor(drawn, dtype=dtype)

    return SpanBatch(
        seq_lens,
        values(normal_floats(-4, 4), torch.float32),
        spans(),
        spans(),
        values(st.booleans(), torch.bool),
    )
