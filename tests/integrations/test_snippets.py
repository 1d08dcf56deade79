"""The examples in the integrations' docstrings run as they are written."""

import importlib
import sys
import textwrap
import types
from pathlib import Path
from typing import Any

import pytest
import torch


def run_snippet(name: str, names: dict[str, Any]) -> None:
    """Run the first indented block of a module's docstring."""
    docstring = importlib.import_module(f"care_kernels.integrations.{name}").__doc__
    assert docstring is not None
    parts = docstring.split("\n\n")
    first = next(i for i, part in enumerate(parts) if part.startswith("    "))
    last = next(i for i in range(first, len(parts)) if not parts[i].startswith("    "))
    exec(textwrap.dedent("\n\n".join(parts[first:last])), names)


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
    run_snippet("trl", names)
    assert names["trainer"]._compute_loss.__func__.__module__ == "care_kernels.integrations.trl"
    assert names["trainer"].state.global_step == 1


def test_transformers(tiny_folder, tmp_path):
    """One line after loading the model."""
    from transformers import TrainingArguments

    row = torch.arange(20, 30)
    names: dict[str, Any] = {
        "path": tiny_folder("tiny-qwen2"),
        "args": TrainingArguments(
            str(tmp_path), use_cpu=True, max_steps=1, report_to="none", disable_tqdm=True
        ),
        "dataset": [{"input_ids": row, "labels": row}] * 8,
    }
    run_snippet("transformers", names)
    assert names["model"](input_ids=row[None], labels=row[None]).logits is None
    assert list(Path(tmp_path).glob("checkpoint-1"))


def test_verl(monkeypatch):
    """The module that verl's workers import puts our head where verl looks for its own."""
    place = "verl.utils.experimental.torch_functional"
    for name in ("verl", "verl.utils", "verl.utils.experimental", place):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    run_snippet("verl", {})
    module: Any = sys.modules[place]
    # As verl's patched forwards call it.
    log_probs, entropy = module.FusedLinearForPPO(impl_backend="torch").forward(
        hidden_states=torch.randn(1, 5, 4),
        vocab_weights=torch.randn(9, 4),
        input_ids=torch.tensor([[1, 2, 3, 4, 5]]),
        temperature=0.7,
    )
    assert log_probs.shape == entropy.shape == (1, 5)
