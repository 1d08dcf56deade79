"""`care_loss`: Eqs. 11-13 in one call, against a transcription of the equations in float64."""

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from care_kernels import Clip
from care_kernels.care_loss import CareLoss, care_loss
from care_kernels.vocab_parallel import VocabShard
from care_train.algorithm.types import TrainSequence
from care_train.config import LossSettings
from care_train.training.update import loss_rows
from tests.algorithm.builders import credit_of, right
from tests.kernels.care_cases import (
    PER_TOKEN,
    B,
    Case,
    D,
    T,
    V,
    make_case,
    ours,
    run,
    transcription,
    with_kl,
)
from tests.kernels.cases import RoundLogitGradient, assert_close, assert_same, cast
from tests.kernels.dispatch import Watch
from tests.kernels.oracle import (
    reference_log_probs,
    reference_logits,
    reference_ratio,
    reference_sampled_kl,
    reference_surrogate,
    reference_token_advantages,
)


def check(case: Case) -> None:
    """Loss, gradients and per-token results follow the transcription."""
    got, got_grads = run(case, ours)
    want, want_grads = run(
        {name: cast(value, torch.float64) for name, value in case.items()}, transcription
    )
    with RoundLogitGradient(case["hidden"].dtype):
        eager, eager_grads = run(case, lambda c: transcription(c, got.loss.dtype))
    assert_close(got.loss, want.loss, eager.loss, is_gradient=False)
    assert set(got_grads) == set(want_grads)
    for name, grad in got_grads.items():
        assert grad.dtype == case[name].dtype
        assert_close(grad, want_grads[name], eager_grads[name], is_gradient=True)
    credit = got.token_advantages, want.token_advantages
    assert credit[0] is not None and credit[1] is not None
    assert_close(*credit, credit[0], is_gradient=False)
    computed = computed_tokens(case)
    for name in PER_TOKEN:
        value = getattr(got, name)
        if value is not None:
            pair = getattr(want, name)[computed], getattr(eager, name)[computed]
            assert_close(value[computed], *pair, is_gradient=False)
            assert (value[~computed] == (1 if name == "ratio" else 0)).all()
    assert torch.equal(got.clipped_low, want.clipped_low)
    assert torch.equal(got.clipped_high, want.clipped_high)


def computed_tokens(case: Case) -> Tensor:
    """[B, T] bool: the tokens whose results are reported."""
    if case.get("kl_coef") or case.get("entropy_coef"):
        return case["response_mask"] & (case["advantages"] != 0)[:, None]
    arguments = ("advantages", "think_spans", "answer_spans", "is_positive")
    credit = torch.stack(reference_token_advantages(*(case[name] for name in arguments), [T] * B))
    has_credit = (credit * case.get("importance_weights", torch.ones(B, T))) != 0
    if case.get("ratio_level") == "sequence":
        return case["response_mask"] & has_credit.any(1, keepdim=True)
    return has_credit & case["response_mask"]


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float64), ids=str)
@pytest.mark.parametrize("level", ("token", "sequence"))
@pytest.mark.parametrize("estimator", (None, "k1", "k2", "k3", "exact"))
def test_follows_the_equations(dtype: torch.dtype, level: str, estimator: str | None) -> None:
    """Every KL at both ratio levels, loss, gradients and per-token results."""
    case = make_case(dtype, bias=True) | {"ratio_level": level}
    if dtype != torch.bfloat16:
        # In bfloat16 the oracle's eager rival has a single GEMM, so a single rounding.
        case["chunk_rows"] = 7
    check(case if estimator is None else with_kl(case, estimator))


@pytest.mark.parametrize(
    "options",
    (
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
    case = make_case(bias=True) | options
    check({name: value for name, value in case.items() if value is not None})


@pytest.mark.parametrize("seed", range(3))
def test_seeds(seed: int) -> None:
    """Nothing hangs on one draw of numbers."""
    check(with_kl(make_case(seed=seed), "k3"))


def test_importance_weights() -> None:
    """They scale the surrogate alone; outside the response anything may stand."""
    weights = torch.rand(B, T, generator=torch.Generator().manual_seed(2)) + 0.5
    weights[0, 9] = 0
    case = make_case()
    weights = weights.masked_fill(~case["response_mask"], torch.nan)
    check(case | {"importance_weights": weights})


def test_hidden_state_before_the_token() -> None:
    """The gradient of a lone answer token t lands on the hidden state at t - 1, nowhere else."""
    case = make_case() | {"old_log_probs": None}
    for name in ("think_spans", "answer_spans"):
        case[name] = torch.zeros(B, 2, dtype=torch.int64)
    case["answer_spans"][1] = torch.tensor([4, 5])
    _, grads = run(case, ours)
    touched = grads["hidden"].ne(0).any(-1)
    assert touched.nonzero().tolist() == [[1, 3]]


def test_the_prompt_may_be_left_out() -> None:
    """Slicing every argument alike, from the last prompt token on, changes nothing."""
    case = with_kl(make_case(), "k3")
    shifted = ("hidden", "token_ids", "response_mask", "old_log_probs", "ref_log_probs")
    longer = case | {
        name: torch.cat((torch.zeros_like(case[name][:, :2]), case[name]), 1) for name in shifted
    }
    longer |= {name: case[name] + 2 for name in ("think_spans", "answer_spans")}
    got, want = ours(longer), ours(case)
    assert_same(got.loss, want.loss)
    assert_same(got.log_probs[:, 2:], want.log_probs)


def test_without_a_mask() -> None:
    """Where only tokens with an advantage count, the mask changes nothing."""
    case = make_case()
    got, got_grads = run(case | {"response_mask": None}, ours)
    want, want_grads = run(case, ours)
    assert torch.equal(got.loss, want.loss)
    assert all(torch.equal(got_grads[name], want_grads[name]) for name in want_grads)


def test_a_mask_of_numbers() -> None:
    """0 and 1 do as well as False and True."""
    case = with_kl(make_case(), "k2")
    numbers = case | {"response_mask": case["response_mask"].long()}
    assert torch.equal(ours(numbers).loss, ours(case).loss)


def test_micro_batches_add_up() -> None:
    """With the global |S*|, the losses and gradients of the parts sum to those of the whole."""
    case = with_kl(make_case(), "k3") | {"num_sequences": 4.0}
    whole, whole_grads = run(case, ours)
    parts = [
        run({n: v[r] if is_batched(n) else v for n, v in case.items()}, ours)
        for r in (slice(0, 2), slice(2, 5))
    ]
    assert_same(parts[0][0].loss + parts[1][0].loss, whole.loss)
    summed = parts[0][1]["head_weight"] + parts[1][1]["head_weight"]
    assert_same(summed, whole_grads["head_weight"])


def is_batched(name: str) -> bool:
    return name not in ("head_weight", "kl_coef", "kl_estimator", "num_sequences")


def test_the_default_count_is_the_sequences_of_this_call() -> None:
    """|S*| = 4 of the 5 sequences; the one outside contributes nothing."""
    case = with_kl(make_case(), "k3")
    assert torch.equal(ours(case).loss, ours(case | {"num_sequences": 4}).loss)
    kept = torch.tensor([0, 1, 3, 4])
    without = {name: v[kept] if is_batched(name) else v for name, v in case.items()}
    assert_same(ours(without).loss, ours(case).loss)


def test_no_active_sequence() -> None:
    """Nothing to learn: loss and gradients are 0, not 0 / 0."""
    case = with_kl(make_case(), "k3") | {"advantages": torch.zeros(B)}
    got, grads = run(case, ours)
    assert got.loss == 0
    assert all((grad == 0).all() for grad in grads.values())


@pytest.mark.parametrize(("num_rows", "num_tokens"), ((0, 6), (3, 0), (3, 1)))
def test_empty_batches(num_rows: int, num_tokens: int) -> None:
    """No sequences, no tokens, or no token that a hidden state predicts."""
    spans = torch.zeros(num_rows, 2, dtype=torch.int64)
    got = care_loss(
        torch.zeros(num_rows, num_tokens, D),
        torch.zeros(V, D),
        torch.zeros(num_rows, num_tokens, dtype=torch.int64),
        torch.ones(num_rows),
        spans,
        spans,
        torch.ones(num_rows, dtype=torch.bool),
    )
    assert got.loss == 0
    assert got.log_probs.shape == got.clipped_low.shape == (num_rows, num_tokens)


def test_the_trainers_rows() -> None:
    """Token advantages and KL shares are those `care_train` feeds its own loss with."""
    case = with_kl(make_case(), "k3")
    settings = LossSettings(kl_coef=case["kl_coef"])
    credit = ours(case).token_advantages
    assert credit is not None
    _, grads = run(case, ours)
    total = torch.zeros(V, D)
    for i in (0, 1, 3, 4):
        (tokens,) = case["response_mask"][i].nonzero(as_tuple=True)
        advantage = case["advantages"][i].item()
        weights = (credit[i, tokens] / advantage).tolist()
        rollout = replace(right(), token_ids=tuple(range(len(weights))))
        sequence = TrainSequence(rollout, advantage, credit_of(weights, normalize=False))
        rows = loss_rows([sequence], [0.25], settings, torch.device("cpu"))
        torch.testing.assert_close(rows["advantages"], credit[i, tokens] / 4)
        total += _trainer_gradient(case, i, tokens, rows)
    torch.testing.assert_close(grads["head_weight"], total)


def test_weight_gradient_into_a_buffer() -> None:
    """dW goes to the caller's buffer, as `linear_policy_loss` has it."""
    case = with_kl(make_case(), "k3")
    _, want = run(case, ours)
    buffer = torch.zeros(V, D)
    _, got = run(case | {"weight_grad": buffer}, ours)
    assert_same(buffer, want["head_weight"])
    assert "head_weight" not in got
    assert_same(got["hidden"], want["hidden"])


def test_vocabulary_shard(tmp_path: Path) -> None:
    """A part of the head, here the whole, with ids of the whole vocabulary."""
    # A test before this one may have left its group of one.
    is_own = not dist.is_initialized()
    if is_own:
        store = f"file://{tmp_path}/store"
        dist.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    try:
        shard = VocabShard(dist.group.WORLD, start=0, vocab_size=V)
        case = with_kl(make_case(), "k3")
        assert_same(ours(case | {"vocab_shard": shard}).loss, ours(case).loss)
    finally:
        if is_own:
            dist.destroy_process_group()


def test_never_holds_the_vocabulary() -> None:
    """No [B, T, V] tensor appears, nor a copy of hidden by gathering rows."""
    case = with_kl(make_case(), "k3") | {"chunk_rows": 2}
    with Watch() as watch:
        run(case, ours)
    assert watch.largest <= B * T * D < B * T * V


def test_module_is_the_function() -> None:
    """Options in the constructor, tensors in the call."""
    case = with_kl(make_case(bias=True), "k3") | {"surrogate": Clip(0.1, dual=2.0)}
    options = {n: case.pop(n) for n in ("kl_coef", "kl_estimator", "surrogate")}
    loss = CareLoss(**options)
    want = care_loss(**case, **options)
    for module in (loss, copy.deepcopy(loss)):
        got = module(**case)
        for a, b in zip(got, want, strict=True):
            assert (a is None and b is None) or torch.equal(a, b)
    assert not list(loss.parameters()) and not loss.state_dict()


def test_module_shows_its_options() -> None:
    """Its repr is the call that makes it."""
    loss = CareLoss(kl_coef=0.02, surrogate=Clip(high=0.3))
    assert repr(loss) == "CareLoss(kl_coef=0.02, surrogate=Clip(low=0.2, high=0.3, dual=None))"
    assert repr(eval(repr(loss))) == repr(loss)


def _trainer_gradient(case: Case, i: int, tokens: Tensor, rows: Any) -> Tensor:
    """dL / d head_weight of one sequence's rows, by autograd of Eqs. 12-13."""
    weight = case["head_weight"].clone().requires_grad_()
    logits = reference_logits(case["hidden"][i, tokens - 1], weight)
    log_probs = reference_log_probs(logits, case["token_ids"][i, tokens])
    ratio = reference_ratio(log_probs, case["old_log_probs"][i, tokens])
    kl = reference_sampled_kl("k3", log_probs, case["ref_log_probs"][i, tokens])
    surrogate = reference_surrogate(Clip(), ratio, log_probs, rows["advantages"])
    ((rows["kl_weights"] * kl).sum() - surrogate.sum()).backward()
    assert weight.grad is not None
    return weight.grad
