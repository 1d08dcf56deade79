"""Run a function on several gloo ranks; the parent compares what they return."""

import datetime
import os
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

NUM_RANKS = 2
TIMEOUT_SECONDS = 180.0


def on_ranks(function: Callable[..., Any], folder: Path, *args: Any) -> list[Any]:
    """`function(*args)` on every rank, in processes of their own; the results in rank order.

    Args:
        function: at a module's top level; it returns what `torch.save` can write.
        folder: an empty one, for the ranks to meet in and leave their results.
        args: what pickles.

    Raises:
        RuntimeError: a rank failed, with its traceback, or none of them ended in time.
    """
    context = mp.get_context("spawn")
    ranks = [
        context.Process(target=_rank, args=(rank, function, folder, args), daemon=True)
        for rank in range(NUM_RANKS)
    ]
    for rank in ranks:
        rank.start()
    deadline = time.monotonic() + TIMEOUT_SECONDS
    try:
        # A rank that fails leaves the others waiting for it.
        while any(rank.is_alive() for rank in ranks) and not list(folder.glob("*.error")):
            if time.monotonic() > deadline:
                raise RuntimeError(f"ranks: not done after {TIMEOUT_SECONDS:.0f} s")
            time.sleep(0.05)
        errors = sorted(folder.glob("*.error"))
        if errors:
            raise RuntimeError(f"{errors[0].stem}: {errors[0].read_text()}")
        codes = [rank.exitcode for rank in ranks]
        if any(codes):
            raise RuntimeError(f"ranks: ended with {codes}")
    finally:
        for rank in ranks:
            rank.kill()
            rank.join()
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(NUM_RANKS)]


def _rank(rank: int, function: Callable[..., Any], folder: Path, args: tuple[Any, ...]) -> None:
    # What launchers set; DeepSpeed looks for it.
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(NUM_RANKS)}
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    try:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{folder}/meeting",
            rank=rank,
            world_size=NUM_RANKS,
            timeout=datetime.timedelta(seconds=TIMEOUT_SECONDS / 3),
        )
        result = function(*args)
        dist.barrier()
        dist.destroy_process_group()
    except BaseException:
        # Written whole under another name first: the parent looks for the final one.
        unfinished = folder / f"rank{rank}.unfinished"
        unfinished.write_text(traceback.format_exc())
        unfinished.rename(folder / f"rank{rank}.error")
        raise
    torch.save(result, folder / f"rank{rank}.pt")
