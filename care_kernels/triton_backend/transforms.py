"""Inside a kernel: raw logits to z, the slope back, and functions that keep small digits.

    z = scale / temperature * raw,  or  softcap / temperature * tanh(scale / softcap * raw)
    dz / draw = scale / temperature * (1 - (z * temperature / softcap)^2)

Kernels take a transform as four numbers (see `transform_arguments`), so that one compiled kernel
serves every temperature. Triton has neither expm1 nor tanh that runs on every device.
"""

import triton
import triton.language as tl

from care_kernels.softmax import LogitTransform


def transform_arguments(transform: LogitTransform) -> dict[str, float | bool]:
    """The keyword arguments by which a kernel takes a transform.

    `inner` multiplies a raw logit, `outer` the (capped) result; `slope` is dz/draw at 0 and
    `uncap` turns z back into the tanh.
    """
    if transform.softcap is None:
        linear = transform.scale / transform.temperature
        return {"inner": linear, "outer": 1.0, "slope": linear, "uncap": 0.0, "HAS_SOFTCAP": False}
    return {
        "inner": transform.scale / transform.softcap,
        "outer": transform.softcap / transform.temperature,
        "slope": transform.scale / transform.temperature,
        "uncap": transform.temperature / transform.softcap,
        "HAS_SOFTCAP": True,
    }


TRANSFORM_TYPES = dict.fromkeys(("inner", "outer", "slope", "uncap"), "fp32")
"""Types of `transform_arguments` for ahead-of-time compilation."""


@triton.jit
def expm1(x):
    """exp(x) - 1 with a relative error near float32's, also for small x."""
    # The Taylor series to x^8: its remainder at 1/2 is 1e-8 of the value.
    series = 1.0 / 5040 + x * (1.0 / 40320)
    series = 1.0 / 720 + x * series
    series = 1.0 / 120 + x * series
    series = 1.0 / 24 + x * series
    series = 1.0 / 6 + x * series
    series = 0.5 + x * series
    series = x + x * x * series
    return tl.where(tl.abs(x) < 0.5, series, tl.exp(x) - 1.0)


@triton.jit
def tanh(x):
    """tanh(x) from expm1 of a number that is never positive, so nothing overflows."""
    decay = expm1(-2.0 * tl.abs(x))
    size = -decay / (2.0 + decay)
    return tl.where(x < 0, -size, size)


@triton.jit
def to_logits(raw, inner, outer, HAS_SOFTCAP: tl.constexpr):
    """z of raw logits."""
    z = raw * inner
    if HAS_SOFTCAP:
        z = tanh(z) * outer
    return z


@triton.jit
def slope_at(z, slope, uncap, HAS_SOFTCAP: tl.constexpr):
    """dz / draw, from z itself."""
    result = z * 0.0 + slope
    if HAS_SOFTCAP:
        t = z * uncap
        result = slope * (1.0 - t * t)
    return result
