"""Weights from the trainer into vLLM's model: what is sent, and the checksum that goes with it.

Each tensor is loaded into the live model by vLLM's own loaders, which know its names and fused
parameters (qkv_proj, gate_up_proj). `vllm_worker.py` is the receiving side; after every sync it
compares what vLLM then holds with the checksums made here (`weight_check.py`).
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from pydantic import Field

from care_train.rollout.errors import RolloutError

BUCKET_BYTES = 512 << 20
"""Weights gathered and sent at once; a larger parameter goes alone."""

_CHUNK = 1 << 22
_MIX = -7046029254386353131  # 2^64 / golden ratio, as a signed integer
_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_ADAPTER_ENDS = (".lora_A.weight", ".lora_B.weight")


@dataclass(frozen=True)
class SentTensor:
    """What the receiver must know of a tensor; the bounds hold where it comes in a message."""

    name: Annotated[str, Field(min_length=1, max_length=500)]
    dtype: Literal["float32", "bfloat16", "float16"]
    shape: Annotated[tuple[Annotated[int, Field(ge=0, lt=1 << 40)], ...], Field(max_length=8)]
    checksum: Annotated[int, Field(ge=-(1 << 63), lt=1 << 63)]

    @property
    def num_bytes(self) -> int:
        return torch.Size(self.shape).numel() * getattr(torch, self.dtype).itemsize

    @property
    def is_adapter(self) -> bool:
        """Whether it is half of a LoRA adapter rather than a weight of the model."""
        return self.name.endswith(_ADAPTER_ENDS)


def described(
    weights: Iterable[tuple[str, torch.Tensor]], dtype: torch.dtype
) -> Iterator[tuple[SentTensor, torch.Tensor]]:
    """Each tensor in the precision vLLM holds, with its description.

    Args:
        weights: Hugging Face names and whole tensors, each valid until the next is asked for.
        dtype: the precision.
    """
    kind: Any = str(dtype).removeprefix("torch.")
    for name, tensor in weights:
        whole = tensor.detach().to(dtype).contiguous()
        yield SentTensor(name, kind, tuple(whole.shape), checksum(whole)), whole


def buckets(
    weights: Iterable[tuple[SentTensor, torch.Tensor]], bucket_bytes: int
) -> Iterator[tuple[list[SentTensor], torch.Tensor]]:
    """Tensors packed one after the other, without alignment.

    Args:
        weights: from `described`.
        bucket_bytes: a bucket is no larger, unless one tensor alone is.

    Yields:
        The descriptions of a bucket's tensors, and their bytes: uint8 [size].
    """
    sent: list[SentTensor] = []
    parts: list[torch.Tensor] = []
    for description, tensor in weights:
        size = sum(part.numel() for part in parts)
        if parts and size + description.num_bytes > bucket_bytes:
            yield sent, torch.cat(parts)
            sent, parts = [], []
        sent.append(description)
        # A copy: the tensor is not valid any longer when the next one is asked for.
        parts.append(tensor.reshape(-1).view(torch.uint8).clone())
    if parts:
        yield sent, torch.cat(parts)


def send_weights(llm: Any, weights: Iterable[tuple[str, torch.Tensor]], dtype: torch.dtype) -> int:
    """Fill and check the model of a vLLM in this process; returns the number of bytes sent.

    Args:
        llm: vLLM's `LLM`, whose worker has `WeightReceiver`.
        weights: Hugging Face names and whole tensors.
        dtype: the precision vLLM holds them in.

    Raises:
        RolloutError: a tensor vLLM does not take, a parameter that none filled, or one that holds
            other numbers than were sent; named in the message.
    """
    num_bytes = 0
    llm.collective_rpc("care_begin")
    for description, tensor in described(weights, dtype):
        check_sync(llm.collective_rpc("care_load", args=(description, tensor)))
        num_bytes += description.num_bytes
    finish_sync(llm)
    return num_bytes


def check_sync(problems: Iterable[str | None]) -> None:
    """Raise the first of the workers' problems.

    Raises:
        RolloutError: there is one.
    """
    for problem in problems:
        if problem is not None:
            raise RolloutError(f"weight sync: {problem}")


def finish_sync(llm: Any) -> None:
    """After the last tensor: check what the workers hold, and drop all that was computed with the
    old weights.

    Raises:
        RolloutError: see `send_weights`.
    """
    for failures in llm.collective_rpc("care_failures"):
        check_sync(failures)
    # All three caches belong together: vLLM skips the encoder for an image that its image cache
    # knows, although the encoder's output may be gone.
    if not llm.reset_prefix_cache():
        raise RolloutError("weight sync: vLLM could not reset its prefix cache: requests still run")
    llm.llm_engine.reset_mm_cache()
    llm.llm_engine.reset_encoder_cache()


def checksum(
    tensor: torch.Tensor, *, first_row: int = 0, first_column: int = 0, columns: int | None = None
) -> int:
    """Sum over elements of bits x (a pseudo-random odd number of the position), modulo 2^64.

    It is exact and does not depend on the order of summation or the device. One changed element
    always changes it. The checksums of a tensor's pieces add up to the tensor's (`add_checksums`).

    Args:
        tensor: [rows, ...]: a tensor, or a piece of one.
        first_row: where the piece starts.
        first_column: where the piece's rows start, in elements.
        columns: elements per row of the whole tensor. None: the piece has whole rows.
    """
    rows = tensor.shape[0] if tensor.ndim else 1
    if not tensor.numel():
        return 0
    flat = tensor.detach().reshape(rows, -1)
    words = flat.contiguous().view(_WORDS[tensor.element_size()])
    width = words.shape[1]
    columns = width if columns is None else columns
    step = max(1, _CHUNK // width)
    column = torch.arange(width, device=tensor.device) + first_column
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for start in range(0, rows, step):
        part = words[start : start + step].long()
        row = torch.arange(start, start + len(part), device=tensor.device) + first_row
        factor = (row[:, None] * columns + column).mul_(_MIX)
        factor.bitwise_xor_(factor >> 29).mul_(_MIX).bitwise_or_(1)
        total += factor.mul_(part).sum()
    return int(total)


def add_checksums(checksums: Iterable[int]) -> int:
    """The sum as a signed 64-bit number, which is how `checksum` counts."""
    return (sum(checksums) + (1 << 63)) % (1 << 64) - (1 << 63)
