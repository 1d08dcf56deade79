"""The public functions on `backend="triton"`: the same oracle and the same promises as on torch."""

from typing import Any

import pytest
import torch
from torch import Tensor

from care_kernels import Cispo, Clip, Sapo, care_loss, linear_log_probs
from tests.kernels import test_log_probs as log_probs
from tests.kernels.cases import (
    assert_same,
    assert_same_bits,
    check_against_oracle,
    error,
    head_case,
    policy_case,
    row_vector,
    run_ours,
    run_reference,
    with_kl,
)
from tests.kernels.dispatch import Watch
from tests.kernels.test_policy_loss_oracle import VARIANTS, at_level
from tests.kernels.tolerances import FLOOR, THREE_ROUNDINGS
from tests.kernels.triton.interpreter import DEVICE, import_interpreted, interpret_kernels_of

import_interpreted("projection", "softmax")
interpret_kernels_of("care_kernels.region_weights")
interpret_kernels_of("care_kernels.rationale_distance")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
pytestmark = pytest.mark.skipif(DEVICE != "cpu", reason="cases are built on the CPU")


@pytest.fixture(autouse=True)
def allow_cpu_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    """CPU tensors reach the Triton kernels under the interpreter only."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")


def on_triton(case: dict[str, Any]) -> dict[str, Any]:
    return case | {"backend": "triton"}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("level", ("token", "sequence"))
@pytest.mark.parametrize("estimator", (None, "k1", "k2", "k3", "exact"))
def test_loss_and_gradients(dtype: torch.dtype, level: str, estimator: str | None) -> None:
    """Eqs. 12-13 with every KL, through both paths, in chunks smaller than the batch."""
    case = at_level(policy_case(23, dtype=dtype) | {"chunk_rows": 17}, level)
    if estimator is not None:
        case = with_kl(case, estimator)
    check_against_oracle(on_triton(case))


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize(
    ("num_rows", "width", "vocab_size"), ((0, 16, 211), (1, 5, 1), (5, 7, 17), (33, 34, 1000))
)
def test_shapes(num_rows: int, width: int, vocab_size: int, dtype: torch.dtype) -> None:
    """No shape is special."""
    case = policy_case(num_rows, width, vocab_size, dtype)
    check_against_oracle(on_triton(case | {"entropy_weights": row_vector(case, 0.0, 0.1)}))


@pytest.mark.parametrize("name", ("old is current", "mixed dtypes", "float64"))
def test_variants(name: str) -> None:
    """Of other inputs; float64, which Triton's kernels are not for, runs in torch."""
    check_against_oracle(on_triton(VARIANTS[name]()))


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_everything_at_once(dtype: torch.dtype) -> None:
    """Bias, softcap, scale, temperature, dual clip, importance weights, entropy and k3."""
    case = policy_case(33, dtype=dtype, bias=True, drift=0.5)
    case |= {
        "surrogate": Clip(dual=1.4),
        "importance_weights": row_vector(case, 0.0, 2.0),
        "entropy_weights": row_vector(case, -0.1, 0.1, seed=3),
        "temperature": 1.3,
        "logit_softcap": 5.0,
        "logit_scale": 2.0,
    }
    # A power of two: any other factor rounds a bfloat16 gradient a second time.
    check_against_oracle(on_triton(with_kl(case, "k3")), upstream=-0.5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_log_probs(dtype: torch.dtype) -> None:
    """`linear_log_probs` and its backward, entropy included."""
    log_probs.check(on_triton(head_case(23, dtype=dtype, bias=True) | {"chunk_rows": 13}))


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_skipping_and_repeating_change_no_bit(dtype: torch.dtype) -> None:
    """A second run, and one that reports the skipped rows, give the same bits."""
    case = on_triton(policy_case(23, dtype=dtype))
    first = run_ours(case)
    assert_same_bits(run_ours(case), first)
    loss, grads = run_ours(case | {"report_all_rows": True})
    assert torch.equal(first[0].loss, loss.loss)
    assert all(torch.equal(grad, grads[name]) for name, grad in first[1].items())


def test_log_probs_without_gradients_hold_no_logits() -> None:
    """The fused projection leaves a few numbers for each row and vocabulary tile."""
    case = on_triton(head_case(40, 16, 3000, torch.bfloat16))
    with Watch() as watch, torch.no_grad():
        linear_log_probs(**case)
    assert watch.largest < 40 * 3000


def test_care_loss_is_the_same_on_both_backends() -> None:
    """Eqs. 11-13 in one call, Triton's Eq. 11 kernel included."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(3, 9, 16, generator=generator)
    weight = torch.randn(50, 16, generator=generator)
    spans = torch.tensor([[2, 5], [3, 3], [1, 4]]), torch.tensor([[5, 8], [3, 9], [4, 6]])
    arguments = (torch.tensor([1.0, -0.5, -0.5]), *spans, torch.tensor([True, False, False]))
    ids = torch.randint(50, (3, 9), generator=generator)
    results = [
        care_loss(hidden, weight, ids, *arguments, backend=backend)
        for backend in ("triton", "torch")
    ]
    assert torch.equal(results[0].token_advantages, results[1].token_advantages)
    torch.testing.assert_close(results[0].loss, results[1].loss, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("shape", "drift", "level"),
    (
        ((23, 16, 211), 0.0, "token"),
        ((23, 16, 211), 3.0, "sequence"),
        ((23, 16, 211), 30.0, "token"),
        ((20, 34, 400), 3.0, "token"),
        ((5, 7, 17), 30.0, "sequence"),
    ),
    ids=str,
)
def test_anchored_exponentials(shape: tuple, drift: float, level: str) -> None:
    """exp(z - L_old) in place of exp(z - max): the same values, whatever L_old, and gradients that
    are the oracle's but for three roundings."""
    case = at_level(policy_case(*shape, dtype=torch.bfloat16), level) | {"chunk_rows": 17}
    case = with_kl(case, "k3") | {"temperature": 1.3, "logit_scale": 1.2}
    head = {name: case[name] for name in ("hidden", "head_weight", "target_ids")}
    options = {name: case[name] for name in ("temperature", "logit_scale")}
    now = linear_log_probs(**head, **options, return_log_normalizer=True)[1]
    moved = torch.linspace(-drift, drift, len(now))
    plain, _ = run_ours(on_triton(case))
    ours, grads = run_ours(on_triton(case | {"old_log_normalizer": now + moved}))
    _, oracle = run_reference(case)
    for name in ("loss", "log_probs", "ratio", "kl"):
        assert_same(getattr(ours, name), getattr(plain, name))
    for name, grad in grads.items():
        assert error(grad, oracle[name]) <= THREE_ROUNDINGS


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_an_anchor_too_far_is_nan() -> None:
    """Beyond 60 nats the exponentials vanish or overflow: NaN, not a wrong number.

    Under a sequence ratio the statistics come from a pass without an anchor: the gradients say so.
    """
    case = policy_case(6, dtype=torch.bfloat16)
    head = {name: case[name] for name in ("hidden", "head_weight", "target_ids")}
    now = linear_log_probs(**head, return_log_normalizer=True)[1]
    moved = torch.tensor([0.0, -61.0, 61.0, -200.0, 200.0, 0.0])
    ones = torch.ones(6)
    case |= {"old_log_normalizer": now + moved, "advantages": ones, "return_entropy": True}
    loss, _ = run_ours(on_triton(case))
    assert loss.entropy is not None
    for field in (loss.log_probs, loss.entropy):
        assert field.isnan().tolist() == [False, True, True, True, True, False]
    assert loss.loss.isnan()
    for drift in (-200.0, -70.0, 70.0, 200.0):
        sequences = at_level(case | {"old_log_normalizer": now - drift}, "sequence")
        _, grads = run_ours(on_triton(sequences))
        assert grads["hidden"].isnan().all()


@pytest.mark.parametrize("extra", ("entropy", "softcap", "exact"))
def test_an_anchor_that_does_not_apply_is_not_read(extra: str) -> None:
    """With an entropy bonus, a softcap or the exact KL the loss is the one without an anchor."""
    case = policy_case(23, dtype=torch.bfloat16)
    if extra == "entropy":
        case["entropy_weights"] = row_vector(case, 0.0, 0.1)
    elif extra == "softcap":
        case["logit_softcap"] = 5.0
    else:
        case = with_kl(case, "exact")
    given = on_triton(case | {"old_log_normalizer": torch.zeros(23)})
    assert_same_bits(run_ours(given), run_ours(on_triton(case)))


@pytest.mark.parametrize("scale", (1e-6, 1e-12))
def test_float16_keeps_what_is_small(scale: float) -> None:
    """Advantages far below float16's least number: gradients as exact as at advantages of 1."""
    case = on_triton(policy_case(23, dtype=torch.float16))
    tiny = case | {"advantages": case["advantages"] * scale}
    _, plain = run_ours(case)
    _, oracle = run_reference(case)
    _, grads = run_ours(tiny, upstream=1 / scale)
    for name, grad in grads.items():
        as_exact = 1.5 * error(plain[name], oracle[name]) + FLOOR[torch.float16]
        assert error(grad, oracle[name]) <= as_exact


def test_float16_log_probs_keep_what_is_small() -> None:
    """The same under a loss of one's own: upstream gradients of 2e-4, of which dL/dz would be a few
    steps of float16."""
    case = head_case(23, dtype=torch.float16)

    def gradients(scale: float, dtype: torch.dtype = torch.float16) -> list[Tensor]:
        leaves = [case[n].to(dtype, copy=True).requires_grad_() for n in ("hidden", "head_weight")]
        result = linear_log_probs(*leaves, case["target_ids"], backend="triton")
        (scale * torch.linspace(-1, 1, 23) * result).sum().backward()
        return [leaf.grad.double() / scale for leaf in leaves if leaf.grad is not None]

    plain, tiny, oracle = gradients(1.0), gradients(2e-4), gradients(1.0, torch.float64)
    for first, second, want in zip(plain, tiny, oracle, strict=True):
        assert error(second, want) <= 1.5 * error(first, want) + FLOOR[torch.float16]


@pytest.mark.parametrize("surrogate", (Cispo(1.2), Sapo()), ids=repr)
@pytest.mark.parametrize("level", ("token", "sequence"))
def test_other_surrogates(level: str, surrogate: Any) -> None:
    """CISPO and SAPO with the unbiased KL."""
    case = at_level(policy_case(23), level) | {"surrogate": surrogate}
    check_against_oracle(on_triton(with_kl(case, "k3_unbiased")))
