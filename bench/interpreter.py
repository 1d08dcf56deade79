"""Triton's interpreter with two of its differences from a device mended.

It cuts float32 down to bfloat16 where every device rounds to nearest (all versions up to 3.8), and
Triton 3.6 reads the bound of a loop from an array of one element, which numpy 2.5 refuses.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter


@contextmanager
def mended_interpreter() -> Iterator[None]:
    """Interpreted kernels round bfloat16 as devices do and take loop bounds with any numpy."""
    convert, patch = interpreter._convert_float, interpreter._patch_lang_tensor
    interpreter._convert_float = _rounding(convert)
    interpreter._patch_lang_tensor = _with_scalar_index(patch)
    try:
        yield
    finally:
        interpreter._convert_float, interpreter._patch_lang_tensor = convert, patch


def _rounding(convert: Any) -> Any:
    def convert_float(data: np.ndarray, source: Any, target: Any, mode: Any) -> np.ndarray:
        if source == tl.float32 and target == tl.bfloat16:
            values = torch.from_numpy(np.ascontiguousarray(data)).bfloat16()
            return values.view(torch.int16).numpy().view(np.uint16)
        return convert(data, source, target, mode)

    return convert_float


def _with_scalar_index(patch: Any) -> Any:
    def patch_lang_tensor(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    return patch_lang_tensor
