"""Running kernels in the interpreter leaves the rest of the process as it was."""

import torch
import triton
import triton.language as tl

from care_kernels.softmax import LogitTransform
from care_kernels.triton.projection import project
from tests.kernels.triton.interpreter import DEVICE, interpreting


def test_triton_is_left_as_it_was() -> None:
    """Every member of Triton's language is the one it was, after kernels have run."""
    owners = (tl, tl.core, tl.math, tl.standard, tl.tensor, tl.dtype)
    before = [dict(vars(owner)) for owner in owners]
    with interpreting():
        hidden = torch.zeros(1, 16, device=DEVICE, dtype=torch.bfloat16)
        project(hidden, hidden, None, torch.tensor([0], device=DEVICE), LogitTransform())
    for owner, members in zip(owners, before, strict=True):
        changed = [name for name, member in vars(owner).items() if members.get(name) is not member]
        assert not changed


def test_other_kernels_are_still_compiled() -> None:
    """A kernel decorated elsewhere in the process is not an interpreted one."""

    def kernel(x_ptr) -> None:
        tl.store(x_ptr, 1.0)

    assert isinstance(triton.jit(kernel), triton.JITFunction)
