"""Weights on their way from the trainer to a server's workers: a broadcast in a group of their own.

The trainer's rank 0 is rank 0 of the group, the server's workers follow. On CPUs it is torch's gloo
group, whose ranks find each other in a store that the trainer opens; on GPUs an NCCL group, whose
ranks find each other by NCCL's unique id, which goes with the trainer's request as bytes. Neither
unpickles anything that a peer sends.
"""

import base64
import ipaddress
import socket
import time
from collections.abc import Callable
from concurrent.futures import wait
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from care_train.rollout.background import Value, in_background

SENDER = 0
"""Rank of the trainer."""

UNIQUE_ID_BYTES = 128

MEET_SECONDS = 30.0
"""The longest that a server's workers wait for a trainer that has called them."""

_MIN_BYTES_PER_SECOND = 16 << 20

Broadcast = Callable[[torch.Tensor], None]
"""Sends the tensor of rank 0 into that of every other rank; returns when it is there."""


@dataclass(frozen=True)
class GlooMeeting:
    """Where the trainer's store is."""

    host: str
    port: int


@dataclass(frozen=True)
class NcclMeeting:
    """NCCL's unique id, which the trainer made."""

    unique_id: bytes


@dataclass(frozen=True)
class Invitation:
    """A channel that waits for the workers."""

    message: dict[str, Any]
    """What they must know, in JSON's types."""
    open: Callable[[int, float], Broadcast]
    """Rank 0's part in a group of so many ranks, who may take so many seconds to come."""


def backend_for(device: torch.device) -> str:
    """`nccl` on GPUs, `gloo` elsewhere."""
    return "nccl" if device.type == "cuda" else "gloo"


def invite(backend: str, host: str) -> Invitation:
    """The trainer's part, before its request.

    Args:
        backend: see `backend_for`.
        host: this machine's address, as the server sees it: nothing listens at others.

    Raises:
        ValueError: NCCL without vLLM, whose library it is called by.
    """
    if backend == "nccl":
        unique_id = _new_unique_id()
        message = {"unique_id": base64.b64encode(unique_id).decode()}
        return Invitation(
            {"backend": backend} | message,
            lambda size, seconds: _nccl(unique_id, SENDER, size, seconds),
        )
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = socket.create_server((host, 0), family=family)
    port = listening.getsockname()[1]
    store = dist.TCPStore(
        host,
        port,
        is_master=True,
        timeout=timedelta(seconds=MEET_SECONDS),
        wait_for_workers=False,
        master_listen_fd=listening.detach(),
    )
    return Invitation(
        {"backend": backend, "port": port},
        lambda size, seconds: _gloo(store, host, SENDER, size, seconds),
    )


def join(meeting: GlooMeeting | NcclMeeting, rank: int, size: int) -> Broadcast:
    """A worker's part; returns when all are there, after `MEET_SECONDS` at the latest.

    Raises:
        RuntimeError: the trainer did not come in time.
    """
    if isinstance(meeting, NcclMeeting):
        return _nccl(meeting.unique_id, rank, size, MEET_SECONDS)

    def meet() -> Broadcast:
        timeout = timedelta(seconds=MEET_SECONDS)
        store = dist.TCPStore(meeting.host, meeting.port, timeout=timeout, wait_for_workers=False)
        return _gloo(store, meeting.host, rank, size, MEET_SECONDS)

    return _within(MEET_SECONDS, f"the trainer at {meeting.host}:{meeting.port}", meet)


def _gloo(store: dist.Store, host: str, rank: int, size: int, seconds: float) -> Broadcast:
    timeout = timedelta(seconds=seconds)
    if ipaddress.ip_address(host).is_loopback:
        # By default gloo listens at the address of this machine's name, for others to reach.
        options = dist.ProcessGroupGloo._Options()  # pyright: ignore[reportAttributeAccessIssue]
        options._timeout = timeout
        options._devices = [dist.ProcessGroupGloo.create_device(hostname=host)]
        group: Any = dist.ProcessGroupGloo(store, rank, size, options)
    else:
        group = dist.ProcessGroupGloo(store, rank, size, timeout)

    def broadcast(tensor: torch.Tensor) -> None:
        timeout = timedelta(seconds=_transfer_seconds(tensor))
        options = dist.BroadcastOptions()
        options.rootRank, options.rootTensor, options.timeout = SENDER, 0, timeout
        group.broadcast([tensor], options).wait(timeout)

    return broadcast


def _new_unique_id() -> bytes:
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


def _nccl(unique_id: bytes, rank: int, size: int, seconds: float) -> Broadcast:
    # The group of vLLM's that gets a host and a port instead unpickles what it finds there.
    from vllm.distributed.weight_transfer.nccl_common import (  # pyright: ignore[reportMissingImports]
        uid_init_process_group,
    )

    device = torch.cuda.current_device()
    communicator: Any = _within(
        seconds,
        "the others of the NCCL group",
        lambda: uid_init_process_group(unique_id, rank, size, device),
    )

    def broadcast(tensor: torch.Tensor) -> None:
        stream = torch.cuda.current_stream()
        communicator.broadcast(tensor, src=SENDER, stream=stream)
        done = torch.cuda.Event()
        done.record(stream)
        end = time.monotonic() + _transfer_seconds(tensor)
        # Not `synchronize`, which would wait for ever for a peer that is gone.
        while not done.query():
            if time.monotonic() > end:
                communicator.destroy()
                raise RuntimeError(
                    f"{tensor.nbytes} bytes were not there after {_transfer_seconds(tensor):.0f} s"
                )
            time.sleep(0.0002)

    return broadcast


def _transfer_seconds(tensor: torch.Tensor) -> float:
    """What a broadcast may take: half a minute and 16 MiB a second."""
    return MEET_SECONDS + tensor.nbytes / _MIN_BYTES_PER_SECOND


def _within(seconds: float, who: str, work: Callable[[], Value]) -> Value:
    """What `work` gives, in a thread: torch's store and NCCL wait for ever for a peer that accepts
    a connection and is silent. The thread then stays until the peer closes it.

    Raises:
        RuntimeError: it took longer.
    """
    result = in_background(work)
    if not wait([result], seconds).done:
        raise RuntimeError(f"{who} did not come in {seconds:g} s")
    return result.result()
