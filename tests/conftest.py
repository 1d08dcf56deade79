"""Shared fixtures: tiny real models and drawn images, made once per test session."""

import json
import os
from pathlib import Path

import pytest
from hypothesis import settings

# Before transformers and deepspeed load: quiet, offline, on the CPU.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("DS_ACCELERATOR", "cpu")

# The same examples in every run; `--hypothesis-profile=default` looks for new ones.
settings.register_profile("repeatable", derandomize=True, deadline=None, database=None)
settings.load_profile("repeatable")

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


def _corpus() -> list[str]:
    return [f"what color is the image? the image is {color}" for color in COLORS]
