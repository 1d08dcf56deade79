"""Every kernel compiles for every target without a GPU, and keeps its numbers in registers."""

import json
from typing import Any

import pytest
import triton
import triton.language as tl

from bench.compile_cases import CompileCase
from bench.compiled import TARGETS, Outcome, Target, compile_for, figures
from tests.train.runs import python


@pytest.fixture(scope="module")
def compiled() -> dict[str, Any]:
    """The last line of `python -m bench.compiled`, which must end well."""
    return json.loads(python("-m", "bench.compiled").stdout.splitlines()[-1])


@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
def test_every_kernel_fits_every_target(target: Target, compiled: dict[str, Any]) -> None:
    """At Qwen2.5-VL-7B's shapes: machine code, no register spilled, shared memory as there is.

    On Hopper the projection multiplies by wgmma, and loads by TMA where rows are aligned.
    """
    assert compiled["spills"] == 0 and compiled["not_compiled"] == []
    assert compiled["kernels"] == len(compiled["figures"])
    rows = [row for row in compiled["figures"] if row["target"] == target.name]
    assert len(rows) >= 20
    for row in rows:
        assert row["shared_bytes"] <= target.shared_kib * 1024, row["kernel"]
        assert bool(row["matrix"]) == row["kernel"].startswith("project"), row["kernel"]
        if target.name == "sm_90" and row["matrix"]:
            is_aligned = not row["kernel"].endswith("unaligned")
            assert "HGMMA" in row["matrix"], row["kernel"]
            assert ("UTMALDG" in row["tensor_copies"]) == is_aligned, row["kernel"]


@triton.jit
def _spilling_kernel(x_ptr, out_ptr, BLOCK: tl.constexpr):
    lanes = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + lanes)
    tl.store(out_ptr + lanes, x - tl.sum(x))


def _spilling_case() -> CompileCase:
    types = {"x_ptr": "*fp32", "out_ptr": "*fp32"}
    return CompileCase("spilling", _spilling_kernel, types, {"BLOCK": 16384}, num_warps=1)


@pytest.mark.skipif(
    not isinstance(_spilling_kernel, triton.JITFunction), reason="Triton is interpreting"
)
def test_spills_are_seen() -> None:
    """512 numbers for each thread do not fit 255 registers, and count as a failure."""
    resources = compile_for(_spilling_case(), TARGETS["sm_90"])
    assert resources.spills and resources.spilled_bytes > 0 and resources.local_accesses > 0
    outcome = Outcome("spilling", "sm_90", resources, None)
    assert outcome.failed and figures([outcome])["spills"] == 1


def test_what_does_not_compile_is_a_failure() -> None:
    """A kernel without machine code is counted and named, never dropped."""
    outcome = Outcome("broken", "sm_90", None, "CompilationError: no")
    assert outcome.failed
    assert figures([outcome])["not_compiled"] == ["broken sm_90"]
