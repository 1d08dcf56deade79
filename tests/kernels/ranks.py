"""Run functions in processes of their own: a few alone, or one on several gloo ranks.

Forked from a process that has imported torch, and where the trainer is installed what its runs
need: that takes longer than most functions do.
"""

import datetime
import multiprocessing
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

NUM_RANKS = 2


def _preload() -> Any:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.train.warm", "torch"])
    return context


def in_processes(function: Callable[[Any], Any], *arguments: Any) -> list[Any]:
    """`function(argument)` for each argument, at the same time and in a process of its own."""
    context = _preload()
    with ExitStack() as stack:
        pools = [stack.enter_context(ProcessPoolExecutor(1, context)) for _ in arguments]
        calls = zip(pools, arguments, strict=True)
        futures = [pool.submit(function, argument) for pool, argument in calls]
        return [future.result(200) for future in futures]


def on_ranks(function: Callable[..., Any], folder: Path, *args: Any) -> list[Any]:
    """`function(*args)` on every rank, in processes of their own; the results in rank order.

    Args:
        function: at a module's top level; it returns what `torch.save` can write.
        folder: an empty one, for the ranks to meet in and leave their results.
        args: what pickles.

    Raises:
        ProcessRaisedException: a rank failed, with its traceback; the others are ended.
    """
    _preload()
    mp.start_processes(
        _rank, (function, folder, args), NUM_RANKS, daemon=True, start_method="forkserver"
    )
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(NUM_RANKS)]


def _rank(rank: int, function: Callable[..., Any], folder: Path, args: tuple[Any, ...]) -> None:
    # What launchers set; DeepSpeed looks for it.
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(NUM_RANKS)}
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/meeting",
        rank=rank,
        world_size=NUM_RANKS,
        timeout=datetime.timedelta(seconds=60),
    )
    result = function(*args)
    dist.barrier()
    dist.destroy_process_group()
    torch.save(result, folder / f"rank{rank}.pt")
