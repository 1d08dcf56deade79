"""How a call runs: which backend and kernels, how many rows of logits at a time."""

import os
from typing import Any

import torch

from care_kernels._logit_chunk import Head, LogitChunk, NativeChunk, NativeKlChunk, TorchChunk
from care_kernels._native_cpu import native_ops

# Each chunk reads and writes the whole head gradient, so chunks should be large: with C rows a
# float32 dW has C / 4 FLOP for each byte it moves, and a GPU wants several hundred.
MAX_CHUNK_ROWS = 4096
CHUNK_BYTES = {"cuda": 1024 * 2**20, "cpu": 512 * 2**20}


def resolve_backend(backend: str | None, device: torch.device) -> str:
    """The backend that will run: "triton" on CUDA and ROCm tensors, else "torch".

    "triton" on CPU tensors runs under TRITON_INTERPRET=1 only.

    Raises:
        ValueError: `backend` is unknown, or cannot run on `device`.
    """
    if backend not in (None, "triton", "torch"):
        raise ValueError(f"backend: got {backend!r}; wanted None, 'triton' or 'torch'")
    if backend is None:
        return "triton" if device.type == "cuda" else "torch"
    if backend == "triton" and device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError(
            f"backend: got 'triton' for tensors on {device}; wanted CUDA or ROCm tensors, or "
            "TRITON_INTERPRET=1 in the environment"
        )
    return backend


def compute_dtype(*tensors: torch.Tensor | None) -> torch.dtype:
    """float64 if any tensor is float64 (gradient checks need it), else float32."""
    is_double = any(t is not None and t.dtype == torch.float64 for t in tensors)
    return torch.float64 if is_double else torch.float32


def chunk_size(
    chunk_rows: int | None, vocab_size: int, device: torch.device, *, with_ref: bool = False
) -> int:
    """`chunk_rows`, or as many rows, from 1 to 4096, as keep float32 logits within CHUNK_BYTES.

    Args:
        chunk_rows: the caller's choice.
        vocab_size: V, of this rank's part where ranks share the vocabulary.
        device: where the logits live.
        with_ref: the reference's logits are held beside the policy's.
    """
    if chunk_rows is not None:
        return chunk_rows
    row_bytes = vocab_size * 4 * (2 if with_ref else 1)
    limit = CHUNK_BYTES.get(device.type, CHUNK_BYTES["cpu"])
    return max(1, min(MAX_CHUNK_ROWS, limit // row_bytes))


def logit_chunk(
    backend: str,
    hidden_dtype: torch.dtype,
    head: Head,
    num_rows: int,
    *,
    with_entropy: bool,
    with_gradients: bool,
    ref_head: Head | None,
) -> LogitChunk:
    """The kernels for one call's chunks.

    Triton's fused projection where it applies, else a GEMM with float32 logits and torch
    operations after it, or C++ on a CPU that has it.
    """
    weights = [head.weight] if ref_head is None else [head.weight, ref_head.weight]
    dtype = torch.float64 if hidden_dtype == torch.float64 else compute_dtype(*weights)
    options: dict[str, Any] = {"with_entropy": with_entropy, "ref_head": ref_head}
    if backend == "triton" and dtype == torch.float32:
        from care_kernels.triton.chunk import FusedChunk
        from care_kernels.triton.projection import supports

        # In float16 dL/dz below 6e-8 would vanish.
        trainable = head.weight.dtype == torch.bfloat16 or not with_gradients
        if supports(hidden_dtype, head.weight) and ref_head is None and trainable:
            return FusedChunk(
                head, num_rows, with_entropy=with_entropy, with_gradients=with_gradients
            )
    if backend == "torch" and _runs_natively(hidden_dtype, *weights):
        if ref_head is not None:
            return NativeKlChunk(head, num_rows, with_entropy=with_entropy, ref_head=ref_head)
        return NativeChunk(head, num_rows, with_entropy=with_entropy, with_gradients=with_gradients)
    return TorchChunk(head, num_rows, dtype, **options)


def _runs_natively(hidden_dtype: torch.dtype, *weights: torch.Tensor) -> bool:
    """bfloat16 throughout, on a CPU, with rows that the C++ kernels can read in pairs."""
    fits = hidden_dtype == torch.bfloat16 and all(
        weight.device.type == "cpu"
        and weight.dtype == torch.bfloat16
        and weight.shape[1] % 2 == 0
        and weight.stride(1) == 1
        and weight.stride(0) % 2 == 0
        for weight in weights
    )
    return fits and native_ops() is not None
