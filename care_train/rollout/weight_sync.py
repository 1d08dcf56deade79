"""Weights from the trainer into vLLM's model: what is sent, and the proof that vLLM holds it.

Each tensor is loaded into the live model by vLLM's own loaders, which know its names, fused
parameters (qkv_proj, gate_up_proj) and the shares of tensor-parallel ranks. What they copy tells
where each part of a tensor has to be. After every sync the checksums of those places, over all
ranks, must add up to the one taken before the tensor left, and no parameter may have been left out.
`vllm_worker.py` is the receiving side.

A server's weights come in the requests between CPUs, and between GPUs through vLLM's NCCL group for
weight transfer, whose rank 0 is the trainer's. Its ranks find each other by NCCL's unique id, which
travels in the trainer's authenticated request. What a peer sends is used as weights and nothing
else: nothing is unpickled. Every wait has a time limit.
"""

import os
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import wait
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from pydantic import Field

from care_train.rollout.engine import in_background
from care_train.rollout.errors import RolloutError

BUCKET_BYTES = 512 << 20
"""Weights gathered and sent at once; a larger parameter goes alone."""

MEET_SECONDS = 30.0
"""How long a server's workers wait for the trainer that called them."""

_MIN_BYTES_PER_SECOND = 16 << 20

_NO_NCCL = "VLLM_DISABLE_PYNCCL"

Broadcast = Callable[[torch.Tensor], None]
"""Sends rank 0's uint8 tensor into that of every other rank; returns when it is there.

Raises `RuntimeError` if that takes more than 30 s and 1 s for every 16 MiB.
"""

ADAPTER_ID = 1
"""The number by which vLLM knows the policy's adapter."""

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

    `weights` are Hugging Face names and whole tensors, each valid until the next is asked for.
    """
    kind: Any = str(dtype).removeprefix("torch.")
    for name, tensor in weights:
        whole = tensor.detach().to(dtype).contiguous()
        yield SentTensor(name, kind, tuple(whole.shape), checksum(whole)), whole


def buckets(
    weights: Iterable[tuple[SentTensor, torch.Tensor]], bucket_bytes: int
) -> Iterator[tuple[list[SentTensor], torch.Tensor]]:
    """Descriptions and bytes (uint8 [size]) of tensors from `described`, packed without alignment.

    A bucket is no larger than `bucket_bytes`, unless one tensor alone is.
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
    """Fill and check the model of a vLLM in this process, which holds `dtype`; the bytes sent.

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
    """Raise the first of the workers' problems, if there is one, as a `RolloutError`."""
    for problem in problems:
        if problem is not None:
            raise RolloutError(f"weight sync: {problem}")


def finish_sync(llm: Any) -> None:
    """After the last tensor: check what the workers hold, and drop all that was computed with the
    old weights.

    Raises:
        RolloutError: see `send_weights`.
    """
    check_sync(llm.collective_rpc("care_failure"))
    # All three caches belong together: vLLM skips the encoder for an image that its image cache
    # knows, although the encoder's output may be gone.
    if not llm.reset_prefix_cache():
        raise RolloutError("weight sync: vLLM could not reset its prefix cache: requests still run")
    llm.llm_engine.reset_mm_cache()
    llm.llm_engine.reset_encoder_cache()


def checksum(tensor: torch.Tensor, offset: int = 0, strides: Sequence[int] | None = None) -> int:
    """Sum over elements of bits x (a pseudo-random odd number of the position), modulo 2^64 and
    signed.

    It is exact and does not depend on the order of summation or the device. One changed element
    always changes it. The checksums of a tensor's pieces add up to the tensor's.

    Args:
        tensor: a tensor, or a piece of one.
        offset: the position of the piece's first element in the whole tensor, in elements.
        strides: from one element of the piece to the next in the whole tensor, per dimension. None:
            the tensor is whole.
    """
    if not tensor.numel():
        return 0
    strides = tensor.contiguous().stride() if strides is None else strides
    if not tensor.ndim:
        tensor, strides = tensor[None], (1,)
    device = tensor.device
    inner = torch.zeros(1, dtype=torch.int64, device=device)
    for size, stride in zip(tensor.shape[1:], strides[1:], strict=True):
        inner = (inner[:, None] + torch.arange(size, device=device) * stride).reshape(-1)
    total = torch.zeros((), dtype=torch.int64, device=device)
    step = max(1, _CHUNK // len(inner))
    for start in range(0, len(tensor), step):
        part = tensor[start : start + step].detach()
        words = part.reshape(len(part), -1).contiguous().view(_WORDS[part.element_size()])
        row = torch.arange(start, start + len(part), device=device) * strides[0] + offset
        factor = (row[:, None] + inner).mul_(_MIX)
        factor.bitwise_xor_(factor >> 29).mul_(_MIX).bitwise_or_(1)
        total += factor.mul_(words.long()).sum()
    return int(total)


def backend_for(device: torch.device) -> str:
    """By what a server's weights come: `nccl` on GPUs, elsewhere `http`, in the requests.

    Raises:
        ValueError: vLLM is told to use no NCCL.
    """
    if device.type != "cuda":
        return "http"
    if (value := os.environ.get(_NO_NCCL, "")).lower() in ("1", "true"):
        raise ValueError(
            f"{_NO_NCCL}: got {value}, wanted it unset: weights go to a server's GPUs through "
            "vLLM's NCCL group"
        )
    return "nccl"


def new_unique_id() -> bytes:
    """NCCL's name for a new group.

    Raises:
        ValueError: vLLM, through which NCCL is called, is not installed.
    """
    try:
        from vllm.distributed.device_communicators.pynccl_wrapper import (  # pyright: ignore[reportMissingImports]
            NCCLLibrary,
        )
        from vllm.utils.nccl import unpinned_nccl_env  # pyright: ignore[reportMissingImports]
    except ModuleNotFoundError as error:
        if error.name != "vllm":
            raise
        raise ValueError(
            "rollout.vllm.server: on GPUs weights go through vLLM's NCCL group, and vLLM is not "
            "installed here; `pip install care-rl[vllm]`"
        ) from None
    with unpinned_nccl_env():
        return bytes(NCCLLibrary().ncclGetUniqueId().internal)


def join_group(unique_id: bytes, rank: int, size: int, seconds: float) -> Broadcast:
    """One rank's part; rank 0 is the trainer.

    Raises:
        RuntimeError: the others did not come in time.
    """
    # Not the group that takes host and port: it unpickles what it finds there.
    from vllm.distributed.weight_transfer.nccl_common import (  # pyright: ignore[reportMissingImports]
        uid_init_process_group,
    )

    device = torch.cuda.current_device()

    def connected() -> Any:
        torch.cuda.set_device(device)  # A new thread has the first.
        group = uid_init_process_group(unique_id, rank, size, device)
        # NCCL connects its ranks within the call of the first broadcast, and waits there without a
        # time limit for a peer that does not come.
        first = torch.zeros(1, dtype=torch.uint8, device=group.device)
        group.broadcast(first, src=0)
        first.item()
        return group

    # In a thread that is left behind at the time limit: NCCL itself waits for its ranks for ever.
    group = in_background(connected)
    if not wait([group], seconds).done:
        raise RuntimeError(f"no NCCL group of {size} ranks in {seconds:g} s")
    communicator: Any = group.result()

    def broadcast(tensor: torch.Tensor) -> None:
        stream = torch.cuda.current_stream()
        communicator.broadcast(tensor, src=0, stream=stream)
        done = torch.cuda.Event()
        done.record(stream)
        seconds = MEET_SECONDS + tensor.nbytes / _MIN_BYTES_PER_SECOND
        end = time.monotonic() + seconds
        # Not `synchronize`, which would wait for ever for a peer that is gone.
        while not done.query():
            if time.monotonic() > end:
                communicator.destroy()
                raise RuntimeError(f"{tensor.nbytes} bytes did not come in {seconds:.0f} s")
            time.sleep(0.0002)

    # A group keeps its memory on the GPU until it is destroyed. Not at the interpreter's end, when
    # no thread can be started any more, as vLLM does for it.
    weakref.finalize(broadcast, communicator.destroy).atexit = False
    return broadcast
