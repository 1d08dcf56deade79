"""Checksums of weights that can be added over pieces, for comparing two owners of a tensor."""

import torch

_CHUNK = 1 << 22
_MIX = -7046029254386353131  # 2^64 / golden ratio, as a signed integer

_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def checksum(
    tensor: torch.Tensor, *, first_row: int = 0, first_column: int = 0, columns: int | None = None
) -> int:
    """Sum over elements of bits x (a pseudo-random odd number of the position), modulo 2^64.

    Exact, independent of the order of summation and of the device; one changed element always
    changes it. Sums over the pieces of a tensor are the sum over the tensor.

    Args:
        tensor: [rows, ...]: a tensor, or a piece of one.
        first_row: where the piece starts.
        first_column: where the piece's rows start, in elements.
        columns: elements per row of the whole tensor. None: the piece has whole rows.
    """
    rows = tensor.shape[0] if tensor.ndim else 1
    flat = tensor.detach().reshape(rows, -1)
    words = flat.contiguous().view(_WORDS[tensor.element_size()])
    width = words.shape[1]
    columns = width if columns is None else columns
    step = max(1, _CHUNK // max(width, 1))
    column = torch.arange(width, device=tensor.device) + first_column
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for start in range(0, rows, step):
        part = words[start : start + step].long()
        row = torch.arange(start, start + len(part), device=tensor.device) + first_row
        factor = (row[:, None] * columns + column).mul_(_MIX)
        factor.bitwise_xor_(factor >> 29).mul_(_MIX).bitwise_or_(1)
        total += factor.mul_(part).sum()
    return int(total)


def wrapped(total: int) -> int:
    """`total` as the signed 64-bit number that sums over pieces wrap around to."""
    return (total + (1 << 63)) % (1 << 64) - (1 << 63)
