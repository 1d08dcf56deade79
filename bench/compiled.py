"""Compile every kernel ahead of time, without a GPU, and say what the machine code uses.

    python -m bench.compiled                     # all kernels, four targets, peers beside them
    python -m bench.compiled --target sm_90 --skip-peers
    python -m bench.compiled --csv compiled.csv

Nothing here is a timing. For each kernel and target: registers, shared memory, what spilled, the
matrix instructions (HGMMA is Hopper's wgmma) and the tensor copies (TMA). The roofline is the least
time an H100 SXM could take, from the FLOPs and the bytes that the kernel must move, at 989 TFLOP/s
of dense bfloat16 and 3.35 TB/s (NVIDIA's data sheet); real kernels take longer. Shapes: 4,096 rows,
the head of Qwen2.5-VL-7B. A kernel of ours that does not compile, spills, or needs more shared
memory than there is ends the command with status 1. The last line is one JSON object.
"""

import argparse
import csv
import json
import multiprocessing
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import triton
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from triton.errors import TritonError

from bench.compile_cases import (
    NUM_ROWS,
    VOCAB_SIZE,
    WIDTH,
    CompileCase,
    compile_cases,
)
from bench.inspection import TARGETS, Resources, compile_for
from bench.peer_kernels import peer_cases

# What Triton, its assembler and a peer's own assertions raise where a kernel cannot be compiled.
_REFUSALS = (TritonError, RuntimeError, TypeError, ValueError, KeyError, AssertionError)
_H100_FLOPS = 989e12
_H100_BYTES = 3.35e12
_GEMM_FLOPS = 2 * NUM_ROWS * WIDTH * VOCAB_SIZE
_LOGIT_BYTES = 2 * NUM_ROWS * VOCAB_SIZE
_WEIGHT_BYTES = 2 * WIDTH * VOCAB_SIZE
_HIDDEN_BYTES = 2 * NUM_ROWS * WIDTH


@dataclass(frozen=True)
class Outcome:
    """One kernel on one target."""

    kernel: str
    target: str
    is_ours: bool
    flops: int
    hbm_bytes: int
    resources: Resources | None
    error: str | None

    @property
    def roofline_ms(self) -> float:
        """The least time on an H100."""
        return roofline_ms(self.flops, self.hbm_bytes)

    @property
    def failed(self) -> bool:
        """It did not compile, spills, or needs more shared memory than a program may have."""
        if self.resources is None:
            return True
        room = 1024 * TARGETS[self.target].shared_kib
        return self.resources.spills or self.resources.shared_bytes > room


def roofline_ms(flops: float, hbm_bytes: float) -> float:
    """max(FLOPs / peak, bytes / bandwidth) on an H100 SXM, in milliseconds."""
    return 1e3 * max(flops / _H100_FLOPS, hbm_bytes / _H100_BYTES)


def cases_of(architecture: str, is_ours: bool) -> list[CompileCase]:
    """Our kernels, or the peers', for one architecture."""
    return compile_cases(architecture) if is_ours else peer_cases()


def compile_one(target_name: str, is_ours: bool, index: int) -> Outcome:
    """Compile one case; what stops it becomes part of the outcome."""
    target = TARGETS[target_name]
    case = cases_of(target.architecture, is_ours)[index]
    resources, error = None, None
    try:
        resources = compile_for(case, target)
    except _REFUSALS as problem:
        error = f"{type(problem).__name__}: {problem}".splitlines()[0][:120]
    return Outcome(case.name, target_name, is_ours, case.flops, case.hbm_bytes, resources, error)


def compile_all(targets: list[str], with_peers: bool) -> list[Outcome]:
    """Every case for every target, two at a time, in the order of the table."""
    jobs = [
        (name, is_ours, index)
        for name in targets
        for is_ours in ((True, False) if with_peers else (True,))
        for index in range(len(cases_of(TARGETS[name].architecture, is_ours)))
    ]
    context = multiprocessing.get_context("spawn")
    workers = min(2, os.cpu_count() or 1)
    console = Console(stderr=True)
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        futures = [pool.submit(compile_one, *job) for job in jobs]
        with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
            task = bar.add_task("compiling", total=len(futures))
            for future in futures:
                future.result()
                bar.advance(task)
    return [future.result() for future in futures]


def whole_loss() -> list[tuple[str, float]]:
    """The least time of one forward and backward of the head on an H100, by how it is computed."""
    gemm = roofline_ms(_GEMM_FLOPS, _WEIGHT_BYTES + _HIDDEN_BYTES + _LOGIT_BYTES)
    to_weight = roofline_ms(_GEMM_FLOPS, _LOGIT_BYTES + _HIDDEN_BYTES + 4 * 2 * _WEIGHT_BYTES)
    row_pass = roofline_ms(0, _LOGIT_BYTES)
    return [
        ("three bare GEMMs", 3 * gemm),
        ("care_kernels: 3 GEMMs, 2 passes over the chunk", 2 * gemm + to_weight + 2 * row_pass),
        ("Liger grpo on full logits: 3 GEMMs, 3 passes", 3 * gemm + 3 * row_pass),
        ("cut-cross-entropy: 4 GEMMs, logits never stored", 4 * roofline_ms(_GEMM_FLOPS, 0)),
    ]


def print_tables(outcomes: list[Outcome], console: Console) -> None:
    """One table of kernels for each target, then the whole loss."""
    for name in dict.fromkeys(outcome.target for outcome in outcomes):
        table = Table(title=f"{name}, Triton {triton.__version__}: compiled, not timed")
        for column in (
            "kernel",
            "registers",
            "shared KiB",
            "spilled B",
            "LDL/STL",
            "matrix",
            "TMA",
        ):
            is_text = column in ("kernel", "matrix", "TMA")
            table.add_column(column, justify="left" if is_text else "right")
        table.add_column("HBM MB", justify="right")
        table.add_column("GFLOP", justify="right")
        table.add_column("H100 roofline ms", justify="right")
        for outcome in outcomes:
            if outcome.target == name:
                table.add_row(*_cells(outcome), style=None if outcome.is_ours else "dim")
        console.print(table)
    table = Table(title=f"whole loss, N={NUM_ROWS:,} D={WIDTH:,} V={VOCAB_SIZE:,}: rooflines")
    table.add_column("")
    table.add_column("ms on an H100, at least", justify="right")
    for what, milliseconds in whole_loss():
        table.add_row(what, f"{milliseconds:.1f}")
    console.print(table)
    console.print("Rooflines are lower bounds from FLOPs and bytes. No kernel was run or timed.")


def _cells(outcome: Outcome) -> list[str]:
    found = outcome.resources
    if found is None:
        used = ["-", "-", "-", "-", f"not compiled: {outcome.error}", "-"]
    else:
        numbers = (found.registers, found.shared_bytes // 1024, found.spilled_bytes)
        used = [*(str(n) for n in numbers), str(found.local_accesses), found.matrix]
        used.append(found.tensor_copies)
    costs = (f"{outcome.hbm_bytes / 1e6:,.0f}", f"{outcome.flops / 1e9:,.0f}")
    return [outcome.kernel, *used, *costs, f"{outcome.roofline_ms:.2f}"]


def figures(outcomes: list[Outcome]) -> dict[str, Any]:
    """What the last line says."""
    ours = [outcome for outcome in outcomes if outcome.is_ours]
    compiled = [outcome for outcome in ours if outcome.resources is not None]
    return {
        "triton": triton.__version__,
        "kernels": len(compiled),
        "spills": sum(o.resources.spills for o in compiled if o.resources is not None),
        "not_compiled": [f"{o.kernel} {o.target}" for o in ours if o.resources is None],
        "whole_loss_roofline_ms": {what: round(ms, 2) for what, ms in whole_loss()},
        "figures": [_row(outcome) for outcome in outcomes],
    }


def _row(outcome: Outcome) -> dict[str, Any]:
    found = {} if outcome.resources is None else asdict(outcome.resources)
    return {
        "kernel": outcome.kernel,
        "target": outcome.target,
        "ours": outcome.is_ours,
        **found,
        "error": outcome.error,
        "roofline_ms": round(outcome.roofline_ms, 3),
    }


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    parser = argparse.ArgumentParser(prog="python -m bench.compiled", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--target", action="append", choices=TARGETS, help="repeatable")
    parser.add_argument("--skip-peers", action="store_true")
    parser.add_argument("--csv", type=Path, metavar="FILE")
    options = parser.parse_args(arguments)
    # An interpreted kernel cannot be compiled; the workers inherit this.
    os.environ.pop("TRITON_INTERPRET", None)
    outcomes = compile_all(options.target or list(TARGETS), not options.skip_peers)
    print_tables(outcomes, Console(width=190))
    rows = [_row(outcome) for outcome in outcomes]
    if options.csv is not None:
        names = list(dict.fromkeys(key for row in rows for key in row))
        with options.csv.open("w", newline="") as file:
            writer = csv.DictWriter(file, names)
            writer.writeheader()
            writer.writerows(rows)
    failed = [outcome for outcome in outcomes if outcome.is_ours and outcome.failed]
    for outcome in failed:
        print(
            f"{outcome.kernel} on {outcome.target}: does not compile, spills or does not fit",
            file=sys.stderr,
        )
    print(json.dumps(figures(outcomes)))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
