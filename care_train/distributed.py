"""The process group: one process by default, several under the deepspeed or torchrun launcher.

Where all ranks are on one machine they listen on its loopback interface alone; a run of one process
has no store that anything could connect to. Across machines the ranks listen on the network, and
trust each other: it must be a network of their own (docs/security.md).
"""

import functools
import itertools
import os
import socket
import weakref
from collections.abc import Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from care_train.compat import set_default_timeout

Value = TypeVar("Value")

_LAUNCHER_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_LOOPBACK = "127.0.0.1"

_store: dist.Store = dist.HashStore()
_runs = itertools.count()

_START = timedelta(minutes=10)
"""How long ranks may take to find each other."""


def initialize_process_group(collective_seconds: float = 1800.0) -> torch.device:
    """Join the launcher's group, or make a group of one, in which a collective may take so long;
    returns this process's device.

    Raises:
        ValueError: not all ranks came, or this one has no GPU of its own.
    """
    global _store
    has_gpu = torch.cuda.is_available()
    if "RANK" not in os.environ:
        os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
        os.environ |= {"MASTER_ADDR": _LOOPBACK, "MASTER_PORT": str(free_port())}
    local, device = int(os.environ["LOCAL_RANK"]), torch.device("cpu")
    if has_gpu:
        if local >= (count := torch.cuda.device_count()):
            raise ValueError(
                f"LOCAL_RANK: got {local}, wanted less than {count}, the GPUs that this rank sees: "
                "start one rank per GPU, each of which sees all GPUs of its node"
            )
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        timeout = timedelta(seconds=collective_seconds)
        set_default_timeout(timeout)
        if _ranks_share_machine():
            os.environ.setdefault("GLOO_SOCKET_IFNAME", _loopback_interface())
        _store = _rendezvous(_START)
        dist.init_process_group(
            "nccl" if has_gpu else "gloo",
            store=_store,
            rank=int(os.environ["RANK"]),
            world_size=int(os.environ["WORLD_SIZE"]),
            timeout=timeout,
        )
        _at_exit()
    return device


def leave_process_group() -> None:
    """Destroy this process's group, if it has one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def leave_at_exit() -> None:
    """Destroy this process's group when the interpreter ends.

    Left to the interpreter, the group's threads are torn down in any order, which can end the
    process with SIGABRT.
    """
    _at_exit().atexit = True


@functools.cache
def _at_exit() -> weakref.finalize:
    # Made with the group: finalizers run in reverse order, so those of engines that use the group
    # (vLLM's) run first.
    finalizer = weakref.finalize(dist, leave_process_group)
    finalizer.atexit = False
    return finalizer


def _ranks_share_machine() -> bool:
    """Whether the launcher started all ranks on this machine."""
    size = os.environ["WORLD_SIZE"]
    # torchrun's name for it, and DeepSpeed's.
    local = os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE")
    return size in ("1", local) or os.environ["MASTER_ADDR"] in (_LOOPBACK, "localhost", "::1")


def _loopback_interface() -> str:
    return next(name for _, name in socket.if_nameindex() if name.startswith("lo"))


def _rendezvous(timeout: timedelta) -> dist.Store:
    """The store at which the ranks meet."""
    own, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if size == 1:
        return dist.HashStore()
    # torchrun's agent has a store already, and listens as it sees fit.
    is_agents = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    try:
        if is_agents or not _ranks_share_machine():
            return next(dist.rendezvous("env://", timeout=timeout))[0]
        port = int(os.environ["MASTER_PORT"])
        listener = _listen(port) if own == 0 else None
        return dist.TCPStore(
            *(_LOOPBACK, port, size, own == 0, timeout),
            multi_tenant=True,
            master_listen_fd=listener,
        )
    except dist.DistError as error:
        place = "{MASTER_ADDR}:{MASTER_PORT}".format(**os.environ)
        raise ValueError(
            f"rank {own}: not all of {size} ranks came to {place} within "
            f"{timeout.total_seconds():g} s: look at the first error of the others ({error})"
        ) from error


def _listen(port: int) -> int:
    """A socket on the loopback interface, as a file descriptor: a TCPStore of its own making would
    listen on all interfaces."""
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((_LOOPBACK, port))
    except OSError as error:
        raise ValueError(f"MASTER_PORT: got {port}, wanted a free port: {error}") from error
    listener.listen()
    return listener.detach()


def ranks_store() -> dist.Store:
    """The group's store for one run, and for use in another thread.

    A process may make several runs. Each has keys of its own, so that none finds an earlier one's
    error; all ranks call this equally often.
    """
    store = _store.clone()
    store.set_timeout(timedelta(seconds=30))
    return dist.PrefixStore(f"care/{next(_runs)}", store)


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


def own_share(items: Sequence[Value]) -> Sequence[Value]:
    """This rank's part of what all ranks have: every world_size-th item."""
    return items[rank() :: world_size()]


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
