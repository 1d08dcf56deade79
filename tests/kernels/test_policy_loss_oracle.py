"""`linear_policy_loss` against the float64 oracle: every loss, KL, ratio level, dtype and shape."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from care_kernels import Cispo, Clip, Sapo, linear_log_probs
from tests.kernels.cases import (
    Case,
    assert_same,
    assert_same_bits,
    check_against_oracle,
    double_logits,
    error,
    on_its_device,
    policy_case,
    row_vector,
    run_ours,
    run_reference,
    with_kl,
)
from tests.kernels.oracle import reference_log_probs
from tests.kernels.tolerances import FLOOR, THREE_ROUNDINGS

ROOT = Path(__file__).parents[2]
CPU_FLAGS = Path("/proc/cpuinfo").read_text() if sys.platform == "linux" else ""
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LEVELS = ("token", "sequence")
ESTIMATORS = (None, "k1", "k2", "k3", "k3_unbiased", "exact")
OPERANDS = ("hidden", "head_weight", "ref_hidden", "ref_head_weight")


def at_level(case: Case, level: str) -> Case:
    """Sequences of unequal length whose rows are interleaved and whose ids have gaps."""
    ids = (torch.arange(len(case["hidden"])) * 5 % 7).div(2, rounding_mode="floor") * 100 - 50
    return case | {"ratio_level": level, "sequence_ids": ids if level == "sequence" else None}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_loss_and_gradients(
    backend: str, dtype: torch.dtype, level: str, estimator: str | None
) -> None:
    """Eqs. 12-13 at both ratio levels with every KL, in chunks smaller than the batch."""
    case = policy_case(23, dtype=dtype, bias=dtype == torch.float32)
    case = at_level(case | {"chunk_rows": 17}, level)
    case = case if estimator is None else with_kl(case, estimator)
    check_against_oracle(case | {"backend": backend})


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("shape", ((0, 16, 211), (1, 5, 1), (5, 7, 17), (33, 34, 1000)), ids=str)
def test_shapes(backend: str, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    """No shape is special: empty batches, one word, widths and vocabularies that divide nothing."""
    # The exact KL runs in torch whatever the backend.
    case = with_kl(policy_case(*shape, dtype), "exact" if backend == "torch" else "k3")
    check_against_oracle(case | {"entropy_weights": row_vector(case, 0.0, 0.1), "backend": backend})


def with_transform(case: Case) -> Case:
    """z = cap tanh(scale (x W^T + b) / cap) / temperature, and an entropy bonus of both signs."""
    transform = {"temperature": 1.3, "logit_softcap": 5.0, "logit_scale": 2.0}
    return case | transform | {"entropy_weights": row_vector(case, -0.1, 0.1, seed=3)}


def dual_clip() -> Case:
    """The dual clip bounds negative advantages; w scales the surrogate."""
    case = policy_case(23, bias=True, drift=1.0)
    weights = row_vector(case, 0.0, 2.0)
    return case | {"surrogate": Clip(0.1, 0.15, dual=1.4), "importance_weights": weights}


def importance_weight_of_zero() -> Case:
    """It removes a row's surrogate and nothing else."""
    case = with_kl(policy_case(23), "k2")
    weights = row_vector(case, 0.5, 1.5)
    weights[::3] = 0
    advantages = case["advantages"].masked_fill(weights == 0, 0.0)
    return case | {"importance_weights": weights, "advantages": advantages}


def mixed_dtypes() -> Case:
    """A float32 head over bfloat16 hidden states: each gradient comes back in its own dtype."""
    case = with_kl(policy_case(23, dtype=torch.bfloat16), "exact")
    return case | {"head_weight": case["head_weight"].float() * 1.001}


def strided() -> Case:
    """Strides do not matter."""
    case = policy_case(23)
    weight = case["head_weight"].T.contiguous().T
    case = {name: torch.stack((value, value), -1)[..., 0] for name, value in case.items()}
    return case | {"head_weight": weight}


def huge_logits(size: float, estimator: str) -> Case:
    """Logits of this size overflow nothing."""
    case = policy_case(23, vocab_size=50, drift=0.1)
    case |= {name: case[name].abs() for name in ("hidden", "head_weight")}
    case["logit_scale"] = size / 16
    current = reference_log_probs(double_logits(case), case["target_ids"]).float()
    case["old_log_probs"] = current + 0.1
    return with_kl(case | {"entropy_weights": row_vector(case, 0.0, 0.1)}, estimator)


def without(case: Case, name: str) -> Case:
    return {key: value for key, value in case.items() if key != name}


VARIANTS: dict[str, Callable[[], Case]] = {
    "dual clip": dual_clip,
    "importance weight of zero": importance_weight_of_zero,
    "mixed dtypes": mixed_dtypes,
    "strided": strided,
    "softcap": lambda: policy_case(23) | {"logit_softcap": 3.0},
    "scale": lambda: policy_case(23, bias=True) | {"logit_scale": 0.25},
    "transform, exact": lambda: with_transform(with_kl(policy_case(23, bias=True), "exact")),
    "everything": lambda: with_transform(with_kl(dual_clip(), "k3")),
    "everything in bfloat16": lambda: with_transform(
        with_kl(policy_case(23, dtype=torch.bfloat16, bias=True), "k3")
    ),
    "CISPO": lambda: with_kl(policy_case(23), "k3_unbiased") | {"surrogate": Cispo(1.2)},
    "CISPO, two bounds": lambda: with_kl(policy_case(23), "k1") | {"surrogate": Cispo(1.28, 0.8)},
    "SAPO": lambda: policy_case(23) | {"surrogate": Sapo()},
    "SAPO, k2": lambda: with_kl(policy_case(23), "k2") | {"surrogate": Sapo(2.0, 0.5)},
    # A sampled KL takes the reference's log-probs as they are.
    "k1 log-probs": lambda: with_kl(policy_case(23), "k1", from_hidden=False),
    "k3 log-probs": lambda: with_kl(policy_case(23), "k3", from_hidden=False),
    # Without ref_head_weight the reference uses head_weight, and sends no gradient into it.
    "k3, shared head": lambda: without(with_kl(policy_case(23, bias=True), "k3"), OPERANDS[3]),
    "exact, shared head": lambda: without(with_kl(policy_case(23), "exact"), OPERANDS[3]),
    # Without old log-probs every ratio is 1 and the gradient that of -a l (or its mean).
    "old is current": lambda: without(policy_case(23), "old_log_probs"),
    # The last tile of the vocabulary is not full.
    "tiles of the vocabulary": lambda: with_kl(policy_case(5, 16, 9001), "exact"),
    # float64 inputs are computed in float64, so gradient checks mean something.
    "float64": lambda: with_kl(policy_case(23, dtype=torch.float64, bias=True), "exact"),
    "huge logits": lambda: huge_logits(1e4, "exact"),
    "huge negative logits": lambda: huge_logits(-1e4, "k2"),
}


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("name", VARIANTS)
def test_variants(backend: str, name: str, level: str) -> None:
    """Each option and input that `linear_policy_loss` takes."""
    check_against_oracle(at_level(VARIANTS[name](), level) | {"backend": backend})


@pytest.mark.parametrize("frozen", ((), ("head_weight",), ("hidden", "bias")), ids="-".join)
@pytest.mark.parametrize("level", LEVELS)
def test_frozen_inputs_and_upstream_gradients(
    backend: str, frozen: tuple[str, ...], level: str
) -> None:
    """What needs no gradient gets none; the others scale with whatever comes from above."""
    case = at_level(policy_case(23, bias=True), level) | {"backend": backend}
    check_against_oracle(case, frozen=frozen, upstream=-3.7)
    # A power of two: any other factor rounds a bfloat16 gradient a second time.
    case = at_level(policy_case(23, dtype=torch.bfloat16, bias=True), level)
    check_against_oracle(case | {"backend": backend}, frozen=frozen, upstream=-0.5)


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


@pytest.mark.skipif("amx_bf16" not in CPU_FLAGS, reason="this CPU has no AMX to do without")
def test_without_amx() -> None:
    """On CPUs with AMX oneDNN takes other instructions without it: near the oracle, repeatable."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "DNNL_MAX_CPU_ISA": "AVX512_CORE_BF16"}
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


def log_normalizer_of(case: Case) -> Tensor:
    """The current policy's, of each row."""
    names = ("hidden", "head_weight", "target_ids", "temperature", "logit_scale", "backend")
    head = on_its_device({name: case[name] for name in names if name in case})
    return linear_log_probs(**head, return_log_normalizer=True)[1].cpu()


@pytest.mark.parametrize(
    ("shape", "drift", "level"),
    (
        ((23, 16, 211), 3.0, "sequence"),
        ((23, 16, 211), 30.0, "token"),
        ((20, 34, 400), 3.0, "token"),
        ((3, 64, 1297), 3.0, "token"),
    ),
    ids=str,
)
def test_anchored_exponentials(
    triton_backend: str, shape: tuple[int, int, int], drift: float, level: str
) -> None:
    """exp(z - L_old) in place of exp(z - max): the same values, whatever L_old, and gradients that
    are the oracle's but for three roundings."""
    case = with_kl(at_level(policy_case(*shape, dtype=torch.bfloat16), level), "k3")
    case |= {"chunk_rows": 17, "temperature": 1.3, "logit_scale": 1.2, "backend": triton_backend}
    now = log_normalizer_of(case)
    anchor = now + torch.linspace(-drift, drift, len(now))
    (plain, _), (ours, grads) = run_ours(case), run_ours(case | {"old_log_normalizer": anchor})
    _, oracle = run_reference(case)
    for name in ("loss", "log_probs", "ratio", "kl"):
        assert_same(getattr(ours, name), getattr(plain, name))
    for name, grad in grads.items():
        assert error(grad, oracle[name]) <= THREE_ROUNDINGS


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_an_anchor_too_far_is_nan(triton_backend: str) -> None:
    """Beyond 60 nats the exponentials vanish or overflow: NaN, not a wrong number.

    Under a sequence ratio the statistics come from a pass without an anchor: the gradients say so.
    """
    case = policy_case(6, dtype=torch.bfloat16) | {"backend": triton_backend}
    now = log_normalizer_of(case)
    moved = torch.tensor([0.0, -61.0, 61.0, -200.0, 200.0, 0.0])
    case |= {"advantages": torch.ones(6), "return_entropy": True}
    loss, _ = run_ours(case | {"old_log_normalizer": now + moved})
    assert loss.entropy is not None
    for field in (loss.log_probs, loss.entropy):
        assert field.isnan().tolist() == [False, True, True, True, True, False]
    assert loss.loss.isnan()
    for drift in (-200.0, 70.0):
        _, grads = run_ours(at_level(case | {"old_log_normalizer": now - drift}, "sequence"))
        assert grads["hidden"].isnan().all()


@pytest.mark.parametrize("extra", ("entropy", "softcap", "exact"))
def test_an_anchor_that_does_not_apply_is_not_read(triton_backend: str, extra: str) -> None:
    """With an entropy bonus, a softcap or the exact KL the loss is the one without an anchor."""
    case = policy_case(23, dtype=torch.bfloat16) | {"backend": triton_backend}
    if extra == "entropy":
        case["entropy_weights"] = row_vector(case, 0.0, 0.1)
    elif extra == "softcap":
        case["logit_softcap"] = 5.0
    else:
        case = with_kl(case, "exact")
    anchored = case | {"old_log_normalizer": torch.zeros(23)}
    assert_same_bits(run_ours(anchored), run_ours(case))


@pytest.mark.parametrize("scale", (1e-6, 1e-12))
def test_float16_keeps_what_is_small(backend: str, scale: float) -> None:
    """Advantages far below float16's least number: gradients as exact as at advantages of 1."""
    case = policy_case(23, dtype=torch.float16) | {"backend": backend}
    (_, plain), (_, oracle) = run_ours(case), run_reference(case)
    _, grads = run_ours(case | {"advantages": case["advantages"] * scale}, upstream=1 / scale)
    for name, grad in grads.items():
        as_exact = 1.5 * error(plain[name], oracle[name]) + FLOOR[torch.float16]
        assert error(grad, oracle[name]) <= as_exact
