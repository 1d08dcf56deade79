"""`linear_policy_loss` against the float64 oracle: every loss, KL, ratio level, dtype and shape."""

import pytest
import torch

from care_kernels import Clip
from tests.kernels.cases import (
    check_against_oracle,
    double_logits,
    policy_case,
    row_vector,
    with_kl,
)
from tests.kernels.oracle import reference_log_probs

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ESTIMATORS = ("k1", "k2", "k3", "exact")


def sequence_ids(num_rows: int) -> torch.Tensor:
    """Sequences of unequal length whose rows are interleaved and whose ids have gaps."""
    return (torch.arange(num_rows) * 5 % 7).div(2, rounding_mode="floor") * 100 - 50


def at_level(case: dict, level: str) -> dict:
    ids = sequence_ids(case["hidden"].shape[0]) if level == "sequence" else None
    return case | {"ratio_level": level, "sequence_ids": ids}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("level", ("token", "sequence"))
@pytest.mark.parametrize("estimator", (None, *ESTIMATORS))
def test_loss_and_gradients(dtype: torch.dtype, level: str, estimator: str | None) -> None:
    """Eqs. 12-13 at both ratio levels with every KL, in chunks smaller than the batch."""
    case = at_level(policy_case(dtype=dtype) | {"chunk_rows": 17}, level)
    if estimator is not None:
        case = with_kl(case, estimator)
    check_against_oracle(case)


@pytest.mark.parametrize("vocab_size", (1, 7, 1000, 32001))
@pytest.mark.parametrize("num_rows", (0, 1, 63))
@pytest.mark.parametrize("width", (5, 64))
def test_shapes(num_rows: int, width: int, vocab_size: int) -> None:
    """No shape is special: empty batches, one word, widths and vocabularies that divide nothing."""
    case = with_kl(policy_case(num_rows, width, vocab_size), "exact")
    check_against_oracle(case | {"entropy_weights": row_vector(case, 0.0, 0.1)})


@pytest.mark.parametrize("level", ("token", "sequence"))
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
def test_logit_transform(options: dict, bias: bool, estimator: str, level: str) -> None:
    """z = cap tanh(scale (x W^T + b) / cap) / temperature, through every gradient."""
    case = policy_case(bias=bias) | options
    case["entropy_weights"] = row_vector(case, 0.0, 0.1)
    check_against_oracle(with_kl(at_level(case, level), estimator))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bias_gradient_dtype(dtype: torch.dtype) -> None:
    """The bias receives its gradient in its own dtype."""
    check_against_oracle(policy_case(dtype=dtype, bias=True) | {"chunk_rows": 10})


@pytest.mark.parametrize("level", ("token", "sequence"))
def test_dual_clip_importance_weights_and_entropy(level: str) -> None:
    """The dual clip bounds negative advantages; w scales the surrogate; H has a minus."""
    case = at_level(policy_case(drift=1.0), level)
    case |= {
        "surrogate": Clip(0.1, 0.15, dual=1.4),
        "importance_weights": row_vector(case, 0.0, 2.0),
        "entropy_weights": row_vector(case, -0.1, 0.1, seed=3),
    }
    check_against_oracle(case)


@pytest.mark.parametrize("level", ("token", "sequence"))
def test_importance_weight_of_zero(level: str) -> None:
    """w = 0 removes a row's surrogate and nothing else."""
    case = with_kl(at_level(policy_case(), level), "k2")
    weights = row_vector(case, 0.5, 1.5)
    weights[::3] = 0
    case["advantages"] = torch.where(weights == 0, 0.0, case["advantages"])
    check_against_oracle(case | {"importance_weights": weights})


@pytest.mark.parametrize("level", ("token", "sequence"))
@pytest.mark.parametrize("estimator", ("k1", "k2", "k3"))
def test_reference_log_probs(estimator: str, level: str) -> None:
    """A sampled KL takes the reference's log-probs as they are."""
    check_against_oracle(with_kl(at_level(policy_case(), level), estimator, from_hidden=False))


@pytest.mark.parametrize("estimator", ("k3", "exact"))
def test_reference_shares_the_head(estimator: str) -> None:
    """Without ref_head_weight the reference uses head_weight, and sends no gradient into it."""
    case = with_kl(policy_case(bias=True), estimator)
    del case["ref_head_weight"]
    check_against_oracle(case)


@pytest.mark.parametrize("level", ("token", "sequence"))
def test_old_is_current(level: str) -> None:
    """Without old log-probs every ratio is 1 and the gradient that of -a l (or its mean)."""
    case = at_level(policy_case(), level)
    del case["old_log_probs"]
    check_against_oracle(case)


@pytest.mark.parametrize(
    "frozen", (("head_weight",), ("hidden",), ("hidden", "bias")), ids="-".join
)
@pytest.mark.parametrize("level", ("token", "sequence"))
def test_frozen_inputs(frozen: tuple[str, ...], level: str) -> None:
    """What needs no gradient gets none, and the others are unchanged."""
    check_against_oracle(at_level(policy_case(bias=True), level), frozen=frozen)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("upstream", (-3.7, 1e-3))
def test_upstream_gradient(dtype: torch.dtype, upstream: float) -> None:
    """The gradients made in the forward scale with whatever comes from above."""
    check_against_oracle(policy_case(dtype=dtype), upstream=upstream)


@pytest.mark.parametrize("seed", range(5))
def test_seeds(seed: int) -> None:
    """Nothing hangs on one draw of numbers."""
    check_against_oracle(with_kl(policy_case(seed=seed), "k3"))


def test_non_contiguous_inputs() -> None:
    """Strides do not matter."""
    case = policy_case()
    strided = {
        name: torch.stack((value, value), -1)[..., 0]
        for name, value in case.items()
        if isinstance(value, torch.Tensor)
    }
    strided["head_weight"] = case["head_weight"].T.contiguous().T
    assert not any(value.is_contiguous() for value in strided.values())
    check_against_oracle(strided)


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
    if estimator is not None:
        case = with_kl(case, estimator)
    check_against_oracle(case)


def test_float64() -> None:
    """float64 inputs are computed in float64, so gradient checks mean something."""
    case = with_kl(policy_case(dtype=torch.float64, bias=True), "exact")
    check_against_oracle(case | {"logit_softcap": 4.0, "chunk_rows": 20})


@pytest.mark.parametrize("level", ("token", "sequence"))
def test_mixed_dtypes(level: str) -> None:
    """A float32 head over bfloat16 hidden states: each gradient comes back in its own dtype."""
    case = with_kl(at_level(policy_case(dtype=torch.bfloat16), level), "exact")
    check_against_oracle(case | {"head_weight": case["head_weight"].float() * 1.001})
