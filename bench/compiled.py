"""Compile every kernel ahead of time, without a GPU, and say what the machine code uses.

    python -m bench.compiled                     # all kernels, four targets
    python -m bench.compiled --target sm_90

Nothing here is a timing. For each kernel and target: registers, shared memory, what spilled, the
matrix instructions (HGMMA is Hopper's wgmma) and the tensor copies (TMA), as launched for the head
of Qwen2.5-VL-7B. A kernel that does not compile, spills, or needs more shared memory than there is
ends the command with status 1. The last line is one JSON object.
"""

import argparse
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import triton
from rich.console import Console
from rich.progress import Progress
from rich.table import Column, Table
from triton.backends.compiler import GPUTarget
from triton.errors import TritonError

from bench.compile_cases import CompileCase, compile_cases

# What Triton and its assembler raise where a kernel cannot be compiled.
_REFUSALS = (TritonError, RuntimeError, TypeError, ValueError, KeyError, AssertionError)
_NUMBERS = [
    Column(heading, justify="right")
    for heading in ("registers", "shared KiB", "spilled B", "LDL/STL")
]
_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
# Registers of a thread, its stack, and instructions that load from or store to that.
_PATTERNS = {
    "cuda": (r"REG:(\d+)", r"STACK:(\d+)", r"\b(?:LDL|STL)\b"),
    "hip": (
        *(r"\.vgpr_count: +(\d+)", r"private_segment_fixed_size: +(\d+)"),
        r"\bscratch_(?:load|store)",
    ),
}
_MATRIX = re.compile(r"\b(HMMA|HGMMA|UTC[A-Z]*MMA|v_mfma)")
# Tensor copies by descriptor: loads, stores.
_TENSOR_COPY = re.compile(r"\b(UTMALDG|UTMASTG)")


@dataclass(frozen=True)
class Target:
    """A device to compile for."""

    name: str
    architecture: str
    """What `compile_cases` takes."""
    gpu: GPUTarget
    shared_kib: int
    """Shared memory that one program may have."""


TARGETS = {
    target.name: target
    for target in (
        Target("sm_80", "8", GPUTarget("cuda", 80, 32), 163),
        Target("sm_90", "9", GPUTarget("cuda", 90, 32), 227),
        Target("sm_100", "10", GPUTarget("cuda", 100, 32), 227),
        Target("gfx942", "hip", GPUTarget("hip", "gfx942", 64), 64),
    )
}


@dataclass(frozen=True)
class Resources:
    """What one program of a compiled kernel uses."""

    registers: int
    """Of each thread."""
    shared_bytes: int
    spilled_bytes: int
    """Stack of each thread (scratch on AMD): registers that did not fit."""
    local_accesses: int
    """Instructions that load from or store to that memory."""
    matrix: str
    """The matrix instruction and how often it occurs, or ""; HGMMA is Hopper's wgmma."""
    tensor_copies: str
    """TMA instructions and how often they occur, or ""."""

    @property
    def spills(self) -> bool:
        """Whether anything left the registers."""
        return self.spilled_bytes > 0 or self.local_accesses > 0


@dataclass(frozen=True)
class Outcome:
    """One kernel on one target."""

    kernel: str
    target: str
    resources: Resources | None
    error: str | None

    @property
    def failed(self) -> bool:
        """It did not compile, spills, or needs more shared memory than a program may have."""
        if self.resources is None:
            return True
        room = 1024 * TARGETS[self.target].shared_kib
        return self.resources.spills or self.resources.shared_bytes > room


def compile_for(case: CompileCase, target: Target) -> Resources:
    """Compile `case` for `target`, without a GPU.

    Raises:
        triton.CompilationError, RuntimeError: it does not compile.
    """
    compiled = triton.compile(case.source(), target=target.gpu, options=case.options())
    if target.gpu.backend == "hip":
        code = compiled.asm["amdgcn"]
    else:
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(compiled.asm["cubin"])
            file.flush()
            code = _run("cuobjdump", "--dump-resource-usage", file.name)
            code += _run("nvdisasm", "-c", file.name)
    registers, stack, access = _PATTERNS[target.gpu.backend]
    return Resources(
        registers=int(_found(registers, code)),
        shared_bytes=compiled.metadata.shared,
        spilled_bytes=int(_found(stack, code)),
        local_accesses=len(re.findall(access, code)),
        matrix=_occurrences(_MATRIX, code),
        tensor_copies=_occurrences(_TENSOR_COPY, code),
    )


def _occurrences(instruction: re.Pattern[str], code: str) -> str:
    counts = Counter(instruction.findall(code))
    return ", ".join(f"{count} {name}" for name, count in counts.items())


def _found(pattern: str, text: str) -> str:
    match = re.search(pattern, text)
    assert match is not None, f"{pattern!r} not in what the tool printed"
    return match[1]


def _run(tool: str, *arguments: Any) -> str:
    command = [_TOOLS / tool, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _compile_one(target_name: str, index: int) -> Outcome:
    """Compile one case; what stops it becomes part of the outcome."""
    target = TARGETS[target_name]
    case = compile_cases(target.architecture)[index]
    resources, error = None, None
    try:
        resources = compile_for(case, target)
    except _REFUSALS as problem:
        error = f"{type(problem).__name__}: {problem}".splitlines()[0][:120]
    return Outcome(case.name, target_name, resources, error)


def compile_all(targets: list[str]) -> list[Outcome]:
    """Every case for every target, two at a time, in the order of the table."""
    jobs = [
        (name, index)
        for name in targets
        for index in range(len(compile_cases(TARGETS[name].architecture)))
    ]
    console = Console(stderr=True)
    workers, context = min(2, os.cpu_count() or 1), multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        futures = [pool.submit(_compile_one, *job) for job in jobs]
        with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
            return [future.result() for future in bar.track(futures, description="compiling")]


def print_tables(outcomes: list[Outcome], console: Console) -> None:
    """One table of kernels for each target."""
    for name in dict.fromkeys(outcome.target for outcome in outcomes):
        title = f"{name}, Triton {triton.__version__}: compiled, not timed"
        table = Table("kernel", *_NUMBERS, "matrix", "TMA", title=title)
        for outcome in outcomes:
            if outcome.target == name:
                table.add_row(*_cells(outcome))
        console.print(table)


def _cells(outcome: Outcome) -> list[str]:
    found = outcome.resources
    if found is None:
        return [outcome.kernel, "-", "-", "-", "-", f"not compiled: {outcome.error}", "-"]
    numbers = (found.registers, found.shared_bytes // 1024, found.spilled_bytes)
    counts = [str(number) for number in (*numbers, found.local_accesses)]
    return [outcome.kernel, *counts, found.matrix, found.tensor_copies]


def figures(outcomes: list[Outcome]) -> dict[str, Any]:
    """What the last line says."""
    compiled = [outcome.resources for outcome in outcomes if outcome.resources is not None]
    return {
        "triton": triton.__version__,
        "kernels": len(compiled),
        "spills": sum(resources.spills for resources in compiled),
        "not_compiled": [f"{o.kernel} {o.target}" for o in outcomes if o.resources is None],
        "figures": [
            {"kernel": o.kernel, "target": o.target, "error": o.error}
            | ({} if o.resources is None else asdict(o.resources))
            for o in outcomes
        ],
    }


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    parser = argparse.ArgumentParser(prog="python -m bench.compiled", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--target", action="append", choices=TARGETS, help="repeatable")
    options = parser.parse_args(arguments)
    # An interpreted kernel cannot be compiled; the workers inherit this.
    os.environ.pop("TRITON_INTERPRET", None)
    outcomes = compile_all(options.target or list(TARGETS))
    print_tables(outcomes, Console(width=140))
    failed = [outcome for outcome in outcomes if outcome.failed]
    for outcome in failed:
        print(
            f"{outcome.kernel} on {outcome.target}: does not compile, spills or does not fit",
            file=sys.stderr,
        )
    print(json.dumps(figures(outcomes)))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
