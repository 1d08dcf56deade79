"""Shared fixtures: tiny real models and drawn images, made once per test session."""

import json
import os
from pathlib import Path

import pytest
from hypothesis import settings

# Tiny models gain nothing from more threads, which wait for each other on a busy machine.
os.environ["OMP_NUM_THREADS"] = "1"
# Before transformers and deepspeed load: quiet, offline, on the CPU.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("DS_ACCELERATOR", "cpu")

# The same examples in every run; `--hypothesis-profile=default` looks for new ones.
settings.register_profile("repeatable", derandomize=True, deadline=None, database=None)
settings.load_profile("repeatable")

# The longest first, so that no worker of pytest-xdist is left with one at the end.
_LONGEST = (
    *("train/test_end_to_end", "train/test_faults", "security/test_other_users"),
    *("security/test_ranks", "rollout/test_vllm_engine", "reporting/test_page_browser"),
    *("integrations/test_care_trl", "security/test_serve", "bench/test_paper", "test_trainer"),
    *("kernels/test_projection", "bench/test_compiled", "kernels/test_sharded_heads"),
    *("verifier/test_pool", "test_commands"),
    *("integrations/test_trl", "rollout/test_weight_sync", "rollout/test_runs"),
    *("train/test_second_device", "train/test_mixed_rows", "rollout/test_vllm_server"),
    *("evaluation/test_benchmark_run", "security/test_checkpoints"),
    *("security/test_statuses", "security/test_run_folders"),
)
_ORDER = {f"tests/{name}.py": place for place, name in enumerate(_LONGEST)}
_GONE = [name for name in _ORDER if not (Path(__file__).parents[1] / name).is_file()]
assert not _GONE, f"tests/conftest.py lists {_GONE} among the longest files"


def pytest_configure(config: pytest.Config) -> None:
    # pytest-xdist would deal files out by how many tests they hold.
    config.option.loadscopereorder = False


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: _ORDER.get(item.nodeid.partition("::")[0], len(_ORDER)))


COLORS = ("red", "green", "blue", "yellow")


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory):
    """Folder of a tiny model of the named kind, built once."""
    from care_train.models.tiny import build_tiny_model

    built: dict[str, Path] = {}

    def folder(kind: str = "tiny-qwen2.5-vl") -> Path:
        if kind not in built:
            where = tmp_path_factory.mktemp("models") / kind
            built[kind] = build_tiny_model(kind, where, _corpus(), hidden_size=64)
        return built[kind]

    return folder


@pytest.fixture(scope="session")
def color_rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A JSONL data set of 16 drawn images: one colour each, asked for by name."""
    from PIL import Image

    folder = tmp_path_factory.mktemp("colors")
    lines = []
    for index in range(16):
        color = COLORS[index % len(COLORS)]
        Image.new("RGB", (64, 64), color).save(folder / f"{index}.png")
        row = {
            "prompt": "what color is the image?",
            "answer": color,
            "images": [f"{index}.png"],
            "rationale": f"the image is {color}",
        }
        lines.append(json.dumps(row))
    path = folder / "rows.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture(scope="session")
def mixed_rows(color_rows: Path) -> Path:
    """The same with no image, one image and two images of other sizes, in turn."""
    from PIL import Image

    rows = [json.loads(line) for line in color_rows.read_text().splitlines()]
    Image.new("RGB", (96, 64), "blue").save(color_rows.parent / "wide.png")
    for number, row in enumerate(rows):
        row["images"] = [*row["images"], "wide.png"][: number % 3]
    path = color_rows.with_name("mixed.jsonl")
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="session")
def from_cold_start(tmp_path_factory: pytest.TempPathFactory, color_rows: Path) -> list[str]:
    """Arguments of `train` from a tiny Qwen2.5-VL that has seen the format and earns rewards."""
    from tests.train.runs import cold_start

    return cold_start(tmp_path_factory.mktemp("cold"), color_rows, "sft.steps=45")


def _corpus() -> list[str]:
    return [f"what color is the image? the image is {color}" for color in COLORS]
