"""What the package should choose: tiles of the projection, pointers or TMA, rows of a chunk.

Tiles compile in threads, all before the first is timed. Every tile's log-probs are compared with
float64: a fast wrong one is not chosen. The table at the end is what the projection and the number
of rows of a chunk are chosen by.
"""

import statistics
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from threading import local
from typing import Any

import torch
from torch import Tensor

from bench.accuracy import true_log_probs
from bench.gpu.measuring import attempt, peak_mib, release, rounded, sizes_of, time_in_turns
from bench.gpu.section import Bench
from bench.peers import Problem, make_problem, ours
from care_kernels.softmax import LogitTransform
from care_kernels.triton import projection as fused_projection
from care_kernels.triton.projection import GemmTile
from care_kernels.triton.softmax import combine

_THREADS = 12
# A log-prob further off than this, in nats, belongs to a wrong kernel.
_MOST_ERROR = 1e-3
_CHUNK_ROWS = (None, 1024, 1792, 2304, 3456, 4096, 8192)

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
Runs = dict[str, Callable[[int], Tensor]]
"""By a tile's name: a call that projects so many first rows with it."""


def run(bench: Bench) -> None:
    """The tiles at the larger head, then the chunk's rows at both."""
    sizes = sizes_of(bench.dry)
    width, vocab = sizes.heads["7b"]
    problem = make_problem(min(sizes.headline_rows), width, vocab, bench.device)
    table: dict[str, Any] = {}
    for kind in KINDS:
        best = attempt(bench, f"tiles, {kind}", partial(_sweep_tiles, bench, kind, problem))
        if best is not None:
            table[kind] = best
            bench.record.put("table", table)
    del problem
    release(bench)
    for head in sizes.heads:
        best = attempt(bench, f"chunk rows, {head}", partial(_sweep_chunks, bench, head))
        if best is not None:
            table[f"chunk rows, {head}, N={max(sizes.headline_rows)}"] = best
            bench.record.put("table", table)
    print("\nthe table to choose by:")
    for name, best in table.items():
        print(f"  {name:28s} {best}")


def _sweep_tiles(bench: Bench, kind: str, problem: Problem) -> dict[str, Any]:
    """Time every tile of one kind; returns the best with its time."""
    hidden, weight = problem.hidden.detach(), problem.head_weight.detach()
    exps = fused_projection.empty_exps(*_logits_shape(problem), torch.bfloat16, hidden.device)
    truth, _ = true_log_probs(problem.first(64))
    runs = _runs(bench, kind, problem, exps)
    with _chosen_tiles():
        refused = _compile(bench, runs)
        found: dict[str, Any] = {name: {"refused": reason} for name, reason in refused.items()}
        calls: dict[str, Callable[[], object]] = {}
        for name, call in runs.items():
            if name in refused:
                continue
            log_probs = attempt(bench, f"{kind} {name}", partial(call, len(hidden)))
            if log_probs is None:
                continue
            off = float((log_probs[: len(truth)] - truth).abs().max())
            found[name] = {"log_prob_max": rounded(off)}
            if off <= _MOST_ERROR:
                calls[name] = partial(call, len(hidden))
        product = torch.empty_like(exps) if kind != "log_probs" else None
        calls["cuBLAS, bf16 logits"] = lambda: torch.mm(hidden, weight.T, out=product)
        times = time_in_turns(bench, calls, 2 if bench.dry else 6, budget=1.0)
    flops = 2.0 * hidden.numel() * len(weight)
    for name, values in times.items():
        median = statistics.median(values)
        more = {"ms": rounded(median, 4), "tflop_s": rounded(flops / median / 1e9)}
        found[name] = found.get(name, {}) | more
    bench.record.put(f"tiles, {kind}", found)
    _print_tiles(kind, problem, found, refused)
    ours = {name: found[name]["ms"] for name in times if name in runs}
    fastest = min(ours, key=lambda name: ours[name])
    return {"tile": fastest, "ms": ours[fastest], "cublas_ms": found["cuBLAS, bf16 logits"]["ms"]}


def _runs(bench: Bench, kind: str, problem: Problem, exps: Tensor) -> Runs:
    """The shipped tile first; a dry run takes two others alone."""
    tiles = {_label(tile): tile for tile in TILES[: 2 if bench.dry else None]}
    if not bench.dry:
        shipped = _shipped_tile(kind, problem.hidden.device)
        tiles.pop(_label(shipped), None)
        tiles = {f"{_label(shipped)} (shipped)": shipped} | tiles
    return {name: partial(_project, kind, problem, exps, tile) for name, tile in tiles.items()}


def _label(tile: GemmTile) -> str:
    blocks = "x".join(str(number) for number in tile[:3])
    way = "TMA " if tile.USE_TMA else ""
    return f"{way}{blocks} group {tile.GROUP_C} warps {tile.num_warps} stages {tile.num_stages}"


def _compile(bench: Bench, runs: Runs) -> dict[str, str]:
    """Launch each once on a few rows, in threads; returns why some cannot run."""

    def reason(call: Callable[[int], Tensor]) -> str | None:
        try:
            call(256)
        except Exception as error:
            return f"{type(error).__name__}: {str(error)[:120]}"
        return None

    # A thread's first operation makes the device's context its own.
    start_thread = partial(torch.zeros, 1, device=bench.device)
    with ThreadPoolExecutor(1 if bench.dry else _THREADS, initializer=start_thread) as pool:
        reasons = list(pool.map(reason, runs.values()))
    return {name: why for name, why in zip(runs, reasons, strict=True) if why is not None}


def _logits_shape(problem: Problem) -> tuple[int, int]:
    return len(problem.target_ids), len(problem.head_weight)


def _print_tiles(
    kind: str, problem: Problem, found: dict[str, Any], refused: dict[str, str]
) -> None:
    rows, vocab = _logits_shape(problem)
    print(f"\ntiles of the projection, {kind}, N={rows} D={problem.hidden.shape[1]} V={vocab}")
    timed = {name: figures for name, figures in found.items() if "ms" in figures}
    for name, figures in sorted(timed.items(), key=lambda item: item[1]["ms"]):
        off = figures.get("log_prob_max")
        error = "" if off is None else f"  log-probs off by {off:.1e}"
        print(f"  {figures['ms']:9.3f} ms {figures['tflop_s']:7.0f} TFLOP/s  {name}{error}")
    for name, why in refused.items():
        print(f"  refused: {name}: {why}")


def _sweep_chunks(bench: Bench, head: str) -> dict[str, Any]:
    """The whole loss by rows of a chunk; returns the fastest with its time and memory."""
    sizes = sizes_of(bench.dry)
    rows = max(sizes.headline_rows)
    problem = make_problem(rows, *sizes.heads[head], bench.device)
    calls: dict[str, Callable[[], object]] = {
        str(rows): partial(ours, problem, backend="triton", chunk_rows=rows)
        for rows in ((None, 8) if bench.dry else _CHUNK_ROWS)
    }
    times = time_in_turns(bench, calls, 2 if bench.dry else 5, budget=1.0)
    found: dict[str, dict[str, Any]] = {}
    print(f"\nrows of a chunk, whole loss, {head} N={rows}")
    for name, values in times.items():
        peak = peak_mib(bench, calls[name])
        found[name] = {
            "ms": rounded(statistics.median(values), 4),
            "peak_mib": None if peak is None else round(peak),
        }
        print(f"  chunk_rows {name:5s} {found[name]['ms']:9.3f} ms  {found[name]['peak_mib']} MiB")
    bench.record.put(f"chunk rows, {head}", found)
    fastest = min(found, key=lambda name: found[name]["ms"])
    return {"chunk_rows": fastest} | found[fastest]


def _shipped_tile(kind: str, device: torch.device) -> GemmTile:
    """What the package takes by itself for aligned rows."""
    architecture = fused_projection._architecture(device)
    return fused_projection.gemm_tile(architecture, "entropy" if "entropy" in kind else "plain")


@contextmanager
def _chosen_tiles() -> Iterator[None]:
    """Within it, calls of `_project` run with their own tile, in any thread.

    The package chooses its tile itself: its launcher is called with that choice replaced.
    """
    shipped = fused_projection.gemm_tile

    def choose(*args: object, **kwargs: object) -> GemmTile:
        return getattr(_choice, "tile", None) or shipped(*args, **kwargs)  # pyright: ignore[reportArgumentType]

    fused_projection.gemm_tile = choose
    try:
        yield
    finally:
        fused_projection.gemm_tile = shipped


def _project(kind: str, problem: Problem, exps: Tensor, tile: GemmTile, rows: int) -> Tensor:
    """Log-probs of the first rows, projected with a tile; `exps` [N, V] is overwritten."""
    _choice.tile = tile
    statistics = fused_projection.project(
        problem.hidden.detach()[:rows],
        problem.head_weight.detach(),
        None,
        problem.target_ids[:rows],
        LogitTransform(),
        with_entropy="entropy" in kind,
        exps=None if kind == "log_probs" else exps[:rows],
    )
    return combine(statistics).log_probs
