"""The one place that reaches inside `care_kernels`: its fused projection under a chosen tile.

`linear_policy_loss` and `linear_log_probs` choose the tile themselves; to compare tiles, the
launcher is called as they call it, with its choice replaced.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import local

import torch
from torch import Tensor

from care_kernels.softmax import LogitTransform
from care_kernels.triton import projection as fused_projection
from care_kernels.triton.projection import GemmTile
from care_kernels.triton.softmax import combine

KINDS = ("training", "log_probs", "training, entropy")
"""With exponentials stored; statistics alone; with the entropy's moment too."""

TILES = tuple(
    GemmTile(*numbers)
    for numbers in (
        # BLOCK_C, BLOCK_V, BLOCK_D, GROUP_C, USE_TMA, warps, stages
        (128, 256, 64, 16, True, 8, 4),
        (128, 256, 64, 16, True, 8, 3),
        (128, 256, 64, 8, True, 8, 4),
        (128, 256, 64, 32, True, 8, 4),
        (128, 256, 32, 16, True, 8, 4),
        (128, 128, 64, 16, True, 8, 4),
        (256, 128, 64, 8, True, 8, 4),
        (128, 256, 64, 16, False, 8, 3),
        (128, 256, 32, 16, False, 8, 4),
        (128, 128, 64, 16, False, 8, 3),
        (128, 128, 64, 16, False, 4, 4),
        (256, 128, 64, 8, False, 8, 3),
    )
)

_choice = local()


def shipped_tile(kind: str, device: torch.device) -> GemmTile:
    """What the package takes by itself for aligned rows."""
    architecture = fused_projection._architecture(device)
    return fused_projection.gemm_tile(architecture, "entropy" if "entropy" in kind else "plain")


@contextmanager
def chosen_tiles() -> Iterator[None]:
    """Within it, `projection` calls run with their own tile, in any thread."""
    shipped = fused_projection.gemm_tile

    def choose(*args: object, **kwargs: object) -> GemmTile:
        return getattr(_choice, "tile", None) or shipped(*args, **kwargs)  # pyright: ignore[reportArgumentType]

    fused_projection.gemm_tile = choose
    try:
        yield
    finally:
        fused_projection.gemm_tile = shipped


def projection(
    kind: str, hidden: Tensor, weight: Tensor, target_ids: Tensor, exps: Tensor
) -> Callable[[GemmTile], Tensor]:
    """A call that projects with a tile and returns the log-probs [N], `exps` [N, V] overwritten."""

    def run(tile: GemmTile) -> Tensor:
        _choice.tile = tile
        statistics = fused_projection.project(
            hidden,
            weight,
            None,
            target_ids,
            LogitTransform(),
            with_entropy="entropy" in kind,
            exps=None if kind == "log_probs" else exps[: len(hidden)],
        )
        return combine(statistics).log_probs

    return run


def new_exps(num_rows: int, vocab_size: int, device: torch.device) -> Tensor:
    """Room for the exponentials of so many rows."""
    return fused_projection.empty_exps(num_rows, vocab_size, torch.bfloat16, device)
