"""Whole models: one CARE update of a Qwen2.5-VL beside the same with full logits; the quickstart.

The Qwen2.5-VL has about one billion parameters: the architecture is transformers' own with random
weights, images go through the vision tower, and the batch looks like CARE's: of each group one
anchor, near misses, and responses outside S* whose rows the loss skips. Time and peak memory of
forward, loss, backward and AdamW's step.

The quickstart runs with the embedded engine, shorter than `make quickstart`: enough steps to see
the model learn. Of what the `train` extra asks for, each package must be installed or lie as a
wheel in `.wheels/`.
"""

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.gpu.measuring import attempt, peak_mib, release, rounded, time_in_turns
from bench.gpu.section import Bench
from care_kernels import Clip, care_loss

_CLIP = (0.2, 0.28)
_CONFIG = Path(__file__).parents[2] / "configs" / "easy_vqa.yaml"
_NEEDED = ("deepspeed", "pydantic", "yaml", "easy_vqa", "math_verify", "accelerate", "datasets")
_SETTINGS = ("train.steps=30", "eval.max_samples=500")
_DRY_SETTINGS = (
    "sft.steps=1",
    "sft.data.max_samples=8",
    "sft.batch_size=4",
    "train.steps=1",
    "train.prompts_per_step=2",
    "rollout.group_size=2",
    "rollout.max_new_tokens=4",
    "eval.max_samples=4",
)


@dataclass(frozen=True)
class _Shape:
    """The model and its batch."""

    width: int
    layers: int
    heads: int
    intermediate: int
    vocab: int
    vision_width: int
    vision_depth: int
    sequences: int
    length: int
    prompt: int
    """Tokens before the response, the image's among them."""
    grid: int
    """Patches on each side of an image; two by two of them make one token."""


_FULL = _Shape(1536, 16, 12, 8960, 151_936, 1280, 8, 8, 1024, 272, 32)
_DRY = _Shape(64, 1, 4, 64, 300, 32, 1, 2, 16, 8, 4)


def update(bench: Bench) -> None:
    """One update with `care_loss`, one from full logits; both start from the same weights."""
    try:
        import transformers
    except ImportError as error:
        bench.record.put("missing", {"transformers": str(error)})
        print(f"  left out: {error}")
        return
    shape = _DRY if bench.dry else _FULL
    model = _model(shape, bench)
    batch = _batch(shape, bench, model.config)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    active = int((batch["rows"]["advantages"] != 0).sum())
    bench.record.put(
        "model",
        {
            "transformers": transformers.__version__,
            "parameters": parameters,
            "tokens": shape.sequences * shape.length,
            "trained_sequences": active,
        },
    )
    found: dict[str, Any] = {}
    for name, loss_of in (("care_loss", _care_loss), ("full logits", _full_logits)):
        figures = attempt(bench, name, partial(_update, bench, model, batch, loss_of))
        if figures is not None:
            found[name] = figures
            bench.record.put("updates", found)
            print(f"  {name:12s} {figures}")
        release(bench)


def _model(shape: _Shape, bench: Bench) -> Any:
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    pairs = shape.width // shape.heads // 2
    text = {
        "vocab_size": shape.vocab,
        "hidden_size": shape.width,
        "intermediate_size": shape.intermediate,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
        "rope_parameters": {
            "rope_type": "default",
            "mrope_section": [pairs // 4, pairs * 3 // 8, pairs - pairs // 4 - pairs * 3 // 8],
            "rope_theta": 1e6,
        },
    }
    vision = {
        "depth": shape.vision_depth,
        "hidden_size": shape.vision_width,
        "intermediate_size": 2 * shape.vision_width,
        "num_heads": 16 if shape.vision_width % 16 == 0 and not bench.dry else 2,
        "patch_size": 14,
        "out_hidden_size": shape.width,
        "window_size": 112,
        "fullatt_block_indexes": [shape.vision_depth - 1],
    }
    config = Qwen2_5_VLConfig(
        text_config=text,
        vision_config=vision,
        tie_word_embeddings=True,
        image_token_id=shape.vocab - 1,
        video_token_id=shape.vocab - 2,
        vision_start_token_id=shape.vocab - 3,
        vision_end_token_id=shape.vocab - 4,
    )
    torch.manual_seed(0)
    with torch.device(bench.device):
        model: Any = Qwen2_5_VLForConditionalGeneration(config)
    model = model.to(torch.bfloat16).train()
    model.gradient_checkpointing_enable()
    return model


def _batch(shape: _Shape, bench: Bench, config: Any) -> dict[str, Any]:
    """Groups of four: a positive, two near misses and one response outside S*."""
    generator = torch.Generator().manual_seed(1)
    num, length, prompt = shape.sequences, shape.length, shape.prompt
    ids = torch.randint(shape.vocab - 8, (num, length), generator=generator)
    image_tokens = (shape.grid // 2) ** 2
    ids[:, 0] = config.vision_start_token_id
    ids[:, 1 : 1 + image_tokens] = config.image_token_id
    ids[:, 1 + image_tokens] = config.vision_end_token_id
    pixels = torch.randn(num * shape.grid**2, 3 * 2 * 14 * 14, generator=generator)
    member = torch.arange(num) % 4
    answer = length - length // 8
    spans = torch.tensor([[prompt, answer], [answer, length]])
    inputs = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": (ids == config.image_token_id).long(),
        "pixel_values": pixels.to(torch.bfloat16),
        "image_grid_thw": torch.tensor([[1, shape.grid, shape.grid]]).repeat(num, 1),
    }
    rows = {
        "advantages": torch.tensor([1.5, -0.5, -0.5, 0.0])[member],
        "think_spans": spans[0].repeat(num, 1),
        "answer_spans": spans[1].repeat(num, 1),
        "is_positive": member == 0,
    }
    return {
        "inputs": {name: value.to(bench.device) for name, value in inputs.items()},
        "rows": {name: value.to(bench.device) for name, value in rows.items()},
    }


def _care_loss(model: Any, batch: dict[str, Any]) -> Tensor:
    hidden = model.model(**batch["inputs"], use_cache=False).last_hidden_state
    ids = batch["inputs"]["input_ids"]
    return care_loss(
        hidden,
        model.lm_head.weight,
        ids,
        **batch["rows"],
        think_weight=0.5,
        surrogate=Clip(*_CLIP),
        backend="triton",
    ).loss


def _full_logits(model: Any, batch: dict[str, Any]) -> Tensor:
    """The same loss as a trainer writes it in plain torch: bfloat16 logits, float32 softmax."""
    rows, ids = batch["rows"], batch["inputs"]["input_ids"]
    logits = model(**batch["inputs"], use_cache=False).logits[:, :-1].float()
    log_probs = logits.log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)
    ratio = (log_probs - log_probs.detach()).exp()
    position = torch.arange(ids.shape[1], device=ids.device)

    def within(spans: Tensor) -> Tensor:
        return (position >= spans[:, :1]) & (position < spans[:, 1:])

    weights = 0.5 * (within(rows["think_spans"]) & rows["is_positive"][:, None])
    weights = torch.where(within(rows["answer_spans"]), 1.0, weights)
    share = weights / (weights.sum(1, keepdim=True) + 1e-8)
    advantages = (rows["advantages"][:, None] * share)[:, 1:]
    clipped = ratio.clamp(1 - _CLIP[0], 1 + _CLIP[1])
    value = torch.minimum(ratio * advantages, clipped * advantages)
    return -value.sum() / (rows["advantages"] != 0).sum()


def _update(bench: Bench, model: Any, batch: dict[str, Any], loss_of: Any) -> dict[str, Any]:
    """Median of three updates' time after one that warms up, and the peak beyond the weights."""
    # Fused: the step holds no copies of the weights, which would hide what the loss holds.
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, fused=True)

    def step() -> float:
        loss = loss_of(model, batch)
        loss.backward()
        optimizer.step()
        value = float(loss.detach())
        optimizer.zero_grad(set_to_none=True)
        return value

    value = step()
    peak = peak_mib(bench, step)
    times = time_in_turns(bench, {"step": step}, 1 if bench.dry else 3)["step"]
    gradient = _gradient_norm(model, batch, loss_of)
    return {
        "loss": rounded(value, 5),
        "gradient_norm": rounded(gradient, 4),
        "ms": rounded(sorted(times)[len(times) // 2], 4),
        "peak_mib_beyond_weights_and_states": None if peak is None else round(peak),
    }


def _gradient_norm(model: Any, batch: dict[str, Any], loss_of: Any) -> float:
    loss_of(model, batch).backward()
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    norm = torch.linalg.vector_norm(
        torch.stack([torch.linalg.vector_norm(grad.float()) for grad in grads])
    )
    model.zero_grad(set_to_none=True)
    return float(norm)


def quickstart(bench: Bench) -> None:
    """Cold start, training steps and evaluation in a process of their own."""
    missing = [name for name in _NEEDED if find_spec(name) is None]
    if missing:
        bench.record.put("missing", dict.fromkeys(missing, "not installed, nor in .wheels/"))
        print(f"  left out: {', '.join(missing)} not installed, nor in .wheels/")
        return
    settings = _DRY_SETTINGS if bench.dry else _SETTINGS
    with tempfile.TemporaryDirectory(prefix="quickstart-") as folder:
        command = [sys.executable, "-m", "care_train", "quickstart", "--config", str(_CONFIG)]
        # The trainer's own kernels are for the device, or torch's.
        environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
        command += [f"output_dir={folder}", *settings, "name=quickstart"]
        code = subprocess.run(command, env=environment).returncode
        summaries = sorted(Path(folder).rglob("summary.json"))
        summary: dict[str, Any] = json.loads(summaries[0].read_text()) if summaries else {}
    bench.record.put("quickstart", {"exit_code": code, "settings": settings, "summary": summary})
    if code:
        sys.exit(f"the quickstart ended with {code}")
