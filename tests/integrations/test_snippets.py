"""The examples in the integrations' docstrings run as they are written."""

import importlib
import sys
import textwrap
import types
from pathlib import Path
from typing import Any

import pytest
import torch


def _snippet(name: str) -> str:
    """The first indented block of a module's docstring."""
    docstring = importlib.import_module(f"care_kernels.integrations.{name}").__doc__
    assert docstring is not None
    lines: list[str] = []
    for line in docstring.splitlines()[1:]:
        if line.startswith("    ") or (lines and not line):
            lines.append(line)
        elif lines:
            break
    snippet = textwrap.dedent("\n".join(lines)).strip()
    assert 1 < len(snippet.splitlines()) <= 12
    return snippet


def test_trl(tiny_folder, tmp_path):
    """One line after constructing the trainer."""
    pytest.importorskip("trl", reason="trl is not installed: pip install 'trl>=1.16,<1.17'")
    from tests.integrations.trl_runs import grpo_config, prompts, tie_rarely

    names: dict[str, Any] = {
        "model": str(tiny_folder("tiny-qwen2")),
        "reward": tie_rarely,
        "args": grpo_config(tmp_path, max_steps=1),
        "dataset": prompts(vision=False),
    }
    exec(_snippet("trl"), names)
    assert names["trainer"]._compute_loss.__func__.__module__ == "care_kernels.integrations.trl"
    assert names["trainer"].state.global_step == 1


def test_transformers(tiny_folder, tmp_path):
    """One line after loading the model."""
    from transformers import TrainingArguments

    names: dict[str, Any] = {
        "path": tiny_folder("tiny-qwen2"),
        "args": TrainingArguments(
            str(tmp_path), use_cpu=True, max_steps=1, report_to="none", disable_tqdm=True
        ),
        "dataset": [{"input_ids": torch.arange(20, 30), "labels": torch.arange(20, 30)}] * 8,
    }
    exec(_snippet("transformers"), names)
    assert names["model"](**_batched(names["dataset"][0])).logits is None
    assert list(Path(tmp_path).glob("checkpoint-1"))


def test_verl(monkeypatch):
    """The module that verl's workers import puts our head where verl looks for its own."""
    for name in ("verl", "verl.utils", "verl.utils.experimental"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    place: Any = types.ModuleType("verl.utils.experimental.torch_functional")
    monkeypatch.setattr(
        sys.modules["verl.utils.experimental"], "torch_functional", place, raising=False
    )
    for parent, child in (("verl", "utils"), ("verl.utils", "experimental")):
        module = sys.modules[f"{parent}.{child}"]
        monkeypatch.setattr(sys.modules[parent], child, module, raising=False)
    monkeypatch.setitem(sys.modules, place.__name__, place)
    exec(_snippet("verl"), {})
    # As verl's patched forwards call it.
    log_probs, entropy = place.FusedLinearForPPO(impl_backend="torch").forward(
        hidden_states=torch.randn(1, 5, 4),
        vocab_weights=torch.randn(9, 4),
        input_ids=torch.tensor([[1, 2, 3, 4, 5]]),
        temperature=0.7,
    )
    assert log_probs.shape == entropy.shape == (1, 5)


def _batched(row: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value.unsqueeze(0) for name, value in row.items()}
