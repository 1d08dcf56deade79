"""What kernels and launchers share: the logits' transform and its derivative.

Kernels hold z log2(e), in base 2, because a device's exponential is exp2: with log2(e) folded into
the transform's own factors, e^z costs no multiplication. A transform reaches a kernel as numbers,
so that one compiled kernel serves every temperature.

Every launch is made under `torch.cuda.device_of`: Triton launches on the current device, whatever
the tensors' own. On CPU tensors that does nothing.
"""

import triton
import triton.language as tl

from care_kernels.softmax import LogitTransform

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


def transform_arguments(transform: LogitTransform) -> dict[str, float | bool]:
    """How kernels take a transform: factors of a raw logit and of the capped result."""
    if transform.softcap is None:
        inner, outer = transform.scale / transform.temperature * LOG2_E.value, 1.0
    else:
        inner = transform.scale / transform.softcap
        outer = transform.softcap / transform.temperature * LOG2_E.value
    return {"inner": inner, "outer": outer, "HAS_SOFTCAP": transform.softcap is not None}


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
    """z log2(e) of raw logits."""
    z = raw * inner
    if HAS_SOFTCAP:
        z = tanh(z) * outer
    return z


@triton.jit
def slope_at(z, inner, outer, HAS_SOFTCAP: tl.constexpr):
    """dz / draw, from z log2(e), which is the tanh times `outer`."""
    slope = inner * outer * LN_2
    if HAS_SOFTCAP:
        t = z * (1.0 / outer)
        slope *= 1.0 - t * t
    return slope
