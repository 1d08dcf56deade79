"""Fixtures in the benchmarks' published schemas, written once per session."""

from pathlib import Path

import datasets
import pytest
import torch

from bench.protocol_fixtures import write_benchmarks

datasets.disable_progress_bars()


@pytest.fixture(scope="session")
def repositories(tmp_path_factory) -> dict[str, Path]:
    """Each benchmark's folder, as downloading its repository leaves it."""
    return write_benchmarks(tmp_path_factory.mktemp("benchmarks"))


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Tiny models gain nothing from more, and wait for each other's threads on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
