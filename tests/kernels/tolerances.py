"""The only table of tolerances of the kernel tests.

A result passes when  error(ours) <= FACTOR * error(torch in the same dtype) + FLOOR[dtype],  both
errors taken against the float64 oracle by `cases.error`: relative to the oracle's largest entry,
for values in nats to 1 if that is larger.
"""

import torch

FACTOR = 2.0

FLOOR = {
    torch.float64: 1e-12,
    torch.float32: 2e-6,
    torch.bfloat16: 1e-3,
    torch.float16: 2e-4,
}
"""For gradients, which are returned in the input's dtype."""

VALUE_FLOOR = {torch.float64: 1e-12} | dict.fromkeys(
    (torch.float32, torch.bfloat16, torch.float16), 2e-6
)
"""For log-probs, losses and the like: float32 statistics whatever the input's dtype."""

SAME_MATHS = {torch.float64: 1e-13, torch.float32: 4e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}
"""Two runs of the same code that may only differ in the order of sums, or one final rounding."""

TWO_ROUNDINGS = 2**-8 + 2e-5
"""A logit's gradient made from a bfloat16 exponential: each of the two is rounded by up to 2^-9."""

THREE_ROUNDINGS = 3 * 2**-9 + FLOOR[torch.bfloat16]
"""An anchored gradient: the exponential, the row factor's product with the hidden state and the
result are each rounded to bfloat16, by up to 2^-9."""
