"""Rows longer in memory than the matrix is wide: what lies behind their end reaches no sum.

torch's bfloat16 GEMM reads it on CPUs with AMX. `DefinedPadding` holds every kernel test to it on
any machine; here padding comes from outside, and the instruction set is chosen.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.kernels.cases import check_against_oracle, policy_case, run_ours, with_kl

ROOT = Path(__file__).parents[2]
OPERANDS = ("hidden", "head_weight", "ref_hidden", "ref_head_weight")


def behind_nan(matrix: Tensor, extra: int = 6) -> Tensor:
    """The same [R, C] matrix as a view over rows of C + `extra` numbers, NaN behind each."""
    wide = matrix.new_full((matrix.shape[0], matrix.shape[1] + extra), float("nan"))
    wide[:, : matrix.shape[1]] = matrix
    return wide[:, : matrix.shape[1]]


@pytest.mark.parametrize("estimator", ("k3", "exact"))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=str)
def test_padded_operands(dtype: torch.dtype, estimator: str) -> None:
    """Hidden states and heads with NaN between their rows: the oracle's loss and gradients."""
    case = with_kl(policy_case(width=18, dtype=dtype), estimator)
    check_against_oracle(case | {name: behind_nan(case[name]) for name in OPERANDS})


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_padded_gradient_buffer(dtype: torch.dtype) -> None:
    """dW added to a view over wider rows is dW, and what lies behind the rows stays."""
    case = policy_case(width=18, dtype=dtype)
    _, grads = run_ours(case)
    buffer = behind_nan(torch.zeros_like(case["head_weight"]))
    run_ours(case | {"weight_grad": buffer})
    assert torch.equal(buffer, grads["head_weight"])
    assert buffer.as_strided((1, 6), (1, 1), 18).isnan().all()


@pytest.mark.parametrize("isa", (None, "AVX512_CORE_BF16"), ids=("own", "without_amx"))
def test_on_each_instruction_set(isa: str | None) -> None:
    """The exact KL's gradients, bit-equal over runs and near the oracle, with AMX and without."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    environment.pop("DNNL_MAX_CPU_ISA", None)
    if isa is not None:
        environment["DNNL_MAX_CPU_ISA"] = isa
    command = (sys.executable, "-c", _CHECK)
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


_CHECK = """
import torch
from tests.kernels.cases import check_against_oracle, policy_case, run_ours, with_kl
torch.use_deterministic_algorithms(True)
for dtype in (torch.bfloat16, torch.float16, torch.float32):
    for width, vocab_size in ((16, 211), (34, 1000)):
        case = with_kl(policy_case(63, width, vocab_size, dtype), "exact")
        check_against_oracle(case)
        first, again = run_ours(case)[1], run_ours(case)[1]
        assert all(torch.equal(first[name], again[name]) for name in first)
"""
