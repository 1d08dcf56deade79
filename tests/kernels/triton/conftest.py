"""These tests run the kernels on the GPU where there is one, else in Triton's interpreter."""

from collections.abc import Iterator

import pytest

from tests.kernels.triton.interpreter import import_interpreted, interpreting

# Before the test modules import them.
import_interpreted("projection", "softmax")


@pytest.fixture(autouse=True)
def interpreter() -> Iterator[None]:
    """Triton's own functions follow the interpreter, for one test."""
    with interpreting():
        yield
