"""How many rows a chunk holds, and the products it takes on a GPU."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from care_kernels.backends import ChunkRows, ChunkSpec, LogitGradient, TorchChunk
from care_kernels.chunks import add_weight_gradient, back_project, chunk_rows
from care_kernels.softmax import LogitTransform


def test_chunks_on_a_cpu_are_bounded() -> None:
    """By default at most 512 MiB of logits, a reference's included, and 4096 rows."""
    for vocab_size, logit_bytes, rows in ((1000, 4, 4096), (152064, 8, 441), (10**9, 4, 1)):
        options = {"logit_bytes": logit_bytes, "device": torch.device("cpu")}
        assert chunk_rows(rows, vocab_size, 64, **options) == rows
        assert chunk_rows(rows + 1, vocab_size, 64, **options) <= rows


def test_gpu_chunks_fill_waves_and_balance() -> None:
    """Two bytes a bfloat16 exponential, multiples of 128 rows, no tiny last chunk; one chunk where
    it takes no more than a usual one and the float32 dW it saves."""
    head, options = (152_064, 3_584), {"logit_bytes": 2, "device": torch.device("cuda")}
    assert chunk_rows(8192, *head, **options, sums_weight_gradient=True) == 8192
    assert chunk_rows(16_384, *head, **options, sums_weight_gradient=True) < 16_384
    for num_rows in (4096, 8192, 16_384, 40_000):
        rows = chunk_rows(num_rows, *head, **options)
        assert rows % 128 == 0 and rows * 152_064 * 2 <= 2**30
        assert -(-num_rows // rows) == -(-num_rows // 3_456)
    assert chunk_rows(8192, *head, logit_bytes=0, device=options["device"]) == 4096


class Products(TorchDispatchMode):
    """The types of what the matrix products that run leave."""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: list[torch.dtype] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        is_product = func.overloadpacket.__name__.rstrip("_") in ("mm", "addmm")
        # Nothing is written into a tensor without numbers, which torch 2.11 cannot do for addmm.
        given = (kwargs or {}).get("out") if is_product else None
        result = func(*args, **(kwargs or {})) if given is None else given
        if is_product:
            self.dtypes.append(result.dtype)
        return result


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=str)
def test_each_product_on_a_gpu_is_one_call(dtype: torch.dtype) -> None:
    """Logits, dX and dW of one chunk, also where torch makes them: no loop over vocabulary tiles,
    and no sum of 16-bit parts, as a 16-bit result of cuBLAS may be.

    The tensors claim to be on a GPU and hold no numbers.
    """
    with FakeTensorMode(), Products() as products:

        def on_gpu(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
            return torch.empty(shape, dtype=dtype, device="cuda")

        hidden, weight = on_gpu(64, 32), on_gpu(150_000, 32)
        chunk = TorchChunk(ChunkSpec(dtype, weight, None, LogitTransform()), 64)
        chunk.project(ChunkRows(hidden, on_gpu(64, dtype=torch.int64)))
        grad_logits = on_gpu(64, 150_000, dtype=chunk.grad_dtype)
        back_project(LogitGradient(grad_logits), weight)
        into = on_gpu(150_000, 32, dtype=torch.float32)
        add_weight_gradient(grad_logits, hidden.to(chunk.grad_dtype), into, is_first=True)
    assert products.dtypes == [torch.float32] * 3
