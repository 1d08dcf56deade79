"""Compile a Triton kernel for a device that is not here, and read what the machine code uses."""

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget

from bench.compile_cases import CompileCase

_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
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
    tensor_copies: str = ""
    """TMA instructions and how often they occur, or ""."""

    @property
    def spills(self) -> bool:
        """Whether anything left the registers."""
        return self.spilled_bytes > 0 or self.local_accesses > 0


def compile_for(case: CompileCase, target: Target) -> Resources:
    """Compile `case` for `target`, without a GPU.

    Raises:
        triton.CompilationError, RuntimeError: it does not compile.
    """
    compiled = triton.compile(case.source(), target=target.gpu, options=case.options())
    shared = compiled.metadata.shared
    if target.gpu.backend == "hip":
        return _amd_resources(compiled.asm["amdgcn"], shared)
    return _nvidia_resources(compiled.asm["cubin"], shared)


def _nvidia_resources(cubin: bytes, shared_bytes: int) -> Resources:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _run("cuobjdump", "--dump-resource-usage", file.name)
        code = _run("nvdisasm", "-c", file.name)
    return Resources(
        registers=int(_found(r"REG:(\d+)", usage)),
        shared_bytes=shared_bytes,
        spilled_bytes=int(_found(r"STACK:(\d+)", usage)),
        local_accesses=len(re.findall(r"\b(?:LDL|STL)\b", code)),
        matrix=_occurrences(_MATRIX, code),
        tensor_copies=_occurrences(_TENSOR_COPY, code),
    )


def _amd_resources(code: str, shared_bytes: int) -> Resources:
    return Resources(
        registers=int(_found(r"\.vgpr_count: +(\d+)", code)),
        shared_bytes=shared_bytes,
        spilled_bytes=int(_found(r"private_segment_fixed_size: +(\d+)", code)),
        local_accesses=len(re.findall(r"\bscratch_(?:load|store)", code)),
        matrix=_occurrences(_MATRIX, code),
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
