"""Kernel tests run in torch's deterministic mode, and watch what every GEMM gets to read."""

import os
from collections.abc import Iterator

import pytest
import torch

from tests.kernels.dispatch import DefinedPadding

# Before the first product on a GPU: cuBLAS is refused in deterministic mode without it.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


@pytest.fixture(autouse=True)
def deterministic() -> Iterator[None]:
    """Fill uninitialised memory with NaN, and refuse operations that depend on thread order."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    with DefinedPadding():
        yield
    torch.use_deterministic_algorithms(before)
