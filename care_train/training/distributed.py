"""The process group: one process by default, several under the deepspeed or torchrun launcher."""

import os
import socket
from typing import Any, TypeVar

import torch
import torch.distributed as dist

Value = TypeVar("Value")

_LAUNCHER_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def initialize_process_group() -> torch.device:
    """Join the launcher's group, or make a group of one; returns this process's device."""
    has_gpu = torch.cuda.is_available()
    if "RANK" not in os.environ:
        os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if has_gpu else torch.device("cpu")
    if has_gpu:
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        dist.init_process_group("nccl" if has_gpu else "gloo")
    return device


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


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
