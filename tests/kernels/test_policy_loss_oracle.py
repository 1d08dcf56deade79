"""`linear_policy_loss` against the float64 oracle: every loss, KL, ratio level, dtype and shape."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from care_kernels import Clip
from tests.kernels.cases import (
    Case,
    check_against_oracle,
    double_logits,
    policy_case,
    row_vector,
    run_ours,
    with_kl,
)
from tests.kernels.oracle import reference_log_probs

ROOT = Path(__file__).parents[2]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LEVELS = ("token", "sequence")
OPERANDS = ("hidden", "head_weight", "ref_hidden", "ref_head_weight")


def at_level(case: Case, level: str) -> Case:
    """Sequences of unequal length whose rows are interleaved and whose ids have gaps."""
    ids = (torch.arange(len(case["hidden"])) * 5 % 7).div(2, rounding_mode="floor") * 100 - 50
    return case | {"ratio_level": level, "sequence_ids": ids if level == "sequence" else None}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("estimator", (None, "k1", "k2", "k3", "exact"))
def test_loss_and_gradients(dtype: torch.dtype, level: str, estimator: str | None) -> None:
    """Eqs. 12-13 at both ratio levels with every KL, in chunks smaller than the batch."""
    case = at_level(policy_case(dtype=dtype, bias=True) | {"chunk_rows": 17}, level)
    check_against_oracle(case if estimator is None else with_kl(case, estimator))


@pytest.mark.parametrize("vocab_size", (1, 7, 1000, 32001))
@pytest.mark.parametrize("num_rows", (0, 1, 63))
@pytest.mark.parametrize("width", (5, 64))
def test_shapes(num_rows: int, width: int, vocab_size: int) -> None:
    """No shape is special: empty batches, one word, widths and vocabularies that divide nothing."""
    case = with_kl(policy_case(num_rows, width, vocab_size), "exact")
    check_against_oracle(case | {"entropy_weights": row_vector(case, 0.0, 0.1)})


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("estimator", ("k3", "exact"))
@pytest.mark.parametrize(
    "options",
    (
        {"temperature": 0.7},
        {"logit_softcap": 3.0},
        {"logit_scale": 0.25},
        {"temperature": 1.3, "logit_softcap": 5.0, "logit_scale": 2.0},
    ),
    ids=lambda options: "-".join(options),
)
@pytest.mark.parametrize("bias", (False, True), ids=("no_bias", "bias"))
def test_logit_transform(options: Case, bias: bool, estimator: str, level: str) -> None:
    """z = cap tanh(scale (x W^T + b) / cap) / temperature, through every gradient."""
    case = policy_case(bias=bias) | options
    case["entropy_weights"] = row_vector(case, 0.0, 0.1)
    check_against_oracle(with_kl(at_level(case, level), estimator))


def without(case: Case, name: str) -> Case:
    return {key: value for key, value in case.items() if key != name}


def dual_clip() -> Case:
    """The dual clip bounds negative advantages; w scales the surrogate; H has a minus."""
    case = policy_case(drift=1.0)
    return case | {
        "surrogate": Clip(0.1, 0.15, dual=1.4),
        "importance_weights": row_vector(case, 0.0, 2.0),
        "entropy_weights": row_vector(case, -0.1, 0.1, seed=3),
    }


def importance_weight_of_zero() -> Case:
    """It removes a row's surrogate and nothing else."""
    case = with_kl(policy_case(), "k2")
    weights = row_vector(case, 0.5, 1.5)
    weights[::3] = 0
    advantages = case["advantages"].masked_fill(weights == 0, 0.0)
    return case | {"importance_weights": weights, "advantages": advantages}


def mixed_dtypes() -> Case:
    """A float32 head over bfloat16 hidden states: each gradient comes back in its own dtype."""
    case = with_kl(policy_case(dtype=torch.bfloat16), "exact")
    return case | {"head_weight": case["head_weight"].float() * 1.001}


def strided() -> Case:
    """Strides do not matter."""
    case = policy_case()
    weight = case["head_weight"].T.contiguous().T
    case = {name: torch.stack((value, value), -1)[..., 0] for name, value in case.items()}
    return case | {"head_weight": weight}


VARIANTS: dict[str, Callable[[], Case]] = {
    "dual clip": dual_clip,
    "importance weight of zero": importance_weight_of_zero,
    "mixed dtypes": mixed_dtypes,
    "strided": strided,
    # A sampled KL takes the reference's log-probs as they are.
    "k1 log-probs": lambda: with_kl(policy_case(), "k1", from_hidden=False),
    "k2 log-probs": lambda: with_kl(policy_case(), "k2", from_hidden=False),
    "k3 log-probs": lambda: with_kl(policy_case(), "k3", from_hidden=False),
    # Without ref_head_weight the reference uses head_weight, and sends no gradient into it.
    "k3, shared head": lambda: without(with_kl(policy_case(bias=True), "k3"), "ref_head_weight"),
    "exact, shared head": lambda: without(with_kl(policy_case(), "exact"), "ref_head_weight"),
    # Without old log-probs every ratio is 1 and the gradient that of -a l (or its mean).
    "old is current": lambda: without(policy_case(), "old_log_probs"),
    # float64 inputs are computed in float64, so gradient checks mean something.
    "float64": lambda: with_kl(policy_case(dtype=torch.float64, bias=True), "exact"),
    "another draw": lambda: with_kl(policy_case(seed=4), "k3"),
}


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("name", VARIANTS)
def test_variants(name: str, level: str) -> None:
    """Each option and input that `linear_policy_loss` takes."""
    check_against_oracle(at_level(VARIANTS[name](), level))


@pytest.mark.parametrize(
    "frozen", (("head_weight",), ("hidden",), ("hidden", "bias")), ids="-".join
)
@pytest.mark.parametrize("level", LEVELS)
def test_frozen_inputs(frozen: tuple[str, ...], level: str) -> None:
    """What needs no gradient gets none, and the others are unchanged."""
    check_against_oracle(at_level(policy_case(bias=True), level), frozen=frozen)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("upstream", (-3.7, 1e-3))
def test_upstream_gradient(dtype: torch.dtype, upstream: float) -> None:
    """The gradients made in the forward scale with whatever comes from above."""
    check_against_oracle(policy_case(dtype=dtype), upstream=upstream)


@pytest.mark.parametrize("size", (1e4, -1e4))
@pytest.mark.parametrize("estimator", (None, "k2", "exact"))
def test_huge_logits(size: float, estimator: str | None) -> None:
    """Logits of +-1e4 overflow nothing."""
    case = policy_case(vocab_size=50, drift=0.1)
    case["hidden"] = case["hidden"].abs()
    case["head_weight"] = case["head_weight"].abs()
    case["logit_scale"] = size / 16
    current = reference_log_probs(double_logits(case), case["target_ids"]).float()
    case["old_log_probs"] = current + 0.1
    case["entropy_weights"] = row_vector(case, 0.0, 0.1)
    check_against_oracle(case if estimator is None else with_kl(case, estimator))


def behind_nan(matrix: Tensor, extra: int = 6) -> Tensor:
    """The same [R, C] matrix as a view over rows of C + `extra` numbers, NaN behind each.

    torch's bfloat16 GEMM reads them on CPUs with AMX. `DefinedPadding` holds every kernel test to
    zeros there, on any machine.
    """
    wide = matrix.new_full((matrix.shape[0], matrix.shape[1] + extra), float("nan"))
    wide[:, : matrix.shape[1]] = matrix
    return wide[:, : matrix.shape[1]]


@pytest.mark.parametrize("estimator", ("k3", "exact"))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_padded_operands(dtype: torch.dtype, estimator: str) -> None:
    """With NaN between the rows of hidden states and heads: the oracle's loss and gradients; dW
    added to such a view is dW, and what lies behind the rows stays."""
    case = with_kl(policy_case(width=18, dtype=dtype), estimator)
    check_against_oracle(case | {name: behind_nan(case[name]) for name in OPERANDS})
    _, grads = run_ours(case)
    buffer = behind_nan(torch.zeros_like(case["head_weight"]))
    run_ours(case | {"weight_grad": buffer})
    assert torch.equal(buffer, grads["head_weight"])
    assert buffer.as_strided((1, 6), (1, 1), 18).isnan().all()


@pytest.mark.parametrize("isa", ({}, {"DNNL_MAX_CPU_ISA": "AVX512_CORE_BF16"}), ids=str)
def test_on_each_instruction_set(isa: dict[str, str]) -> None:
    """The exact KL's gradients, bit-equal over runs and near the oracle, with AMX and without."""
    own = {name: value for name, value in os.environ.items() if name != "DNNL_MAX_CPU_ISA"}
    environment = own | {"PYTHONPATH": str(ROOT)} | isa
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
