"""Kernel tests run in torch's deterministic mode, and watch what every GEMM gets to read."""

from collections.abc import Iterator

import pytest
import torch

from tests.kernels.dispatch import DefinedPadding


@pytest.fixture(autouse=True)
def deterministic() -> Iterator[None]:
    """Fill uninitialised memory with NaN, and refuse operations that depend on thread order."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    with DefinedPadding():
        yield
    torch.use_deterministic_algorithms(before)
