"""Running kernels in the interpreter leaves the rest of the process as it was."""

import torch
import triton
import triton.language as tl

from care_kernels.triton_backend.row_statistics import row_statistics
from tests.kernels.triton_backend.interpreter import DEVICE, interpreting


def test_triton_is_left_as_it_was() -> None:
    """Every member of Triton's language is the one it was, after kernels have run."""
    owners = (tl, tl.core, tl.math, tl.standard, tl.tensor, tl.dtype)
    before = [dict(vars(owner)) for owner in owners]
    with interpreting():
        row_statistics(
            torch.zeros(1, 3, device=DEVICE),
            torch.zeros(1, dtype=torch.long, device=DEVICE),
            with_entropy=True,
        )
    for owner, members in zip(owners, before, strict=True):
        changed = [name for name, member in vars(owner).items() if members.get(name) is not member]
        assert not changed


def test_other_kernels_are_still_compiled() -> None:
    """A kernel decorated elsewhere in the process is not an interpreted one."""

    def kernel(x_ptr) -> None:
        tl.store(x_ptr, 1.0)

    assert isinstance(triton.jit(kernel), triton.JITFunction)
