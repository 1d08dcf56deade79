"""Integration tests run quietly, on one thread: their models are too small to share out."""

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """No progress bars from transformers; one thread."""
    from transformers.utils import logging

    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    yield
    logging.enable_progress_bar()
    torch.set_num_threads(num_threads)
