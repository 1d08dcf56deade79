"""FlashAttention and Liger's kernels: where they can run, and what runs in their place."""

import importlib.util
import logging
import os
import sys
from dataclasses import replace
from functools import cache
from types import MethodType
from typing import Any

import torch

from care_train.config import ModelSettings

logger = logging.getLogger(__name__)

LIGER_KINDS = ("qwen2", "qwen2_5_vl", "qwen3", "qwen3_vl")
"""Model types whose Liger forward is tested to equal transformers'."""


def runnable(settings: ModelSettings, kind: str | None = None) -> tuple[ModelSettings, list[str]]:
    """The settings that this machine can run, and a sentence for each that it cannot.

    Args:
        settings: what is asked for.
        kind: the model's `model_type`; None: not known yet.
    """
    notes = []
    is_flash = settings.attention == "flash_attention_2"
    if is_flash and (reason := _why_no_flash_attention(settings.dtype)):
        notes.append(f"model.attention=flash_attention_2 cannot run: {reason}; sdpa is used")
        settings = replace(settings, attention="sdpa")
    if settings.liger and (reason := _why_no_liger(kind)):
        notes.append(f"model.liger cannot run: {reason}; transformers' own layers are used")
        settings = replace(settings, liger=False)
    return settings, notes


@cache
def say_once(note: str) -> None:
    """Log one of `runnable`'s sentences, by the first rank."""
    if os.environ.get("RANK", "0") == "0":
        logger.warning("warning: %s", note)


def _why_no_flash_attention(dtype: str) -> str | None:
    if not torch.cuda.is_available():
        return "there is no GPU"
    if torch.version.hip is None and torch.cuda.get_device_capability() < (8, 0):
        return f"{torch.cuda.get_device_name()} is older than Ampere (compute capability 8.0)"
    if importlib.util.find_spec("flash_attn") is None:
        return "flash-attn is not installed (pip install flash-attn)"
    if dtype != "bfloat16":
        return f"it computes in bfloat16, and model.dtype is {dtype}"
    return None


def _why_no_liger(kind: str | None) -> str | None:
    # Triton's interpreter runs the kernels on CPUs, slowly: for tests.
    if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
        return "there is no GPU"
    if importlib.util.find_spec("liger_kernel") is None:
        return "liger-kernel is not installed (pip install liger-kernel)"
    if kind is not None and kind not in LIGER_KINDS:
        return f"it is not tested with {kind} models, but with {', '.join(LIGER_KINDS)}"
    return None


def apply_liger(model: Any) -> None:
    """Put Liger's RMSNorm, SwiGLU and rotary embedding into a loaded model.

    Its fused loss is left out: `care_kernels` computes the loss. Functions are replaced in the
    module of the model's class, so for all models of this kind in the process.

    Source: arXiv:2410.10989; liger_kernel/transformers/monkey_patch.py.
    """
    from liger_kernel.transformers import LigerSwiGLUMLP, liger_rotary_pos_emb
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN

    MODEL_TYPE_TO_APPLY_LIGER_FN[model.config.model_type](
        rope=True,
        rms_norm=True,
        swiglu=True,
        cross_entropy=False,
        fused_linear_cross_entropy=False,
        model=model,
    )
    # Liger 0.8.5 replaces the multimodal rotary function that Qwen2.5-VL had before transformers 5
    # merged the three axes ahead of the layers, and no SwiGLU of Qwen3-VL's.
    module: Any = sys.modules[type(model).__module__]
    module.apply_rotary_pos_emb = liger_rotary_pos_emb
    for layer in getattr(model.base_model, "language_model", model.base_model).layers:
        layer.mlp.forward = MethodType(LigerSwiGLUMLP.forward, layer.mlp)
