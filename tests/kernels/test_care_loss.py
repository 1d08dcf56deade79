"""`care_loss`: Eqs. 11-13 in one call, beside the two functions that have them."""

import copy
from collections.abc import Callable

import pytest
import torch

from care_kernels import (
    CareLoss,
    Clip,
    PolicyLoss,
    care_loss,
    linear_policy_loss,
    token_advantages,
)
from care_kernels.objective import SKIPPED_ROW
from tests.kernels.cases import (
    B,
    Case,
    D,
    Run,
    T,
    V,
    assert_same,
    batch_case,
    error,
    gradients_of,
    leaves_of,
    on_its_device,
)
from tests.kernels.dispatch import Watch
from tests.kernels.tolerances import SAME_MATHS


def with_kl(case: Case, estimator: str) -> Case:
    """Add a reference; hidden states and a head of its own for "k1" and "exact"."""
    other = batch_case(case["hidden"].dtype, seed=5)
    case = case | {"kl_coef": 0.3, "kl_estimator": estimator}
    if estimator in ("k1", "exact"):
        return case | {f"ref_{n}": case[n] + 0.1 * other[n] for n in ("hidden", "head_weight")}
    return case | {"ref_log_probs": torch.lerp(case["old_log_probs"], other["old_log_probs"], 0.1)}


def run(case: Case, function: Callable[[Case], PolicyLoss]) -> Run:
    """The loss on fresh leaves, and their gradients."""
    leaves = leaves_of(case)
    outcome = function(case | leaves)
    outcome.loss.backward()
    return outcome, gradients_of(leaves)


def ours(case: Case) -> PolicyLoss:
    return care_loss(**case)


def composed(case: Case) -> PolicyLoss:
    """Eq. 11, then Eqs. 12-13 on the rows of S*'s response tokens, with 1/|S*| and the KL's 1/T.

    Both functions follow the oracle in tests of their own.
    """
    names = ("advantages", "think_spans", "answer_spans", "is_positive")
    weights = {n: case[n] for n in ("think_weight", "weight_eps") if n in case}
    credit = token_advantages(*(case[n] for n in names), seq_len=T, **weights)
    is_active = case["advantages"] != 0
    row, token = (case["response_mask"] & is_active[:, None]).nonzero(as_tuple=True)
    num_sequences = case.get("num_sequences", int(is_active.sum()))
    share = 1 / (case["response_mask"].sum(1)[row] * num_sequences)
    by_row = ("old_log_probs", "ref_log_probs", "importance_weights")
    whole = ("temperature", "logit_softcap", "logit_scale", "bias", "surrogate", "ratio_level")
    options = {n: case[n][row, token] for n in by_row if n in case}
    options |= {n: case[n] for n in (*whole, "kl_estimator", "ref_head_weight") if n in case}
    if "ref_hidden" in case:
        options["ref_hidden"] = case["ref_hidden"][row, token - 1]
    for name, coefficient in (("kl_weights", "kl_coef"), ("entropy_weights", "entropy_coef")):
        if coefficient in case:
            options[name] = case[coefficient] * share
    found = linear_policy_loss(
        case["hidden"][row, token - 1],
        case["head_weight"],
        case["token_ids"][row, token],
        credit[row, token] / num_sequences,
        sequence_ids=row,
        **options,
    )
    spread = [
        None if rows is None else rows.new_full((B, T), fill).index_put((row, token), rows)
        for rows, fill in zip(found[1:], SKIPPED_ROW[1:], strict=True)
    ]
    return found._make([found.loss, *spread])._replace(token_advantages=credit)


def check(case: Case) -> None:
    """Loss, gradients and what is reported of each token are the composition's."""
    (got, got_grads), (want, want_grads) = run(case, ours), run(case, composed)
    assert_same(got.loss, want.loss)
    assert set(got_grads) == set(want_grads)
    for name, grad in got_grads.items():
        assert_same(grad, want_grads[name])
    assert got.token_advantages is not None and want.token_advantages is not None
    assert torch.equal(got.token_advantages, want.token_advantages)
    for field, wanted in zip(got[1:-1], want[1:-1], strict=True):
        assert (field is None) == (wanted is None)
        if field is not None and wanted is not None:
            assert field.shape == (B, T)
            assert error(field.double(), wanted.double(), 1.0) <= SAME_MATHS[torch.float32]


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("level", ("token", "sequence"))
@pytest.mark.parametrize("estimator", (None, "k1", "k3", "exact"))
def test_follows_the_equations(dtype: torch.dtype, level: str, estimator: str | None) -> None:
    """Every form of the reference at both ratio levels, in chunks smaller than the batch."""
    case = batch_case(dtype, bias=True) | {"ratio_level": level, "chunk_rows": 7}
    check(case if estimator is None else with_kl(case, estimator))


IMPORTANCE = torch.rand(B, T, generator=torch.Generator().manual_seed(2)) + 0.5
IMPORTANCE[0, 9] = 0
# Outside the response anything may stand.
IMPORTANCE = IMPORTANCE.masked_fill(~batch_case()["response_mask"], torch.nan)


@pytest.mark.parametrize(
    "options",
    (
        {"importance_weights": IMPORTANCE},
        {"think_weight": 0.5, "weight_eps": 0.1},
        {"surrogate": Clip(0.05, 0.1, dual=1.2)},
        {"entropy_coef": 0.1},
        {"temperature": 0.7, "logit_softcap": 3.0, "logit_scale": 1.5},
        {"num_sequences": 17.5},
        {"num_sequences": torch.tensor(3)},
        {"old_log_probs": None},
    ),
    ids=lambda options: "-".join(options),
)
def test_options(options: Case) -> None:
    """Each option reaches the loss."""
    case = batch_case(bias=True) | options
    check({name: value for name, value in case.items() if value is not None})


def test_the_mask() -> None:
    """0 and 1 do as well as False and True; where only tokens with an advantage count, none."""
    case = batch_case()
    want, want_grads = run(case, ours)
    for mask in (None, case["response_mask"].long()):
        got, got_grads = run(case | {"response_mask": mask}, ours)
        assert torch.equal(got.loss, want.loss)
        assert all(torch.equal(got_grads[name], want_grads[name]) for name in want_grads)


@pytest.mark.parametrize(("num_rows", "num_tokens"), ((0, 6), (3, 0), (3, 1), (B, T)))
def test_nothing_to_learn(num_rows: int, num_tokens: int) -> None:
    """No sequences, no tokens, none that a hidden state predicts, or no advantage: 0, not 0 / 0."""
    spans = torch.zeros(num_rows, 2, dtype=torch.int64)
    case = with_kl(batch_case(), "k3") | {"advantages": torch.zeros(B)}
    if num_rows < B:
        case = {
            "hidden": torch.zeros(num_rows, num_tokens, D),
            "head_weight": torch.zeros(V, D),
            "token_ids": torch.zeros(num_rows, num_tokens, dtype=torch.int64),
            "advantages": torch.ones(num_rows),
            "think_spans": spans,
            "answer_spans": spans,
            "is_positive": torch.ones(num_rows, dtype=torch.bool),
        }
    got, grads = run(case, ours)
    assert got.loss == 0 and not any(grad.any() for grad in grads.values())
    assert got.log_probs.shape == got.clipped_low.shape == (num_rows, num_tokens)


def test_weight_gradient_into_a_buffer() -> None:
    """dW goes to the caller's buffer, as `linear_policy_loss` has it."""
    case = with_kl(batch_case(), "k3")
    _, want = run(case, ours)
    buffer = torch.zeros(V, D)
    _, got = run(case | {"weight_grad": buffer}, ours)
    assert_same(buffer, want["head_weight"])
    assert "head_weight" not in got
    assert_same(got["hidden"], want["hidden"])


def test_never_holds_the_vocabulary() -> None:
    """No [B, T, V] tensor appears, nor a copy of hidden by gathering rows."""
    case = with_kl(batch_case(), "k3") | {"chunk_rows": 2}
    with Watch() as watch:
        run(case, ours)
    assert watch.largest <= B * T * D < B * T * V


def test_module_is_the_function() -> None:
    """Options in the constructor, tensors in the call; its repr is the call that makes it."""
    case = with_kl(batch_case(bias=True), "k3") | {"surrogate": Clip(0.1, dual=2.0)}
    options = {n: case.pop(n) for n in ("kl_coef", "kl_estimator", "surrogate")}
    loss = CareLoss(**options)
    want = care_loss(**case, **options)
    for module in (loss, copy.deepcopy(loss)):
        for a, b in zip(module(**case), want, strict=True):
            assert (a is None and b is None) or torch.equal(a, b)
    assert not list(loss.parameters()) and not loss.state_dict()
    loss = CareLoss(kl_coef=0.02, surrogate=Clip(high=0.3))
    assert repr(loss) == "CareLoss(kl_coef=0.02, surrogate=Clip(low=0.2, high=0.3, dual=None))"
    assert repr(eval(repr(loss))) == repr(loss)


def test_the_same_on_both_backends(triton_backend: str) -> None:
    """Eqs. 11-13 in one call, Triton's Eq. 11 kernel included."""
    case = with_kl(batch_case(), "k3")
    fused, plain = (
        care_loss(**on_its_device(case | {"backend": name})) for name in (triton_backend, "torch")
    )
    assert fused.token_advantages is not None and plain.token_advantages is not None
    assert torch.equal(fused.token_advantages.cpu(), plain.token_advantages)
    torch.testing.assert_close(fused.loss.cpu(), plain.loss, rtol=1e-5, atol=1e-6)
