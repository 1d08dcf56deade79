"""Weights on their way from the trainer to a server's workers: a broadcast in a group of their own.

The trainer's rank 0 is rank 0 of the group, the server's workers follow. On GPUs it is vLLM's own
NCCL group for weight transfer; on CPUs torch's gloo.
"""

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

SENDER = 0
"""Rank of the trainer."""

Broadcast = Callable[[torch.Tensor], None]
"""Sends the tensor of rank 0 into that of every other rank; returns when it is there."""


def backend_for(device: torch.device) -> str:
    """`nccl` on GPUs, `gloo` elsewhere."""
    return "nccl" if device.type == "cuda" else "gloo"


def open_channel(
    backend: str, host: str, port: int, rank: int, size: int, timeout: float
) -> Broadcast:
    """Meet the others at rank 0's address; returns when all are there.

    Args:
        backend: of all ranks, see `backend_for`.
        host: where rank 0 is.
        port: a free one there.
        rank: this process's.
        size: how many there are.
        timeout: seconds to wait for the others, here and at every broadcast.

    Raises:
        ValueError: NCCL without vLLM, whose group it is.
        RuntimeError: the others did not come in time.
    """
    if backend == "nccl":
        return _nccl(host, port, rank, size)
    return _gloo(host, port, rank, size, timedelta(seconds=timeout))


def _gloo(host: str, port: int, rank: int, size: int, timeout: timedelta) -> Broadcast:
    store = dist.TCPStore(host, port, size, rank == SENDER, timeout, wait_for_workers=False)
    group: Any = dist.ProcessGroupGloo(store, rank, size, timeout)

    def broadcast(tensor: torch.Tensor) -> None:
        options = dist.BroadcastOptions()
        options.rootRank, options.rootTensor = SENDER, 0
        group.broadcast([tensor], options).wait(timeout)

    return broadcast


def _nccl(host: str, port: int, rank: int, size: int) -> Broadcast:
    try:
        from vllm.distributed.weight_transfer.nccl_common import (  # pyright: ignore[reportMissingImports]
            stateless_init_process_group,
        )
    except ModuleNotFoundError as error:
        if error.name != "vllm":
            raise
        raise ValueError(
            "rollout.vllm.server: on GPUs weights go through vLLM's NCCL group, and vLLM is not "
            "installed here; `pip install care-rl[vllm]`"
        ) from None
    device = torch.cuda.current_device()
    communicator: Any = stateless_init_process_group(host, port, rank, size, device)

    def broadcast(tensor: torch.Tensor) -> None:
        stream = torch.cuda.current_stream()
        communicator.broadcast(tensor, src=SENDER, stream=stream)
        stream.synchronize()

    return broadcast
