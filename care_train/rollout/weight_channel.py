"""The bytes of a weight sync on their way from the trainer's rank 0 to a server's workers.

Rank 0 of the channel is the trainer's rank 0, the server's workers are the others. Between CPUs
they are TCP connections to a port that the trainer opens; between GPUs vLLM's NCCL group for weight
transfer, whose ranks find each other by NCCL's unique id. The TCP key and the unique id travel in
the trainer's authenticated request, and every wait has a time limit.

What a peer sends is used as weights and nothing else. There is no pickle, and no torch store: its
gloo ends the process when a peer announces a broken address.
"""

import hmac
import os
import secrets
import socket
import time
import weakref
from collections.abc import Callable
from concurrent.futures import wait
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from pydantic import Field

from care_train.rollout.engine import in_background

_SENDER = 0
"""Rank of the trainer."""

_HALF = 32
"""Bytes of half a TCP key: a worker shows the first half, the trainer answers with the second."""

MEET_SECONDS = 30.0
"""How long a server's workers wait for the trainer that called them."""

_GREETING_SECONDS = 2.0
"""How long the trainer listens to someone who connects to its port and may be a stranger."""

_MIN_BYTES_PER_SECOND = 16 << 20

_NO_NCCL = "VLLM_DISABLE_PYNCCL"

Broadcast = Callable[[torch.Tensor], None]
"""Sends rank 0's uint8 tensor into that of every other rank; returns when it is there.

Raises `RuntimeError` if that takes more than 30 s and 1 s for every 16 MiB.
"""


@dataclass(frozen=True)
class TcpCall:
    """What the trainer tells the workers of a TCP channel; they connect to where it called from."""

    port: Annotated[int, Field(ge=1, le=65535)]
    key: Annotated[bytes, Field(min_length=2 * _HALF, max_length=2 * _HALF)]
    backend: Literal["tcp"] = "tcp"


@dataclass(frozen=True)
class NcclCall:
    """What the trainer tells the workers of an NCCL group."""

    unique_id: Annotated[bytes, Field(min_length=128, max_length=128)]
    backend: Literal["nccl"] = "nccl"


Call = TcpCall | NcclCall
Meet = Callable[[int, float], Broadcast]
"""Rank 0's part: takes the number of ranks and the seconds they may take to come."""


def backend_for(device: torch.device) -> str:
    """`nccl` on GPUs, `tcp` elsewhere.

    Raises:
        ValueError: vLLM is told to use no NCCL.
    """
    if device.type != "cuda":
        return "tcp"
    if (value := os.environ.get(_NO_NCCL, "")).lower() in ("1", "true"):
        raise ValueError(
            f"{_NO_NCCL}: got {value}, wanted it unset: weights go to a server's GPUs through "
            "vLLM's NCCL group"
        )
    return "nccl"


def invite(backend: str, host: str) -> tuple[Call, Meet]:
    """What the trainer's request tells the workers, and how it then meets them.

    `host` is this machine's address as the server sees it; no other one is listened at.

    Raises:
        ValueError: NCCL without vLLM, through which NCCL is called.
    """
    if backend == "nccl":
        unique_id = _new_unique_id()
        return NcclCall(unique_id), lambda size, seconds: _nccl(unique_id, _SENDER, size, seconds)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = socket.create_server((host, 0), family=family)
    key = secrets.token_bytes(2 * _HALF)
    call = TcpCall(listening.getsockname()[1], key)
    return call, lambda size, seconds: _sender(listening, key, size - 1, seconds)


def join(call: Call, host: str, rank: int, size: int) -> Broadcast:
    """The part of worker `rank`, from 1; returns when the trainer, who called from `host`, has
    answered.

    Raises:
        RuntimeError: it did not within `MEET_SECONDS`.
    """
    if isinstance(call, NcclCall):
        return _nccl(call.unique_id, rank, size, MEET_SECONDS)
    return _receiver(host, call)


def _sender(listening: socket.socket, key: bytes, num_workers: int, seconds: float) -> Broadcast:
    workers: list[socket.socket] = []
    end = time.monotonic() + seconds
    with listening:
        while len(workers) < num_workers:
            listening.settimeout(_left(end))
            try:
                connection = listening.accept()[0]
            except TimeoutError:
                raise RuntimeError(
                    f"{len(workers)} of {num_workers} came in {seconds:g} s"
                ) from None
            if _knows_key(connection, key):
                workers.append(connection)
            else:
                connection.close()

    def broadcast(tensor: torch.Tensor) -> None:
        content: Any = tensor.cpu().numpy()
        end = time.monotonic() + _transfer_seconds(tensor)
        for worker in workers:
            worker.settimeout(_left(end))
            try:
                worker.sendall(content)
            except OSError as error:
                raise RuntimeError(f"{tensor.nbytes} bytes could not be sent: {error}") from error

    return broadcast


def _knows_key(connection: socket.socket, key: bytes) -> bool:
    """Whether whoever connected shows the key's first half; the second is then sent."""
    greeting = bytearray(_HALF)
    try:
        _fill(connection, greeting, time.monotonic() + _GREETING_SECONDS)
        if not hmac.compare_digest(greeting, key[:_HALF]):
            return False
        connection.sendall(key[_HALF:])
    except OSError:
        return False
    return True


def _receiver(host: str, call: TcpCall) -> Broadcast:
    end, answer = time.monotonic() + MEET_SECONDS, bytearray(_HALF)
    place = f"{host}:{call.port}"
    try:
        trainer = socket.create_connection((host, call.port), MEET_SECONDS)
        trainer.sendall(call.key[:_HALF])
        _fill(trainer, answer, end)
    except OSError as error:
        raise RuntimeError(
            f"no trainer to meet at {place} in {MEET_SECONDS:g} s: {error}"
        ) from None
    if not hmac.compare_digest(answer, call.key[_HALF:]):
        raise RuntimeError(f"{place} is not the trainer that called")

    def broadcast(tensor: torch.Tensor) -> None:
        seconds = _transfer_seconds(tensor)
        try:
            _fill(trainer, tensor.numpy(), time.monotonic() + seconds)
        except OSError as error:
            raise RuntimeError(
                f"{tensor.nbytes} bytes did not come in {seconds:.0f} s: {error}"
            ) from None

    return broadcast


def _fill(connection: socket.socket, buffer: Any, end: float) -> None:
    """Receive exactly as many bytes as `buffer` takes; `OSError` if they are not there at `end`."""
    rest = memoryview(buffer)
    while rest:
        connection.settimeout(_left(end))
        count = connection.recv_into(rest)
        if count == 0:
            raise ConnectionError("the other side closed the connection")
        rest = rest[count:]


def _left(end: float) -> float:
    """Seconds until `end`; never 0, which would mean no time limit."""
    return max(end - time.monotonic(), 0.001)


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
        group.broadcast(first, src=_SENDER)
        first.item()
        return group

    # In a thread that is left behind at the time limit: NCCL itself waits for its ranks for ever.
    group = in_background(connected)
    if not wait([group], seconds).done:
        raise RuntimeError(f"no NCCL group of {size} ranks in {seconds:g} s")
    communicator: Any = group.result()

    def broadcast(tensor: torch.Tensor) -> None:
        stream = torch.cuda.current_stream()
        communicator.broadcast(tensor, src=_SENDER, stream=stream)
        done = torch.cuda.Event()
        done.record(stream)
        seconds = _transfer_seconds(tensor)
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


def _transfer_seconds(tensor: torch.Tensor) -> float:
    return MEET_SECONDS + tensor.nbytes / _MIN_BYTES_PER_SECOND
