"""Weights on their way from the trainer to a server's workers: rank 0's bytes into everyone's.

The trainer's rank 0 is rank 0 of the channel, the server's workers follow. Between CPUs they are
plain TCP connections to a port that the trainer opens; between GPUs it is vLLM's NCCL group for
weight transfer, whose ranks find each other by NCCL's unique id. Key and unique id go with the
trainer's authenticated request, and all waiting ends. Nothing that a peer sends is interpreted but
as weights: no pickle, and no torch store, whose gloo ends the process on a peer's broken address.
"""

import base64
import hmac
import secrets
import socket
import time
from collections.abc import Callable
from concurrent.futures import wait
from dataclasses import dataclass
from typing import Any

import torch

from care_train.rollout.engine import in_background

SENDER = 0
"""Rank of the trainer."""

KEY_BYTES = 64
"""The workers show the first half of a TCP channel's key, the trainer answers with the second."""

UNIQUE_ID_BYTES = 128

MEET_SECONDS = 30.0
"""The longest that a server's workers wait for a trainer that has called them."""

_GREETING_SECONDS = 2.0
"""The longest that the trainer listens to a stranger at its port."""

_MIN_BYTES_PER_SECOND = 16 << 20

Broadcast = Callable[[torch.Tensor], None]
"""Sends rank 0's tensor of bytes into that of every other rank; returns when it is there."""


@dataclass(frozen=True)
class TcpMeeting:
    """Where the trainer listens, and what it is known by."""

    host: str
    port: int
    key: bytes


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
    """Rank 0's part in a channel of so many ranks, who may take so many seconds to come."""


def backend_for(device: torch.device) -> str:
    """`nccl` on GPUs, `tcp` elsewhere."""
    return "nccl" if device.type == "cuda" else "tcp"


def invite(backend: str, host: str) -> Invitation:
    """The trainer's part, before its request.

    Args:
        backend: see `backend_for`.
        host: this machine's address, as the server sees it: no other is listened at.

    Raises:
        ValueError: NCCL without vLLM, by which it is called.
    """
    if backend == "nccl":
        unique_id = _new_unique_id()
        message = {"backend": backend, "unique_id": base64.b64encode(unique_id).decode()}
        return Invitation(message, lambda size, seconds: _nccl(unique_id, SENDER, size, seconds))
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening, key = socket.create_server((host, 0), family=family), secrets.token_bytes(KEY_BYTES)
    port = listening.getsockname()[1]
    message = {"backend": backend, "port": port, "key": base64.b64encode(key).decode()}
    return Invitation(message, lambda size, seconds: _sender(listening, key, size - 1, seconds))


def join(meeting: TcpMeeting | NcclMeeting, rank: int, size: int) -> Broadcast:
    """A worker's part; returns when the trainer has answered, after `MEET_SECONDS` at the latest.

    Raises:
        RuntimeError: it did not.
    """
    if isinstance(meeting, NcclMeeting):
        return _nccl(meeting.unique_id, rank, size, MEET_SECONDS)
    return _receiver(meeting)


def _sender(listening: socket.socket, key: bytes, num_workers: int, seconds: float) -> Broadcast:
    workers: list[socket.socket] = []
    end = time.monotonic() + seconds
    with listening:
        while len(workers) < num_workers:
            listening.settimeout(max(end - time.monotonic(), 0.001))
            try:
                connection = listening.accept()[0]
                if _greets(connection, key):
                    workers.append(connection)
                else:
                    connection.close()
            except TimeoutError:
                raise RuntimeError(
                    f"{len(workers)} of {num_workers} came in {seconds:g} s"
                ) from None

    def broadcast(tensor: torch.Tensor) -> None:
        content: Any = tensor.numpy()
        end = time.monotonic() + _transfer_seconds(tensor)
        for worker in workers:
            worker.settimeout(max(end - time.monotonic(), 0.001))
            try:
                worker.sendall(content)
            except OSError as error:
                raise RuntimeError(f"{tensor.nbytes} bytes could not be sent: {error}") from error

    return broadcast


def _greets(connection: socket.socket, key: bytes) -> bool:
    """Whether a worker that knows the key has connected; it then gets its answer."""
    half = KEY_BYTES // 2
    greeting = bytearray(half)
    try:
        _fill(connection, greeting, time.monotonic() + _GREETING_SECONDS)
        if not hmac.compare_digest(greeting, key[:half]):
            return False
        connection.sendall(key[half:])
    except OSError:
        return False
    return True


def _receiver(meeting: TcpMeeting) -> Broadcast:
    end, half = time.monotonic() + MEET_SECONDS, KEY_BYTES // 2
    answer = bytearray(half)
    try:
        trainer = socket.create_connection((meeting.host, meeting.port), MEET_SECONDS)
        trainer.sendall(meeting.key[:half])
        _fill(trainer, answer, end)
    except OSError as error:
        place = f"{meeting.host}:{meeting.port}"
        raise RuntimeError(
            f"no trainer to meet at {place} in {MEET_SECONDS:g} s: {error}"
        ) from None
    if not hmac.compare_digest(answer, meeting.key[half:]):
        raise RuntimeError(f"{meeting.host}:{meeting.port} is not the trainer that called")

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
    """Receive what fills a buffer of bytes, until `end`.

    Raises:
        OSError: it did not come, or the connection broke.
    """
    left = memoryview(buffer)
    while left:
        connection.settimeout(max(end - time.monotonic(), 0.001))
        count = connection.recv_into(left)
        if count == 0:
            raise ConnectionError("the other side closed the connection")
        left = left[count:]


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
    # vLLM's group that gets host and port instead unpickles what it finds there.
    from vllm.distributed.weight_transfer.nccl_common import (  # pyright: ignore[reportMissingImports]
        uid_init_process_group,
    )

    device = torch.cuda.current_device()
    # In a thread, which stays behind: NCCL waits for its ranks without an end.
    group = in_background(lambda: uid_init_process_group(unique_id, rank, size, device))
    if not wait([group], seconds).done:
        raise RuntimeError(f"no NCCL group of {size} ranks in {seconds:g} s")
    communicator: Any = group.result()

    def broadcast(tensor: torch.Tensor) -> None:
        stream = torch.cuda.current_stream()
        communicator.broadcast(tensor, src=SENDER, stream=stream)
        done = torch.cuda.Event()
        done.record(stream)
        seconds = _transfer_seconds(tensor)
        end = time.monotonic() + seconds
        # Not `synchronize`, which would wait without an end for a peer that is gone.
        while not done.query():
            if time.monotonic() > end:
                communicator.destroy()
                raise RuntimeError(f"{tensor.nbytes} bytes did not come in {seconds:.0f} s")
            time.sleep(0.0002)

    return broadcast


def _transfer_seconds(tensor: torch.Tensor) -> float:
    """What a broadcast may take: half a minute and 16 MiB a second."""
    return MEET_SECONDS + tensor.nbytes / _MIN_BYTES_PER_SECOND
