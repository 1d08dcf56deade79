"""Every kernel compiles for every target without a GPU, and keeps its numbers in registers."""

import json
import subprocess
import sys

import pytest

# In a process of its own: there the kernels are compiled, here they may be interpreted.
SCRIPT = """
import json, re, subprocess, sys, tempfile
from pathlib import Path
import triton
from triton.backends.compiler import GPUTarget
from care_kernels.triton_backend.compile_cases import compile_cases

CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"

def spilled_bytes(compiled, backend):
    if backend == "hip":
        return int(re.search(r"private_segment_fixed_size: +(\\d+)", compiled.asm["amdgcn"])[1])
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [CUOBJDUMP, "--dump-resource-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return int(re.search(r"STACK:(\\d+)", usage)[1])

architecture, backend, name, warp_size = json.loads(sys.argv[1])
for case in compile_cases(architecture):
    target = GPUTarget(backend, name, warp_size)
    compiled = triton.compile(case.source(), target=target, options=case.options())
    row = case.name, spilled_bytes(compiled, backend), compiled.metadata.shared
    print(json.dumps(row), flush=True)
"""
KIBIBYTES = {"8": 163, "9": 227, "10": 227, "hip": 64}
"""Shared memory that one program may have."""


@pytest.mark.parametrize(
    "target",
    (
        ("8", "cuda", 80, 32),
        ("9", "cuda", 90, 32),
        ("10", "cuda", 100, 32),
        ("hip", "hip", "gfx942", 64),
    ),
    ids=("sm_80", "sm_90", "sm_100", "gfx942"),
)
def test_every_kernel_fits_every_target(
    target: tuple[str, str, int | str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """At Qwen2.5-VL-7B's shapes: machine code, no register spilled, shared memory as there is."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    command = [sys.executable, "-c", SCRIPT, json.dumps(target)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    rows = [json.loads(line) for line in result.stdout.splitlines()]
    assert len(rows) >= 13
    for name, spilled, shared in rows:
        assert spilled == 0, name
        assert shared <= KIBIBYTES[target[0]] * 1024, name
