"""Fixtures in the benchmarks' published schemas, written once per session."""

from pathlib import Path

import datasets
import pytest

from bench.protocol_fixtures import write_benchmarks

datasets.disable_progress_bars()


@pytest.fixture(scope="session")
def repositories(tmp_path_factory) -> dict[str, Path]:
    """Each benchmark's folder, as downloading its repository leaves it."""
    return write_benchmarks(tmp_path_factory.mktemp("benchmarks"))
