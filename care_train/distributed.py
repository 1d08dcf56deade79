"""The process group: one process by default, several under the deepspeed or torchrun launcher."""

import os
import socket
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

Value = TypeVar("Value")

_LAUNCHER_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


_store: dist.Store | None = None


def initialize_process_group(
    start_seconds: float = 600.0, collective_seconds: float = 1800.0
) -> torch.device:
    """Join the launcher's group, or make a group of one; returns this process's device.

    Args:
        start_seconds: how long ranks may take to find each other.
        collective_seconds: how long one collective may take.

    Raises:
        ValueError: not all ranks came.
    """
    global _store
    has_gpu = torch.cuda.is_available()
    if "RANK" not in os.environ:
        os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if has_gpu else torch.device("cpu")
    if has_gpu:
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        _store, own, size = _rendezvous(start_seconds)
        dist.init_process_group(
            "nccl" if has_gpu else "gloo",
            store=_store,
            rank=own,
            world_size=size,
            timeout=timedelta(seconds=collective_seconds),
        )
    return device


def _rendezvous(seconds: float) -> tuple[dist.Store, int, int]:
    try:
        store, own, size = next(dist.rendezvous("env://", timeout=timedelta(seconds=seconds)))
    except dist.DistError as error:
        ranks, place = os.environ["WORLD_SIZE"], "{MASTER_ADDR}:{MASTER_PORT}".format(**os.environ)
        raise ValueError(
            f"rank {os.environ['RANK']}: not all of {ranks} ranks came to {place} within "
            f"limits.start = {seconds:g} s: look at the first error of the others ({error})"
        ) from error
    return store, own, size


def ranks_store() -> tuple[dist.Store, int, int] | None:
    """The group's store for use in another thread, this rank and how many; None for one rank."""
    if _store is None or world_size() == 1:
        return None
    store = _store.clone()
    store.set_timeout(timedelta(seconds=30))
    return dist.PrefixStore("care", store), rank(), world_size()


def own_environment() -> dict[str, str]:
    """This process's environment for a child that is a run of its own: without its group."""
    return {key: value for key, value in os.environ.items() if key not in _LAUNCHER_VARIABLES}


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    """Whether this process writes files and prints."""
    return rank() == 0


def barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


def gather(value: Value) -> list[Value]:
    """Every rank's value, in the order of ranks, on every rank; any picklable object."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def of_first_rank(value: Value) -> Value:
    """Rank 0's value, on every rank; any picklable object."""
    if world_size() == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]


def all_sum(values: list[float], device: torch.device) -> list[float]:
    """Element-wise sums over all ranks."""
    return _reduce(values, dist.ReduceOp.SUM, device)


def all_max(value: int, device: torch.device) -> int:
    """The largest over all ranks."""
    return int(_reduce([float(value)], dist.ReduceOp.MAX, device)[0])


def _reduce(
    values: list[float], operation: dist.ReduceOp.RedOpType, device: torch.device
) -> list[float]:
    if world_size() == 1:
        return values
    tensor = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(tensor, operation)
    return tensor.tolist()


def free_port() -> int:
    """A port that nothing on this machine listens at."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]
