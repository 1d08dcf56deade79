"""Kernel tests run in torch's deterministic mode, and watch what every GEMM gets to read."""

import os
from collections.abc import Iterator

import pytest
import torch

from tests.kernels.dispatch import DefinedPadding
from tests.kernels.interpreter import IS_INTERPRETED, interpret_kernels_of, interpreting

# Before the first product on a GPU: cuBLAS is refused in deterministic mode without it.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
# Before the test modules import them.
for _name in ("triton.launch", "triton.projection", "triton.softmax"):
    interpret_kernels_of(f"care_kernels.{_name}")
for _name in ("region_weights", "rationale_distance"):
    interpret_kernels_of(f"care_kernels.{_name}")


@pytest.fixture(autouse=True)
def deterministic() -> Iterator[None]:
    """Fill uninitialised memory with NaN, and refuse operations that depend on thread order."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    with DefinedPadding():
        yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture
def triton_backend(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """`backend="triton"`, for one test: on the GPU where there is one, else interpreted."""
    # On a GPU Triton would read it too, as it compiles.
    if IS_INTERPRETED:
        monkeypatch.setenv("TRITON_INTERPRET", "1")
    with interpreting():
        yield "triton"


@pytest.fixture(params=("torch", "triton"))
def backend(request: pytest.FixtureRequest) -> str:
    """Each backend: the same test holds both to the same oracle."""
    return request.getfixturevalue("triton_backend") if request.param == "triton" else "torch"
