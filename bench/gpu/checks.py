"""What the checks share: their record, a case on the device, an error over what is allowed."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from bench.gpu.section import Bench
from tests.kernels.cases import Case, error
from tests.kernels.tolerances import FACTOR, FLOOR, VALUE_FLOOR

BFLOAT16, FLOAT32, FLOAT16 = torch.bfloat16, torch.float32, torch.float16
DTYPES = (BFLOAT16, FLOAT32, FLOAT16)
BROKEN = 1e9
"""The figure of a promise that is not kept, or of an error that is no number."""

Figures = dict[str, float]


class Check(NamedTuple):
    """One named check, and the kernels it needs: those that need the same run in one process."""

    name: str
    kernels: str
    run: Callable[[Bench], Figures]


def dtype_name(dtype: torch.dtype) -> str:
    """ "bfloat16" of `torch.bfloat16`."""
    return str(dtype).removeprefix("torch.")


def on_device(case: Case, bench: Bench) -> Case:
    """A case's tensors on the device, for the Triton kernels."""
    moved = {
        key: value.to(bench.device) if isinstance(value, Tensor) else value
        for key, value in case.items()
    }
    return moved | {"backend": "triton"}


def allowed_error(
    got: Tensor, want: Tensor, eager: Tensor, *, is_gradient: bool, least_scale: float = 1.0
) -> float:
    """The error of `got` over what the rule allows; infinite where it is not finite.

    Values are in nats: their errors count relative to `least_scale` where they are smaller. A
    gradient's count relative to its largest entry.
    """
    if not bool(torch.isfinite(got).all()):
        return math.inf
    scale = 0.0 if is_gradient else least_scale
    floor = (FLOOR if is_gradient else VALUE_FLOOR)[got.dtype]
    return error(got, want, scale) / (FACTOR * error(eager, want, scale) + floor)
