"""Between tokens [B, T] and the rows [B * T] of hidden states that predict them.

The hidden state at position t - 1 predicts token t, so row b * T + t - 1 belongs to token (b, t).
Moving the tokens' numbers leaves the hidden states where they are.

Shape letters: B sequences, T tokens.
"""

from typing import overload

import torch
from torch import Tensor


@overload
def to_rows(per_token: Tensor) -> Tensor: ...
@overload
def to_rows(per_token: None) -> None: ...


def to_rows(per_token: Tensor | None) -> Tensor | None:
    """[B, T] to [B * T], each token's entry moved to the row of the hidden state that predicts it.

    A sequence's last row predicts nothing here and gets 0.
    """
    if per_token is None:
        return None
    rows = torch.zeros_like(per_token, memory_format=torch.contiguous_format)
    rows[:, :-1] = per_token[:, 1:]
    return rows.flatten()


def to_tokens(rows: Tensor, shape: torch.Size, fill: float = 0.0) -> Tensor:
    """[B * T] back to [B, T], each row's entry at the token it predicts; token 0 gets `fill`."""
    per_token = rows.new_full(shape, fill)
    per_token[:, 1:] = rows.view(shape)[:, :-1]
    return per_token


def response_sequence_ids(response: Tensor) -> Tensor:
    """[B * T]: each response token's sequence; every other row is a sequence of its own."""
    is_row = to_rows(response)
    rows = torch.arange(is_row.numel(), device=response.device)
    num_sequences, num_tokens = response.shape
    sequences = torch.arange(num_sequences, device=response.device).repeat_interleave(num_tokens)
    return torch.where(is_row, sequences, num_sequences + rows)
