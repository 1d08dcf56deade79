"""What the launchers share: which mode the kernels run in, and checks on their memory.

Every launch is made under `torch.cuda.device_of`: Triton launches on the current device, whatever
the tensors' own. On CPU tensors that does nothing.
"""

from typing import Any

import torch
import triton
from torch import Tensor


def is_interpreted(kernel: Any) -> bool:
    """Whether `@triton.jit` chose the interpreter (TRITON_INTERPRET=1 when it decorated)."""
    return not isinstance(kernel, triton.JITFunction)


def check_rows(name: str, value: Tensor, dtypes: tuple[torch.dtype, ...]) -> None:
    """A [C, V] matrix of one of `dtypes` whose rows are contiguous, whatever the row stride.

    Raises:
        ValueError: it is something else.
    """
    if value.dim() != 2 or value.dtype not in dtypes:
        wanted = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise ValueError(
            f"{name}: got {value.dtype} of shape {tuple(value.shape)}; wanted [C, V] in {wanted}"
        )
    if value.shape[1] > 1 and value.stride(1) != 1:
        raise ValueError(f"{name}: got column stride {value.stride(1)}; wanted 1")


def check_walkable(source: Tensor, out: Tensor, name: str = "out") -> None:
    """`out` is apart from `source`, or its rows start where the rows of `source` start.

    A program that walks one row left to right may then write `out`, whose elements are no larger,
    behind its own reads.

    Raises:
        ValueError: the two overlap in any other way, or differ in shape.
    """
    if out.shape != source.shape:
        raise ValueError(f"{name}: got shape {tuple(out.shape)}; wanted {tuple(source.shape)}")
    if out.numel() == 0 or not overlap(source, out):
        return
    same_rows = source.shape[0] == 1 or _row_bytes(source) == _row_bytes(out)
    if source.data_ptr() != out.data_ptr() or not same_rows:
        raise ValueError(
            f"{name}: got memory that overlaps the input's rows unevenly; wanted memory of its "
            "own, or rows that start where the input's rows start"
        )


def check_apart(source: Tensor, out: Tensor, name: str = "out") -> None:
    """No byte of `out` belongs to `source`.

    Raises:
        ValueError: their memory ranges overlap.
    """
    if out.numel() and source.numel() and overlap(source, out):
        raise ValueError(f"{name}: got memory that overlaps another input; wanted memory apart")


def overlap(a: Tensor, b: Tensor) -> bool:
    """Whether the memory ranges of two tensors, both with elements, have a byte in common."""

    def end(value: Tensor) -> int:
        last = sum((n - 1) * s for n, s in zip(value.shape, value.stride(), strict=True))
        return value.data_ptr() + (last + 1) * value.element_size()

    return a.data_ptr() < end(b) and b.data_ptr() < end(a)


def _row_bytes(value: Tensor) -> int:
    return value.stride(0) * value.element_size()
