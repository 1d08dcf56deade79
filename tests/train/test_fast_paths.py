"""FlashAttention, Liger's kernels and gradient checkpointing."""

import copy
import importlib
import logging
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
import triton
import triton.language as tl
from liger_kernel.transformers import liger_rotary_pos_emb
from packaging.version import Version
from triton.runtime import interpreter

from care_train.config import LoraSettings, ModelSettings
from care_train.models import load as load_module
from care_train.models.batch import TokenSequence
from care_train.models.load import apply_liger, load_model, recompute_activations, runnable
from care_train.models.lora import add_adapters
from care_train.models.policy import Policy
from care_train.models.tiny import TINY_KINDS
from tests.train.builders import batch_of, load, random_sequences
from tests.train.runs import python

ASKED = ModelSettings(attention="flash_attention_2", liger=True, dtype="bfloat16")


def test_a_model_loads_with_what_can_run_and_says_so_once(tiny_folder, caplog, monkeypatch):
    """No GPU: sdpa and transformers' own layers, one line each however often a model is loaded."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setenv("RANK", "0")
    load_module.say_once.cache_clear()
    with caplog.at_level(logging.WARNING):
        load_model(ASKED, tiny_folder("tiny-qwen2"))
        model = load_model(ASKED, tiny_folder("tiny-qwen2")).model
    assert model.config._attn_implementation == "sdpa"
    assert not any("Liger" in m._get_name() for m in model.modules())
    lines = [r.getMessage() for r in caplog.records if "cannot run" in r.getMessage()]
    assert len(lines) == 2
    assert "model.attention=flash_attention_2" in lines[0] and "sdpa is used" in lines[0]
    assert "model.liger" in lines[1] and "there is no GPU" in lines[1]


@pytest.mark.parametrize(
    ("capability", "installed", "dtype", "kind", "reasons"),
    [
        ((9, 0), True, "bfloat16", "qwen2_5_vl", []),
        ((7, 5), True, "bfloat16", "qwen3_vl", ["older than Ampere"]),
        ((9, 0), False, "bfloat16", "qwen2", ["flash-attn is not", "liger-kernel is not"]),
        ((9, 0), True, "float32", "qwen2", ["model.dtype is float32"]),
        ((9, 0), True, "bfloat16", "llama", ["not tested with llama"]),
    ],
)
def test_reasons_on_gpus(capability, installed, dtype, kind, reasons, monkeypatch):
    """An old GPU, a missing package, a precision and a model kind are each named."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "T4")
    monkeypatch.setattr(load_module.importlib.util, "find_spec", lambda name: installed or None)
    asked = ModelSettings(attention="flash_attention_2", liger=True, dtype=dtype)
    used, notes = runnable(asked, kind)
    assert len(notes) == len(reasons)
    for note, reason in zip(notes, reasons, strict=True):
        assert reason in note
    assert (used == asked) == (not reasons)


def test_liger_is_not_used_with_transformers_that_it_does_not_know(monkeypatch):
    """Liger 0.8.5 replaces functions that transformers 5.23 has moved: some without an effect."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    for known, reasons in (("5.22.2", 0), ("5.23.0", 1)):
        monkeypatch.setattr(load_module.transformers, "__version__", known)
        used, notes = runnable(ModelSettings(liger=True), "qwen2")
        assert (used.liger, len(notes)) == (not reasons, reasons)


@pytest.fixture
def transformers_as_it_was():
    """Undo what Liger replaces in transformers' modules."""
    names = [f"transformers.models.{k}.modeling_{k}" for k in load_module.LIGER_KINDS]
    before = {n: dict(vars(sys.modules[n])) for n in names if n in sys.modules}
    yield
    for name, values in before.items():
        vars(sys.modules[name]).update(values)


@pytest.mark.skipif(
    Version(transformers.__version__) >= Version("5.23"), reason="Liger 0.8.5 precedes it"
)
@pytest.mark.parametrize("kind", TINY_KINDS)
def test_liger_replaces_norms_mlps_and_rotary_embeddings(kind, tiny_folder, transformers_as_it_was):
    """By Liger's own functions for the model's kind, in copies of the model too; not its loss."""
    model = load(tiny_folder(kind)).model
    forward = type(model).forward
    apply_liger(model)
    model = copy.deepcopy(model)
    layers = getattr(model.base_model, "language_model", model.base_model).layers
    for layer in layers:
        names = (layer.input_layernorm._get_name(), layer.post_attention_layernorm._get_name())
        assert names == ("LigerRMSNorm", "LigerRMSNorm")
        assert layer.mlp.forward.__func__.__qualname__ == "LigerSwiGLUMLP.forward"
        assert layer.mlp.forward.__self__ is layer.mlp
    attention = type(layers[0].self_attn).forward
    assert attention.__globals__["apply_rotary_pos_emb"] is liger_rotary_pos_emb
    assert type(model).forward is forward and "forward" not in vars(model)


@pytest.mark.parametrize("variant", ["padded", "packed", "lora"])
@pytest.mark.parametrize("kind", TINY_KINDS)
def test_checkpointing_keeps_less_and_changes_no_gradient(kind, variant, tiny_folder):
    """The same gradients bit for bit, of images shared by two rollouts too, from less than half
    the tensors kept for the backward."""
    loaded = load(tiny_folder(kind))
    if variant == "lora":
        add_adapters(loaded.model, LoraSettings(rank=2), seed=0)
    sequences = random_sequences(loaded, 2)
    sequences.append(TokenSequence(sequences[-1].prompt, (), (11, 12, 13, 14, 15)))
    batch = batch_of(loaded, sequences, packed=variant == "packed")
    assert ("image_places" in batch.inputs) == (kind != "tiny-qwen2")
    results = []
    for checkpointing in (False, True):
        model = copy.deepcopy(loaded.model).train()
        if checkpointing:
            recompute_activations(model)
        results.append(_gradients_and_kept_bytes(Policy(model), batch))
    (wanted, whole), (found, kept) = results
    assert found.keys() == wanted.keys() and len(found) > 10
    for name, gradient in found.items():
        assert torch.equal(gradient, wanted[name]), name
    assert kept < 0.5 * whole


def _gradients_and_kept_bytes(policy, batch):
    kept = 0

    def keep(tensor):
        nonlocal kept
        if not isinstance(tensor, torch.nn.Parameter):
            kept += tensor.nbytes
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        total = policy(batch)[0].sum()
    total.backward()
    return {n: p.grad for n, p in policy.named_parameters() if p.grad is not None}, kept


@pytest.mark.slow
@pytest.mark.parametrize("kind", TINY_KINDS)
def test_ligers_kernels_compute_what_transformers_does(kind, tiny_folder):
    """Log-probs and gradients of text and images, under Triton's interpreter, which a process of
    its own is started with: this file as a program."""
    python("-m", "tests.train.test_fast_paths", tiny_folder(kind), TRITON_INTERPRET="1")


@triton.jit
def rsqrt(x):
    """In place of the one of CUDA's library, which the interpreter does not have."""
    return tl.rsqrt(x)


def _fit_interpreter() -> None:
    """Float arguments become tensors, as they are where kernels are compiled."""
    convert: Any = interpreter._implicit_cvt  # pyright: ignore[reportAttributeAccessIssue]

    def with_floats(argument: Any) -> Any:
        if not isinstance(argument, float):
            return convert(argument)
        value = np.array([argument], dtype=np.float32)
        return tl.tensor(interpreter.TensorHandle(value, tl.float32), tl.float32)

    interpreter._implicit_cvt = with_floats  # pyright: ignore[reportAttributeAccessIssue]
    norm: Any = importlib.import_module("liger_kernel.ops.rms_norm")
    norm.rsqrt = rsqrt


def _log_probs_and_gradients(folder: Path, liger: bool) -> tuple[torch.Tensor, dict]:
    loaded = load(folder, liger=liger)
    assert liger == any("Liger" in m._get_name() for m in loaded.model.modules())
    sequences = random_sequences(loaded, 2)
    policy = Policy(loaded.model)
    log_probs = policy(batch_of(loaded, sequences))[0]
    log_probs.sum().backward()
    gradients = {n: p.grad for n, p in policy.named_parameters() if p.grad is not None}
    return log_probs.detach(), gradients


def _compare_liger(folder: str) -> None:
    _fit_interpreter()
    # The kernels replace functions of transformers' modules: its own go first.
    own, kernels = [_log_probs_and_gradients(Path(folder), liger) for liger in (False, True)]
    torch.testing.assert_close(kernels, own, rtol=1e-4, atol=2e-5)
    assert not torch.equal(own[0], kernels[0])


if __name__ == "__main__":
    _compare_liger(*sys.argv[1:])
