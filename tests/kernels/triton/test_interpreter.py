"""Elementary functions of the kernels; running them interpreted changes nothing else."""

import torch
import triton
import triton.language as tl

from care_kernels.softmax import LogitTransform
from care_kernels.triton.launch import expm1, tanh
from care_kernels.triton.projection import project
from tests.kernels.cases import assert_same
from tests.kernels.triton.interpreter import DEVICE, decorate, interpreting


def _elementary_kernel(x_ptr, expm1_ptr, tanh_ptr, BLOCK: tl.constexpr):
    lanes = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + lanes)
    tl.store(expm1_ptr + lanes, expm1(x))
    tl.store(tanh_ptr + lanes, tanh(x))


def test_expm1_and_tanh_keep_small_digits() -> None:
    """The relative error stays near float32's over twelve orders of magnitude, both signs."""
    size = torch.logspace(-10, 1.5, 512)
    x = torch.cat((size, -size)).to(DEVICE)
    got_expm1, got_tanh = torch.empty_like(x), torch.empty_like(x)
    decorate(_elementary_kernel)[(1,)](x, got_expm1, got_tanh, BLOCK=triton.next_power_of_2(len(x)))
    for got, want in ((got_expm1, torch.expm1(x.double())), (got_tanh, torch.tanh(x.double()))):
        assert float(((got - want) / want).abs().max()) < 2e-6
    assert_same(got_tanh[:512], -got_tanh[512:])


def test_triton_is_left_as_it_was() -> None:
    """Every member of Triton's language is the one it was; kernels made elsewhere are compiled."""
    owners = (tl, tl.core, tl.math, tl.standard, tl.tensor, tl.dtype)
    before = [dict(vars(owner)) for owner in owners]
    with interpreting():
        hidden = torch.zeros(1, 16, device=DEVICE, dtype=torch.bfloat16)
        project(hidden, hidden, None, torch.tensor([0], device=DEVICE), LogitTransform())
    for owner, members in zip(owners, before, strict=True):
        changed = [name for name, member in vars(owner).items() if members.get(name) is not member]
        assert not changed
    assert isinstance(triton.jit(_elementary_kernel), triton.JITFunction)
