"""Run a function on several gloo ranks; the parent compares what they return."""

import datetime
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

NUM_RANKS = 2


def on_ranks(function: Callable[..., Any], folder: Path, *args: Any) -> list[Any]:
    """`function(*args)` on every rank, in processes of their own; the results in rank order.

    Args:
        function: at a module's top level; it returns what `torch.save` can write.
        folder: an empty one, for the ranks to meet in and leave their results.
        args: what pickles.

    Raises:
        ProcessRaisedException: a rank failed, with its traceback; the others are ended.
    """
    mp.spawn(_rank, args=(function, folder, args), nprocs=NUM_RANKS, daemon=True)
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
